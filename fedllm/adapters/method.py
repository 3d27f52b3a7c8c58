"""What an adapter method has to provide, and how its matrices get into and out of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedllm.adapters.basis import Basis, generator
from fedllm.adapters.state import AdapterSpec, AdapterState, Matrix, require_same_layout
from fedllm.errors import MismatchError

HEAD = ("weight", "bias")
_HEAD_DEVIATION = 0.02


class AdapterMethod(ABC):
    """One way to parametrise the change of a model.

    A method is stateless: it injects its layers into a model through PEFT, names the matrices
    that train and travel, and says what it exports.

    Attributes
    ----------
    branches : tuple[tuple[str, str], ...]
        Pairs (up, down) of matrices whose product is a low-rank update, for the rules that work
        on products; empty where there are none.
    export : {"lora", "peft", "base"}
        ``lora``: exactly an ordinary LoRA; ``peft``: another kind of PEFT adapter; ``base``: a PEFT
        adapter that can only be written where the base weights are (``fedllm export``).
    private : bool
        Whether per-example gradients of its matrices are implemented.
    factored : bool
        Whether both factors of a product train at once, so that ``(B G, G^-1 A)`` is the same update and
        momentum on each of them is not well-defined.
    zero_is_base : bool
        Whether the model is the base where the matrices are zero, so that leaving entries out shrinks the
        change of the base and does no more.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    #: what trains and travels, in words, for tables
    trains: ClassVar[str]
    branches: ClassVar[tuple[tuple[str, str], ...]] = ()
    has_basis: ClassVar[bool] = False
    export: ClassVar[Literal["lora", "peft", "base"]] = "lora"
    private: ClassVar[bool] = True
    factored: ClassVar[bool] = False
    zero_is_base: ClassVar[bool] = True

    @abstractmethod
    def matrices(self, spec: AdapterSpec) -> tuple[str, ...]:
        """Return the names of the trained matrices of one module, the head's not among them."""

    @abstractmethod
    def shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        """Return key -> shape of every adapter matrix, in order."""

    @abstractmethod
    def inject(self, model: PreTrainedModel, spec: AdapterSpec, basis: Basis, *, dropout: float) -> nn.Module:
        """Put the method's layers into a base model and freeze everything else.

        Raises
        ------
        MismatchError
            If the model's adapted linear maps are not those of the spec.
        """

    @abstractmethod
    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return key -> trained adapter parameter of an injected model, in order."""

    def seeded(self, spec: AdapterSpec, seed: str) -> Basis:
        """Return the frozen matrices drawn from a seed."""
        return Basis(up={}, down={})

    def frozen_size(self, spec: AdapterSpec) -> int:
        """Return how many numbers the frozen matrices hold."""
        return 0

    def start(self, spec: AdapterSpec, seed: str) -> dict[str, Matrix]:
        """Return the adapter matrices at which the model is the base, from shapes alone."""
        return {key: np.zeros(shape, np.float32) for key, shape in self.shapes(spec).items()}

    def lora_factors(self, state: AdapterState, basis: Basis) -> Mapping[str, tuple[Matrix, Matrix]]:
        """Return module path -> (B, A) of the ordinary LoRA adapter with the same update.

        Raises
        ------
        MismatchError
            If the method's update is no product that the base's weights do not enter.
        """
        raise MismatchError(f"{self.title} is no ordinary LoRA adapter.")

    def offsets(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Return key -> what a parameter holds at the start and a state leaves out."""
        return {}

    def trained_shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        """Return key -> shape of everything that trains: adapter matrices, then the head."""
        shapes = self.shapes(spec)
        for module, (out, into) in spec.head.items():
            shapes |= {f"{module}.weight": (out, into), f"{module}.bias": (out,)}
        return shapes

    def initial_state(self, spec: AdapterSpec, *, seed: str) -> AdapterState:
        """Return the state a run starts from: no change of the base, a small seeded head."""
        tensors = self.start(spec, seed)
        for module, (out, into) in spec.head.items():
            draw = generator(seed, f"{module}.weight").standard_normal((out, into))
            tensors[f"{module}.weight"] = (_HEAD_DEVIATION * draw).astype(np.float32)
            tensors[f"{module}.bias"] = np.zeros(out, np.float32)
        return AdapterState(spec, tensors)


def trained_parameters(method: AdapterMethod, model: nn.Module, spec: AdapterSpec) -> dict[str, nn.Parameter]:
    """Return key (as in :class:`AdapterState`) -> trained parameter, in order; the head is unfrozen."""
    parameters = method.parameters(model)
    modules = dict(model.named_modules())
    for module in spec.head:
        (path,) = (path for path in modules if path == module or path.endswith(f"model.{module}"))
        for name in HEAD:
            parameter = modules[path].get_parameter(name)
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            parameters[f"{module}.{name}"] = parameter
    return parameters


def read_state(method: AdapterMethod, model: nn.Module, spec: AdapterSpec) -> AdapterState:
    """Copy the trained matrices out of a model."""
    offsets = method.offsets(model)
    return AdapterState(
        spec,
        {
            key: (parameter.detach() - offsets.get(key, 0.0)).float().cpu().numpy()
            for key, parameter in trained_parameters(method, model, spec).items()
        },
    )


def write_state(method: AdapterMethod, model: nn.Module, state: AdapterState) -> None:
    """Copy a state's matrices into a model.

    Raises
    ------
    MismatchError
        Naming the first matrix that the model lacks, has besides, or has in another shape.
    """
    parameters = trained_parameters(method, model, state.spec)
    offsets = method.offsets(model)
    require_same_layout(
        {key: tuple(parameter.shape) for key, parameter in parameters.items()},
        state.layout,
        site="of this process",
    )
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(torch.tensor(state.tensors[key]))
            if key in offsets:
                parameter.add_(offsets[key])
