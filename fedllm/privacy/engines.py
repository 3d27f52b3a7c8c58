"""What computes per-example gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fedllm.privacy.per_example import Recorder, record_gradients


class OpacusRecorder:
    """Opacus' hooks (``GradSampleHooks``), for comparison.

    Slower and larger than our own path, and wrong under non-reentrant gradient checkpointing.

    Parameters
    ----------
    model : torch.nn.Module
        Model whose trained parameters are those given.
    parameters : Mapping[str, Parameter]
        Name -> trained weight or bias.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        # Opacus takes seconds to import, and the default engine does not need it
        from opacus.grad_sample import GradSampleHooks

        self._parameters = parameters
        owned = {id(parameter) for parameter in parameters.values()}
        self._maps = [
            module
            for module in model.modules()
            if any(id(parameter) in owned for parameter in module.parameters(recurse=False))
        ]
        for module in self._maps:
            module.register_forward_pre_hook(_awake)
        self._hooks = GradSampleHooks(model, loss_reduction="sum", strict=False)

    def take(self) -> dict[str, Tensor]:
        """Return what Opacus left on the parameters, and clear it with the summed gradient."""
        taken: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            # Opacus sets the attribute on every parameter, and a list where a map is called twice
            samples: Tensor | list[Tensor] | None = vars(parameter)["grad_sample"]
            if samples is not None:
                calls = samples if isinstance(samples, list) else [samples]
                taken[name] = torch.stack(calls).sum(dim=0).float()
            vars(parameter)["grad_sample"] = None
            parameter.grad = None
            # what a pass that failed on its way has left behind
            vars(parameter).pop("_current_grad_sample", None)
            vars(parameter)["_forward_counter"] = 0
        for module in self._maps:
            vars(module).pop("activations", None)
        return taken


def _awake(module: nn.Module, _: tuple[Tensor, ...]) -> None:
    """Put a map in training mode while gradients are wanted: Opacus passes over maps that are not.

    The model as a whole may be in evaluation mode, which is what keeps its dropout off.
    """
    module.train(torch.is_grad_enabled())


ENGINES: dict[str, Callable[[nn.Module, Mapping[str, nn.Parameter]], Recorder]] = {
    "own": record_gradients,
    "opacus": OpacusRecorder,
}
