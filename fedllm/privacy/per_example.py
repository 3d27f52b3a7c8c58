"""Per-example gradients of the adapters' linear maps in one ordinary backward pass.

For ``y = x W^T`` the gradient of example b's loss is ``sum_t g_bt x_bt^T``. The batched product
is computed where autograd would compute its sum, so it costs what a plain step costs, and the
summed gradient is never formed: ``weight.grad`` stays None until the private step writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.errors import PrivacyError


class GradientSink:
    """Collects per-example gradients, one float32 tensor (B, *shape) a parameter name."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """Add a module call's gradient; a module called twice contributes both."""
        held = self.gradients.get(name)
        self.gradients[name] = gradient if held is None else held + gradient

    def take(self) -> dict[str, Tensor]:
        """Return what was collected and start anew."""
        taken, self.gradients = self.gradients, {}
        return taken


class _RecordingLinear(torch.autograd.Function):
    """``F.linear`` whose backward hands per-example weight gradients to a sink."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sink: GradientSink, name: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sink, ctx.name = sink, name
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        rows = x.shape[0]
        ctx.sink.add(
            ctx.name,
            torch.bmm(
                grad.reshape(rows, -1, grad.shape[-1]).transpose(1, 2).float(),
                x.reshape(rows, -1, x.shape[-1]).float(),
            ),
        )
        # the weight is an input of the graph, so that the first layer gets a backward too
        return grad @ weight.to(grad.dtype), None, None, None


class PerExampleLinear(nn.Module):
    """Stands in for a bias-free ``nn.Linear`` and shares its weight."""

    def __init__(self, weight: nn.Parameter, sink: GradientSink, name: str) -> None:
        super().__init__()
        self.weight = weight
        self.sink = sink
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T``; x has shape (B, ..., in) with the example first."""
        if not torch.is_grad_enabled():
            return nn.functional.linear(x, self.weight)
        result: Tensor = _RecordingLinear.apply(x, self.weight, self.sink, self.name)  # type: ignore[no-untyped-call]
        return result


def record_gradients(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> GradientSink:
    """Replace the linear maps that own the given weights, and return their sink.

    Parameters
    ----------
    model : torch.nn.Module
        Model whose trained weights all belong to bias-free linear maps.
    parameters : Mapping[str, Parameter]
        Name -> trained weight; names key the sink's gradients.

    Raises
    ------
    PrivacyError
        If a trained weight is not the weight of a bias-free linear map: it would train without
        being clipped.
    """
    sink = GradientSink()
    names = {id(parameter): name for name, parameter in parameters.items()}
    replaced: set[str] = set()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and id(module.weight) in names:
            if module.bias is not None:
                raise PrivacyError(f"{path}: a trained linear map with a bias has no private path.")
            name = names[id(module.weight)]
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, PerExampleLinear(module.weight, sink, name))
            replaced.add(name)
    missing = sorted(set(parameters) - replaced)
    if missing:
        raise PrivacyError(f"no per-example gradient for {missing[0]} ({len(missing)} in all).")
    return sink
