"""Fed-SB: ``W0 + s B R A`` with frozen B and A, only R (rank, rank) trains (arXiv 2502.15436)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from typing_extensions import override

from fedllm.adapters.basis import Basis, seeded_basis
from fedllm.adapters.method import ADAPTER, AdapterMethod, install, submodule, weight_of
from fedllm.adapters.state import AdapterSpec, AdapterState, Matrix
from fedllm.errors import MismatchError


class FactoredUp(nn.Module):
    """The linear map ``x -> B R x`` in the place of LoRA's up projection.

    PEFT's own layers call it after A, whatever the base layer is (float, 8-bit or 4-bit), and
    read :attr:`weight` when they merge, so neither needs a class of its own here.
    """

    def __init__(self, up: Tensor) -> None:
        super().__init__()
        # R stays float32 whatever the base's format
        self.inner = nn.Linear(up.shape[1], up.shape[1], bias=False, device=up.device)
        nn.init.zeros_(self.inner.weight)
        self.register_buffer("up", up, persistent=False)
        self.up: Tensor

    @property
    def weight(self) -> Tensor:
        """Return B R, shape (out, rank), float32."""
        return self.up.float() @ self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return ``B R x`` for x of shape (..., rank)."""
        inner = self.inner(x.to(self.inner.weight.dtype))
        return nn.functional.linear(inner.to(self.up.dtype), self.up)


class FedSB(AdapterMethod):
    """Train and send R; the mean of R is exact in the product B R A."""

    name = "fed-sb"
    trained = ("R",)
    has_basis = True

    @override
    def trained_shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        return {f"{module}.R": (spec.rank, spec.rank) for module in spec.shapes}

    @override
    def seeded(self, spec: AdapterSpec, seed: str) -> Basis:
        return seeded_basis(spec.shapes, rank=spec.rank, seed=seed)

    @override
    def initial_state(self, spec: AdapterSpec, *, seed: str) -> AdapterState:
        shapes = self.trained_shapes(spec)
        return AdapterState(spec, {key: np.zeros(shape, np.float32) for key, shape in shapes.items()})

    @override
    def prepare(
        self, layer: LoraLayer, up: Matrix | None, down: Matrix | None, *, dtype: torch.dtype
    ) -> None:
        if up is None or down is None:
            raise MismatchError("Fed-SB's frozen B or A is missing.")
        install(submodule(layer, "lora_A"), down, dtype)
        device = weight_of(submodule(layer, "lora_A")).device
        layer.lora_B[ADAPTER] = FactoredUp(torch.tensor(up).to(device=device, dtype=dtype))

    @override
    def parameters(self, layer: LoraLayer) -> dict[str, nn.Parameter]:
        return {"R": weight_of(submodule(layer, "lora_B").get_submodule("inner"))}

    @override
    def lora_factors(self, state: AdapterState, basis: Basis) -> Mapping[str, tuple[Matrix, Matrix]]:
        return {m: (basis.up[m] @ state.tensors[f"{m}.R"], basis.down[m]) for m in state.spec.shapes}
