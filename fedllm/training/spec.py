"""The adapter spec of a recipe, from shapes alone."""

from __future__ import annotations

import hashlib

from fedllm.adapters import METHODS
from fedllm.adapters.basis import Basis
from fedllm.adapters.state import AdapterSpec
from fedllm.config import Config
from fedllm.errors import MismatchError
from fedllm.models.fingerprint import architecture_fingerprint
from fedllm.models.load import load_config
from fedllm.models.shapes import linear_shapes


def basis_seed(config: Config) -> str:
    """Return the 8-byte seed of the frozen matrices as 16 hex digits."""
    return hashlib.sha256(f"fedllm adapter {config.run.seed}".encode()).hexdigest()[:16]


def adapter_spec(config: Config) -> AdapterSpec:
    """Return the spec a recipe asks for; reads the model's config, never its weights.

    Raises
    ------
    ConfigError
        If targets or layers do not exist in the model.
    ModelError
        If the model's config cannot be found.
    """
    adapter = config.adapter
    model = load_config(config.model)
    shapes = linear_shapes(model, targets=adapter.targets, layers=adapter.layers)
    basis = "none"
    if METHODS[adapter.method].has_basis:
        basis = f"seeded:{basis_seed(config)}" if adapter.basis == "seeded" else "shipped:"
    return AdapterSpec(
        method=adapter.method,
        rank=adapter.rank,
        scale=(adapter.alpha or adapter.rank) / adapter.rank,
        shapes=shapes,
        basis=basis,
        base=architecture_fingerprint(model, shapes),
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
