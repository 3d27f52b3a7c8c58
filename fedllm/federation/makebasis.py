"""How a site makes Fed-SB's frozen matrices for all, where they are not drawn from a seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from fedllm.adapters.basis import Basis, gradient_basis, svd_basis
from fedllm.adapters.layers import frozen_weight
from fedllm.adapters.state import AdapterSpec, require_same_layout
from fedllm.config import Config
from fedllm.data.encode import Encoded
from fedllm.data.sites import site_from_file
from fedllm.errors import BudgetError, WireError
from fedllm.federation.booking import book
from fedllm.federation.records import Notes
from fedllm.federation.site import Site
from fedllm.models.load import load_base
from fedllm.privacy.entropy import SecureGenerator
from fedllm.privacy.plan import PrivacyPlan, basis_plan, whole_run
from fedllm.training.basis import weight_gradients
from fedllm.training.session import tokenise
from fedllm.training.steps import learning_rate

#: Bases that bring a first R with them.
WITH_CORE = ("gradient", "public-gradient")


def make_basis(site: Site, spec: AdapterSpec, notes: Notes) -> tuple[Basis, Notes]:
    """Return the basis a recipe asks for, and what the reply says of its cost.

    ``public-svd`` reads the base weights alone, ``public-gradient`` public records, ``gradient`` the
    site's private ones in the clear, and ``dp-gradient`` private ones through one more Gaussian
    mechanism, booked in the site's ledger as round 0.

    Raises
    ------
    BudgetError
        If the site's policy does not allow it or the rounds after it, or names no public records.
    PrivacyError
        If the ledger lacks a row that the server has seen.
    """
    config, kind = site.config, site.config.adapter.basis
    if kind == "public-svd":
        base = load_base(config.model)
        weights = {module: frozen_weight(base.get_submodule(module)) for module in spec.shapes}
        return svd_basis(weights, rank=spec.rank), {}
    units, plan, booked = _units(site, config, notes)
    gradients = weight_gradients(config, spec, units, plan=plan)
    total = config.train.local_steps * config.federation.rounds
    step = learning_rate(config.train, step=0, total=total) if kind in WITH_CORE else None
    return gradient_basis(gradients, rank=spec.rank, step=step, scale=spec.scale), booked


def _units(site: Site, config: Config, notes: Notes) -> tuple[list[list[Encoded]], PrivacyPlan | None, Notes]:
    count = config.adapter.basis_records
    if config.adapter.basis == "public-gradient":
        path = site.public_path
        if not path:
            raise BudgetError(
                f"site {site.name}: adapter.basis=public-gradient needs public records: adapter.basis_path "
                "in a simulation, public_path in a real site's policy."
            )
        settings = replace(config.data, heldout=0.0, unit="")
        public = site_from_file(settings, path=path, name=site.name, seed=config.run.seed)
        return [[record] for record in tokenise(public, config).train[:count]], None, {}
    tokens = tokenise(site.data(), config)
    if config.adapter.basis == "gradient":
        site.policy.require(config.privacy)
        return [[record] for record in tokens.train[:count]], None, {}
    number, stated = len(tokens.units), site.policy.public_units
    plan = basis_plan(config, units=number, site=site.name, public_units=stated)
    _, (_, rounds) = whole_run(config, units=number, site=site.name, public_units=stated, makes_basis=True)
    booked = book(site, notes, plan, round=0, ahead=(rounds,))
    units = tokens.units_of_records
    return [units[unit] for unit in plan.draw(SecureGenerator()) if units[unit]], plan, booked


def read_basis(payload: bytes, spec: AdapterSpec, *, with_core: bool) -> Basis:
    """Read a shipped basis and check shapes, numbers and, where the spec names it, its hash.

    Raises
    ------
    WireError
        If the payload is oversized, damaged, not finite, or not the basis the spec names.
    MismatchError
        If a matrix is missing or has another shape.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for module, (out, into) in spec.shapes.items():
        expected |= {f"{module}.B": (out, spec.rank), f"{module}.A": (spec.rank, into)}
        if with_core:
            expected[f"{module}.R"] = (spec.rank, spec.rank)
    limit = 4 * sum(int(np.prod(shape)) for shape in expected.values()) + 256 * len(expected) + 4096
    if len(payload) > limit:
        raise WireError(f"oversized basis: {len(payload)} bytes, at most {limit} are possible.")
    try:
        tensors = load(payload)
    except (SafetensorError, ValueError, KeyError):
        raise WireError("the basis is damaged or truncated.") from None
    require_same_layout(
        dict(sorted(expected.items())),
        {key: tensors[key].shape for key in sorted(tensors)},
        site="that made the basis",
    )
    if not all(value.dtype == np.float32 and np.isfinite(value).all() for value in tensors.values()):
        raise WireError("the basis holds numbers that are not finite float32.")
    basis = Basis.from_tensors(tensors)
    named = spec.basis.removeprefix("shipped:")
    if named and basis.digest != named:
        raise WireError("the basis is not the one its hash names.")
    return basis
