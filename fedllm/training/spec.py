"""The adapter spec of a recipe, from shapes alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace

from fedllm.adapters import METHODS
from fedllm.adapters.basis import Basis
from fedllm.adapters.state import AdapterSpec
from fedllm.config import Config
from fedllm.data.sources import public_labels
from fedllm.errors import ConfigError, MismatchError
from fedllm.models.fingerprint import architecture_fingerprint
from fedllm.models.load import load_config
from fedllm.models.shapes import head_shapes, linear_shapes
from fedllm.settings import AdapterSettings


def basis_seed(config: Config) -> str:
    """Return the 8-byte seed of the frozen matrices as 16 hex digits."""
    return hashlib.sha256(f"fedllm adapter {config.run.seed}".encode()).hexdigest()[:16]


def adapter_spec(config: Config) -> AdapterSpec:
    """Return the spec a recipe asks for, at its largest rank; reads the model's config, no weights.

    Raises
    ------
    ConfigError
        If targets or layers do not exist in the model, or the rank does not fit a frozen basis.
    ModelError
        If the model's config cannot be found.
    """
    adapter, kind = config.adapter, config.model.kind
    labels = len(public_labels(config.data)) if kind == "encoder" else 0
    model = load_config(config.model, labels=labels)
    shapes = {}
    if adapter.method != "prompt":
        shapes = linear_shapes(
            model, targets=adapter.targets, layers=adapter.layers, kind=kind, pooling=config.model.pooling
        )
    basis = "none"
    if METHODS[adapter.method].has_basis:
        # the untuned base alone is no reason to make a basis of anybody's records
        seeded = adapter.basis == "seeded" or config.federation.mode == "base"
        basis = f"seeded:{basis_seed(config)}" if seeded else "shipped:"
    if adapter.method in ("fed-sb", "ravan"):
        _require_fitting(adapter.rank, shapes)
    return AdapterSpec(
        method=adapter.method,
        rank=adapter.rank,
        scale=scale_of(adapter.rank, adapter),
        shapes=shapes,
        basis=basis,
        base=architecture_fingerprint(model, shapes),
        heads=adapter.heads if adapter.method == "ravan" else 1,
        head=head_shapes(model) if kind == "encoder" else {},
        width=int(model.get_text_config().hidden_size) if adapter.method == "prompt" else 0,
    )


def site_spec(spec: AdapterSpec, rank: int, adapter: AdapterSettings) -> AdapterSpec:
    """Return a site's own spec: the run's at another rank, and the scale that goes with it."""
    return spec if rank == spec.rank else replace(spec, rank=rank, scale=scale_of(rank, adapter))


def scale_of(rank: int, adapter: AdapterSettings) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) (arXiv 2312.03732); alpha = 0 stands for a scale of 1."""
    if adapter.alpha == 0:
        return 1.0
    return adapter.alpha / (math.sqrt(rank) if adapter.rslora else rank)


def _require_fitting(rank: int, shapes: Mapping[str, tuple[int, int]]) -> None:
    for module, shape in shapes.items():
        if rank > min(shape):
            raise ConfigError(
                f"adapter.rank={rank}: {module} is {shape[0]} x {shape[1]}, and no more than {min(shape)} "
                "orthonormal columns fit; lower the rank or choose other adapter.targets."
            )


def basis_from_seed(spec: AdapterSpec) -> Basis | None:
    """Return the frozen matrices that the spec alone determines; None for shipped ones.

    Raises
    ------
    MismatchError
        If the spec's basis field is of no known form.
    """
    kind, _, seed = spec.basis.partition(":")
    if kind == "none":
        return Basis(up={}, down={})
    if kind == "seeded" and seed:
        return METHODS[spec.method].seeded(spec, seed)
    if kind == "shipped":
        return None
    raise MismatchError(f"the adapter's basis '{spec.basis}' is of no known form.")
