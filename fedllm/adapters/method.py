"""What an adapter method has to provide, and the registry of methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from fedllm.adapters.basis import Basis
from fedllm.adapters.state import AdapterSpec, AdapterState, Matrix, require_same_layout

ADAPTER = "default"


class AdapterMethod(ABC):
    """One way to parametrise the weight change of a linear map.

    A method is stateless: it injects its layers into a model through PEFT, names the matrices
    that train and travel, and writes them as ordinary LoRA factors.
    """

    name: ClassVar[str]
    #: names of the trained matrices of one module
    trained: ClassVar[tuple[str, ...]]
    #: whether the method has frozen matrices besides the base weights
    has_basis: ClassVar[bool]

    @abstractmethod
    def trained_shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        """Return key -> shape of every trained matrix, in order."""

    @abstractmethod
    def seeded(self, spec: AdapterSpec, seed: str) -> Basis:
        """Return the frozen matrices drawn from a seed."""

    @abstractmethod
    def initial_state(self, spec: AdapterSpec, *, seed: str) -> AdapterState:
        """Return the state whose weight change is zero, from shapes alone."""

    @abstractmethod
    def parameters(self, layer: LoraLayer) -> dict[str, nn.Parameter]:
        """Return the trained parameters of one injected layer by matrix name."""

    @abstractmethod
    def prepare(
        self, layer: LoraLayer, up: Matrix | None, down: Matrix | None, *, dtype: torch.dtype
    ) -> None:
        """Install the frozen matrices into one PEFT layer and freeze what does not train.

        Parameters
        ----------
        dtype : torch.dtype
            The base's number format, which the frozen matrices take too: casting every
            activation to float32 for them would cost a fifth of a step.
        """

    @abstractmethod
    def lora_factors(self, state: AdapterState, basis: Basis) -> Mapping[str, tuple[Matrix, Matrix]]:
        """Return module path -> (B, A) of the ordinary LoRA adapter with the same update."""


def inject(
    method: AdapterMethod, model: PreTrainedModel, spec: AdapterSpec, basis: Basis, *, dropout: float = 0.0
) -> PeftModel:
    """Wrap a base model with PEFT and turn its LoRA layers into the method's layers.

    Raises
    ------
    MismatchError
        If the model's adapted linear maps are not those of the spec.
    """
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.scale * spec.rank,  # type: ignore[arg-type]  # PEFT takes floats too
        lora_dropout=dropout,
        target_modules=list(spec.shapes),
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)
    layers = adapted_layers(wrapped)
    dtype = model.dtype
    found = {path: (int(layer.out_features), int(layer.in_features)) for path, layer in layers.items()}  # type: ignore[arg-type]
    require_same_layout(spec.shapes, found, site="of this process")
    for path, layer in layers.items():
        method.prepare(layer, basis.up.get(path), basis.down.get(path), dtype=dtype)
    return wrapped


def submodule(layer: LoraLayer, name: str) -> nn.Module:
    """Return the adapter's part of a PEFT layer, such as ``lora_A``."""
    found: nn.ModuleDict = {"lora_A": layer.lora_A, "lora_B": layer.lora_B}[name]
    return found[ADAPTER]


def weight_of(module: nn.Module) -> nn.Parameter:
    """Return a linear map's weight."""
    return module.get_parameter("weight")


def install(module: nn.Module, matrix: Matrix, dtype: torch.dtype) -> None:
    """Put a frozen matrix into a linear map, in the base's number format."""
    weight = weight_of(module)
    weight.requires_grad_(False)
    weight.data = torch.tensor(matrix).to(device=weight.device, dtype=dtype)


def adapted_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return module path (as in the base model) -> PEFT layer, in model order."""
    prefix = "base_model.model."
    return {
        path.removeprefix(prefix): module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def trained_parameters(method: AdapterMethod, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return key (as in :class:`AdapterState`) -> trained parameter, in order."""
    return {
        f"{path}.{name}": parameter
        for path, layer in adapted_layers(model).items()
        for name, parameter in method.parameters(layer).items()
    }


def read_state(method: AdapterMethod, model: nn.Module, spec: AdapterSpec) -> AdapterState:
    """Copy the trained matrices out of a model."""
    return AdapterState(
        spec,
        {
            key: parameter.detach().float().cpu().numpy()
            for key, parameter in trained_parameters(method, model).items()
        },
    )


def write_state(method: AdapterMethod, model: nn.Module, state: AdapterState) -> None:
    """Copy a state's matrices into a model.

    Raises
    ------
    MismatchError
        Naming the first matrix that the model lacks, has besides, or has in another shape.
    """
    parameters = trained_parameters(method, model)
    require_same_layout(
        {key: tuple(parameter.shape) for key, parameter in parameters.items()},
        state.layout,
        site="of this process",
    )
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(torch.tensor(state.tensors[key]))
