"""FFA-LoRA: A is drawn from a seed and frozen, only B trains (arXiv 2403.12313)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from typing_extensions import override

from fedllm.adapters.basis import Basis, kaiming_basis
from fedllm.adapters.layers import LoraFamily, install, submodule, weight_of
from fedllm.adapters.state import AdapterSpec, AdapterState, Matrix
from fedllm.errors import MismatchError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


class FfaLora(LoraFamily):
    """Train and send B (out, rank); the mean of B is exact in the product B A."""

    name = "ffa"
    title = "FFA-LoRA"
    paper = "arXiv 2403.12313"
    trains = "B"
    has_basis = True

    @override
    def matrices(self, spec: AdapterSpec) -> tuple[str, ...]:
        return ("B",)

    @override
    def shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        return {f"{module}.B": (out, spec.rank) for module, (out, _) in spec.shapes.items()}

    @override
    def seeded(self, spec: AdapterSpec, seed: str) -> Basis:
        return kaiming_basis(spec.shapes, rank=spec.rank, seed=seed)

    @override
    def frozen_size(self, spec: AdapterSpec) -> int:
        return spec.rank * sum(into for _, into in spec.shapes.values())

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
        if down is None:
            raise MismatchError("FFA-LoRA's frozen A is missing.")
        install(submodule(layer, "lora_A"), down, torch.float32)

    @override
    def layer_parameters(self, layer: LoraLayer) -> dict[str, nn.Parameter]:
        return {"B": weight_of(submodule(layer, "lora_B"))}

    @override
    def lora_factors(self, state: AdapterState, basis: Basis) -> Mapping[str, tuple[Matrix, Matrix]]:
        return {m: (state.tensors[f"{m}.B"], basis.down[m]) for m in state.spec.shapes}
