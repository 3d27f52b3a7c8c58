"""LoRA: ``W0 + s B A`` with both factors trained (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from fedllm.adapters.basis import Basis, kaiming_basis
from fedllm.adapters.layers import ADAPTER, LoraFamily, adapted_layers, frozen_weight, submodule, weight_of
from fedllm.adapters.state import AdapterSpec, AdapterState, Matrix

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


class Lora(LoraFamily):
    """Train A (rank, in) and B (out, rank)."""

    name = "lora"
    title = "LoRA"
    paper = "arXiv 2106.09685"
    trains = "A, B"
    factored = True
    branches: ClassVar[tuple[tuple[str, str], ...]] = (("B", "A"),)

    @override
    def matrices(self, spec: AdapterSpec) -> tuple[str, ...]:
        return ("A", "B")

    @override
    def shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for module, (out, into) in spec.shapes.items():
            shapes |= {f"{module}.A": (spec.rank, into), f"{module}.B": (out, spec.rank)}
        return shapes

    @override
    def start(self, spec: AdapterSpec, seed: str) -> dict[str, Matrix]:
        drawn = kaiming_basis(spec.shapes, rank=spec.rank, seed=seed).tensors
        return super().start(spec, seed) | drawn

    @override
    def prepare(
        self,
        layer: LoraLayer,
        up: Matrix | None,
        down: Matrix | None,
        *,
        spec: AdapterSpec,
        dtype: torch.dtype,
    ) -> None:
        pass

    @override
    def layer_parameters(self, layer: LoraLayer) -> dict[str, nn.Parameter]:
        return {"A": weight_of(submodule(layer, "lora_A")), "B": weight_of(submodule(layer, "lora_B"))}

    @override
    def lora_factors(self, state: AdapterState, basis: Basis) -> Mapping[str, tuple[Matrix, Matrix]]:
        return {m: (state.tensors[f"{m}.B"], state.tensors[f"{m}.A"]) for m in state.spec.shapes}


class Dora(Lora):
    """DoRA (arXiv 2402.09353): LoRA's A and B, and each row's magnitude, all averaged plainly.

    ``W = (m0 + M) (W0 + s B A) / ||W0 + s B A||`` with the norm of each row and ``m0 = ||W0||``. A
    state holds M, the change of the magnitudes, so that a server can start it without the base.
    """

    name = "dora"
    title = "DoRA"
    paper = "arXiv 2402.09353"
    trains = "A, B, M"
    branches = ()
    export = "base"
    private = False
    dora = True
    folds = False

    @override
    def matrices(self, spec: AdapterSpec) -> tuple[str, ...]:
        return ("A", "B", "M")

    @override
    def shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for module, (out, into) in spec.shapes.items():
            shapes |= {
                f"{module}.A": (spec.rank, into),
                f"{module}.B": (out, spec.rank),
                f"{module}.M": (out,),
            }
        return shapes

    @override
    def prepare(
        self,
        layer: LoraLayer,
        up: Matrix | None,
        down: Matrix | None,
        *,
        spec: AdapterSpec,
        dtype: torch.dtype,
    ) -> None:
        magnitude = layer.lora_magnitude_vector[ADAPTER]
        # PEFT takes the norm in the base's number format, and an export needs the very same numbers
        start = torch.tensor(magnitudes(frozen_weight(layer.get_base_layer())))
        weight_of(magnitude).data = start.to(weight_of(magnitude).device)
        magnitude.register_buffer("start", weight_of(magnitude).detach().clone(), persistent=False)

    @override
    def layer_parameters(self, layer: LoraLayer) -> dict[str, nn.Parameter]:
        magnitude = weight_of(layer.lora_magnitude_vector[ADAPTER])
        return super().layer_parameters(layer) | {"M": magnitude}

    @override
    def offsets(self, model: nn.Module) -> Mapping[str, Tensor]:
        return {
            f"{path}.M": layer.lora_magnitude_vector[ADAPTER].get_buffer("start")
            for path, layer in adapted_layers(model).items()
        }

    @override
    def lora_factors(self, state: AdapterState, basis: Basis) -> Mapping[str, tuple[Matrix, Matrix]]:
        return super(Lora, self).lora_factors(state, basis)


def magnitudes(weight: Matrix) -> Matrix:
    """Return the norm of each row of a weight (out, in), which DoRA starts from."""
    norms: Matrix = np.linalg.norm(weight, axis=1)
    return norms
