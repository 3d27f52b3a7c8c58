"""Hydra: a parallel and a sequential low-rank branch (arXiv 2309.06922)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from fedllm.adapters.basis import Basis, kaiming_basis
from fedllm.adapters.layers import submodule, weight_of
from fedllm.adapters.lora import Lora
from fedllm.adapters.state import AdapterSpec, AdapterState, Matrix
from fedllm.errors import MismatchError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


class Sequential(nn.Module):
    """A frozen map followed by its own low-rank branch: ``y + s Bs (As y)``, y = W0 x + b0."""

    def __init__(self, base_layer: nn.Module, *, out: int, rank: int, scale: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(out, rank, bias=False)
        self.up = nn.Linear(rank, out, bias=False)
        self.scale = scale
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, *args: object, **options: object) -> Tensor:
        """Return the map's value with the branch added."""
        y: Tensor = self.base_layer(x, *args, **options)
        branch: Tensor = self.up(self.down(y.float()))
        return y + (self.scale * branch).to(y.dtype)


class Hydra(Lora):
    """Train A, B beside the frozen map and As, Bs behind it; both branches are products.

    ``y = W0 x + b0 + s B (A x) + s Bs (As (W0 x + b0))``. Merging needs the base:
    ``W = W0 + s (B A + Bs As W0)``, ``b = b0 + s Bs As b0``.
    """

    name = "hydra"
    title = "Hydra"
    paper = "arXiv 2309.06922"
    trains = "A, B, As, Bs"
    branches = (("B", "A"), ("Bs", "As"))
    export = "base"
    folds = False

    @override
    def matrices(self, spec: AdapterSpec) -> tuple[str, ...]:
        return ("A", "B", "As", "Bs")

    @override
    def shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for module, (out, into) in spec.shapes.items():
            shapes |= {
                f"{module}.A": (spec.rank, into),
                f"{module}.B": (out, spec.rank),
                f"{module}.As": (spec.rank, out),
                f"{module}.Bs": (out, spec.rank),
            }
        return shapes

    @override
    def start(self, spec: AdapterSpec, seed: str) -> dict[str, Matrix]:
        square = {module: (out, out) for module, (out, _) in spec.shapes.items()}
        behind = kaiming_basis(square, rank=spec.rank, seed=f"{seed} sequential").down
        return super().start(spec, seed) | {f"{module}.As": matrix for module, matrix in behind.items()}

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
        branch = Sequential(layer.base_layer, out=int(layer.out_features), rank=spec.rank, scale=spec.scale)  # type: ignore[arg-type]
        layer.base_layer = branch.to(weight_of(submodule(layer, "lora_A")).device)

    @override
    def layer_parameters(self, layer: LoraLayer) -> dict[str, nn.Parameter]:
        branch: nn.Module = layer.base_layer
        behind, outer = branch.get_submodule("down"), branch.get_submodule("up")
        return super().layer_parameters(layer) | {"As": weight_of(behind), "Bs": weight_of(outer)}

    @override
    def lora_factors(self, state: AdapterState, basis: Basis) -> Mapping[str, tuple[Matrix, Matrix]]:
        raise MismatchError("Hydra's sequential branch needs the base's weights; use `fedllm export`.")


def merged_factors(
    state: AdapterState, weights: Mapping[str, Matrix], biases: Mapping[str, Matrix]
) -> tuple[dict[str, tuple[Matrix, Matrix]], dict[str, Matrix]]:
    """Return Hydra's ordinary LoRA factors [B, Bs], [A; As W0], and its change of each bias.

    Parameters
    ----------
    weights, biases : Mapping[str, Matrix]
        Module path -> W0 (out, in), b0 (out,); modules without a bias are left out.
    """
    factors, shifts = {}, {}
    for module in state.spec.shapes:
        down, up, behind, outer = (state.tensors[f"{module}.{name}"] for name in ("A", "B", "As", "Bs"))
        factors[module] = (np.hstack([up, outer]), np.vstack([down, behind @ weights[module]]))
        if module in biases:
            shifts[module] = state.spec.scale * outer @ (behind @ biases[module])
    return factors, shifts
