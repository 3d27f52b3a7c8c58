"""Per-example gradients of the adapters' linear maps in one ordinary backward pass.

For ``y = x W^T`` the gradient of example b's loss is ``sum_t g_bt x_bt^T``. The batched product
is computed where autograd would compute its sum, so it costs what a plain step costs, and the
summed gradient is never formed: ``weight.grad`` stays None until the private step writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedllm.errors import PrivacyError


class Recorder(Protocol):
    """Hands out the per-example gradients of the backward passes since it was last asked."""

    def take(self) -> dict[str, Tensor]:
        """Return parameter name -> gradients, shape (B, *shape), float32, and start anew."""


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
    """``F.linear`` whose backward hands per-example gradients of weight and bias to a sink."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sink: GradientSink, names: tuple[str, str]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sink, ctx.names, ctx.has_bias = sink, names, bias is not None
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        rows = x.shape[0]
        upstream = grad.reshape(rows, -1, grad.shape[-1]).float()
        inputs = x.reshape(rows, -1, x.shape[-1]).float()
        # a backward pass inside an autocast region would round the gradients
        with torch.autocast(x.device.type, enabled=False):
            ctx.sink.add(ctx.names[0], torch.bmm(upstream.transpose(1, 2), inputs))
        if ctx.has_bias:
            ctx.sink.add(ctx.names[1], upstream.sum(1))
        # the weight is an input of the graph, so that the first layer gets a backward too
        return grad @ weight.to(grad.dtype), None, None, None, None


class PerExampleLinear(nn.Module):
    """Stands in for an ``nn.Linear`` and shares its parameters.

    Parameters
    ----------
    names : tuple[str, str]
        Under which the gradients of weight and bias arrive.
    """

    def __init__(self, linear: nn.Linear, sink: GradientSink, names: tuple[str, str]) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias: nn.Parameter | None = linear.bias
        self.sink = sink
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b``; x has shape (B, ..., in) with the example first."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return nn.functional.linear(x, self.weight, self.bias)
        result: Tensor = _RecordingLinear.apply(x, self.weight, self.bias, self.sink, self.names)  # type: ignore[no-untyped-call]
        return result


def record_gradients(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> GradientSink:
    """Replace the linear maps that own the given weights, and return their sink.

    Parameters
    ----------
    model : torch.nn.Module
        Model whose trained parameters all belong to linear maps.
    parameters : Mapping[str, Parameter]
        Name -> trained weight or bias; names key the sink's gradients. Those that rest in a round
        (``requires_grad`` is off) get none.

    Raises
    ------
    PrivacyError
        If a trained parameter belongs to no linear map, or a map trains in part: it would train
        without being clipped.
    """
    sink = GradientSink()
    names = {id(parameter): name for name, parameter in parameters.items()}
    replaced: set[str] = set()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and id(module.weight) in names:
            weight, bias = names[id(module.weight)], ""
            if module.bias is not None:
                if id(module.bias) not in names:
                    raise PrivacyError(f"{path}: a map whose bias does not train has no private path.")
                bias = names[id(module.bias)]
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, PerExampleLinear(module, sink, (weight, bias)))
            replaced |= {weight, bias}
    missing = sorted(set(parameters) - replaced)
    if missing:
        raise PrivacyError(f"no per-example gradient for {missing[0]} ({len(missing)} in all).")
    return sink
