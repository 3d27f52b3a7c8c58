"""Frozen bases and small trained cores: Fed-SB and RAVAN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from fedllm.adapters.basis import Basis, seeded_basis
from fedllm.adapters.layers import ADAPTER, LoraFamily, install, submodule, weight_of
from fedllm.adapters.state import AdapterSpec, AdapterState, Matrix
from fedllm.errors import MismatchError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


class FactoredUp(nn.Module):
    """The linear map ``x -> B diag(C_1, ..., C_h) x`` in the place of LoRA's up projection.

    PEFT's own layers call it after A, whatever the base layer is (float, 8-bit or 4-bit), and
    read :attr:`weight` when they merge, so neither needs a class of its own here.

    Parameters
    ----------
    up : Tensor
        Frozen B, shape (out, h r).
    heads : int
        Number h of trained cores C_i, shape (r, r) each.
    names : tuple[str, ...]
        What the cores are called, h of them.
    """

    def __init__(self, up: Tensor, *, heads: int, names: tuple[str, ...]) -> None:
        super().__init__()
        rank = up.shape[1] // heads
        # the cores stay float32 whatever the base's format
        self.cores = nn.ModuleDict(
            {name: nn.Linear(rank, rank, bias=False, device=up.device) for name in names}
        )
        for core in self.cores.values():
            nn.init.zeros_(weight_of(core))
        self.register_buffer("up", up, persistent=False)
        self.up: Tensor

    @property
    def weight(self) -> Tensor:
        """Return B diag(C), shape (out, h r), float32."""
        cores: Tensor = torch.block_diag(*map(weight_of, self.cores.values()))  # type: ignore[no-untyped-call]
        return self.up.float() @ cores

    def forward(self, x: Tensor) -> Tensor:
        """Return ``B diag(C) x`` for x of shape (..., h r)."""
        parts = x.float().chunk(len(self.cores), dim=-1)
        cores = self.cores.values()
        inner = torch.cat([core(part) for core, part in zip(cores, parts, strict=True)], dim=-1)
        return nn.functional.linear(inner.to(self.up.dtype), self.up)


class FedSB(LoraFamily):
    """Fed-SB (arXiv 2502.15436): ``W0 + s B R A`` with frozen B and A; the mean of R is exact."""

    name = "fed-sb"
    title = "Fed-SB"
    paper = "arXiv 2502.15436"
    trains = "R"
    has_basis = True

    @override
    def matrices(self, spec: AdapterSpec) -> tuple[str, ...]:
        return ("R",)

    @override
    def shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        square = (spec.rank, spec.rank)
        return {f"{module}.{name}": square for module in spec.shapes for name in self.matrices(spec)}

    @override
    def inner_rank(self, spec: AdapterSpec) -> int:
        return spec.heads * spec.rank

    @override
    def seeded(self, spec: AdapterSpec, seed: str) -> Basis:
        return seeded_basis(spec.shapes, rank=spec.rank, heads=spec.heads, seed=seed)

    @override
    def frozen_size(self, spec: AdapterSpec) -> int:
        return self.inner_rank(spec) * sum(out + into for out, into in spec.shapes.values())

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
        if up is None or down is None:
            raise MismatchError(f"{self.title}'s frozen B or A is missing.")
        install(submodule(layer, "lora_A"), down, dtype)
        device = weight_of(submodule(layer, "lora_A")).device
        frozen = torch.tensor(up).to(device=device, dtype=dtype)
        layer.lora_B[ADAPTER] = FactoredUp(frozen, heads=spec.heads, names=self.matrices(spec))

    @override
    def layer_parameters(self, layer: LoraLayer) -> dict[str, nn.Parameter]:
        cores: nn.ModuleDict = submodule(layer, "lora_B").get_submodule("cores")  # type: ignore[assignment]
        return {name: weight_of(core) for name, core in cores.items()}

    @override
    def lora_factors(self, state: AdapterState, basis: Basis) -> Mapping[str, tuple[Matrix, Matrix]]:
        names, rank = self.matrices(state.spec), state.spec.rank
        return {
            module: (
                np.hstack(
                    [
                        basis.up[module][:, index * rank : (index + 1) * rank]
                        @ state.tensors[f"{module}.{name}"]
                        for index, name in enumerate(names)
                    ]
                ),
                basis.down[module],
            )
            for module in state.spec.shapes
        }


class Ravan(FedSB):
    """RAVAN (arXiv 2506.05568): ``sum_i B_i H_i A_i`` over heads with frozen B_i, A_i.

    The heads' bases together are orthonormal where h r fits the matrix, else each head's own is.
    The paper's scalars s_i, which its server folds into H_i and sets back to 1 every round, stay 1.
    """

    name = "ravan"
    title = "RAVAN"
    paper = "arXiv 2506.05568"
    trains = "H_1, ..., H_h"

    @override
    def matrices(self, spec: AdapterSpec) -> tuple[str, ...]:
        return tuple(f"H{index}" for index in range(spec.heads))
