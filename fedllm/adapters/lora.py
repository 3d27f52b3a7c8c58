"""LoRA: ``W0 + s B A`` with both factors trained (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from typing_extensions import override

from fedllm.adapters.basis import Basis, kaiming_basis
from fedllm.adapters.method import AdapterMethod, submodule, weight_of
from fedllm.adapters.state import AdapterSpec, AdapterState, Matrix


class Lora(AdapterMethod):
    """Train and send A (rank, in) and B (out, rank)."""

    name = "lora"
    trained = ("A", "B")
    has_basis = False

    @override
    def trained_shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for module, (out, into) in spec.shapes.items():
            shapes |= {f"{module}.A": (spec.rank, into), f"{module}.B": (out, spec.rank)}
        return shapes

    @override
    def seeded(self, spec: AdapterSpec, seed: str) -> Basis:
        return Basis(up={}, down={})

    @override
    def initial_state(self, spec: AdapterSpec, *, seed: str) -> AdapterState:
        start = kaiming_basis(spec.shapes, rank=spec.rank, seed=seed).tensors
        return AdapterState(
            spec,
            {
                key: start[key] if key.endswith(".A") else np.zeros(shape, np.float32)
                for key, shape in self.trained_shapes(spec).items()
            },
        )

    @override
    def prepare(
        self, layer: LoraLayer, up: Matrix | None, down: Matrix | None, *, dtype: torch.dtype
    ) -> None:
        pass

    @override
    def parameters(self, layer: LoraLayer) -> dict[str, nn.Parameter]:
        return {"A": weight_of(submodule(layer, "lora_A")), "B": weight_of(submodule(layer, "lora_B"))}

    @override
    def lora_factors(self, state: AdapterState, basis: Basis) -> Mapping[str, tuple[Matrix, Matrix]]:
        return {m: (state.tensors[f"{m}.B"], state.tensors[f"{m}.A"]) for m in state.spec.shapes}
