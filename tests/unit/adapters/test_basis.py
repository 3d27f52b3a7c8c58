"""Frozen matrices: orthonormal, reproducible, comparable within a tolerance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.adapters.basis import (
    Basis,
    gradient_basis,
    kaiming_basis,
    projections,
    require_same_basis,
    seeded_basis,
    svd_basis,
)
from fedllm.errors import MismatchError

SHAPES = {"a.q": (24, 16), "a.v": (8, 16), "b.q": (24, 16)}


def test_seeded_basis_is_orthonormal_and_reproducible() -> None:
    one, two = (seeded_basis(SHAPES, rank=5, seed="0123456789abcdef") for _ in range(2))
    assert one.digest == two.digest
    for module in SHAPES:
        assert np.allclose(one.up[module].T @ one.up[module], np.eye(5), atol=1e-6)
        assert np.allclose(one.down[module] @ one.down[module].T, np.eye(5), atol=1e-6)
    assert seeded_basis(SHAPES, rank=5, seed="1123456789abcdef").digest != one.digest


def test_layers_of_one_shape_get_different_matrices() -> None:
    # public FFA code resets its seed a layer, so that same-shaped layers share A
    for basis in (seeded_basis(SHAPES, rank=4, seed="00"), kaiming_basis(SHAPES, rank=4, seed="00")):
        assert not np.allclose(basis.down["a.q"], basis.down["b.q"])


def test_svd_basis_has_the_top_directions_with_fixed_signs() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((12, 9)).astype(np.float32)
    basis = svd_basis({"m": weight}, rank=3)
    flipped = svd_basis({"m": weight.copy()}, rank=3)
    assert basis.digest == flipped.digest
    kept = basis.up["m"].T @ weight @ basis.down["m"].T
    assert np.allclose(kept, np.diag(np.linalg.svd(weight, compute_uv=False)[:3]), atol=1e-4)
    columns = basis.up["m"]
    assert (columns[np.abs(columns).argmax(axis=0), np.arange(3)] > 0).all()


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_a_gradient_start_is_the_best_approximation_of_one_sign_step(scale: float) -> None:
    gradient = np.random.default_rng(0).standard_normal((12, 9)).astype(np.float32)
    basis = gradient_basis({"m": gradient}, rank=3, step=0.1, scale=scale)
    left, values, right = np.linalg.svd(-0.1 * np.sign(gradient))
    best = (left[:, :3] * values[:3]) @ right[:3]
    assert np.allclose(scale * basis.up["m"] @ basis.core["m"] @ basis.down["m"], best, atol=1e-6)
    assert not gradient_basis({"m": gradient}, rank=3, step=None, scale=scale).core


@settings(deadline=None, max_examples=20)
@given(st.floats(0, 2e-6), st.integers(0, 2**32))
def test_projections_forgive_last_bits_only(noise: float, seed: int) -> None:
    ours = seeded_basis(SHAPES, rank=4, seed="00")
    rng = np.random.default_rng(seed)
    near = Basis.from_tensors(
        {k: (v + noise * rng.uniform(-1, 1, v.shape)).astype(np.float32) for k, v in ours.tensors.items()}
    )
    require_same_basis(projections(ours, seed="00"), projections(near, seed="00"), site="x")
    other = seeded_basis(SHAPES, rank=4, seed="01")
    with pytest.raises(MismatchError, match="site x: its seeded basis differs"):
        require_same_basis(projections(ours, seed="00"), projections(other, seed="00"), site="x")


def test_projections_of_another_count_or_nan_are_refused() -> None:
    ours = projections(seeded_basis(SHAPES, rank=4, seed="00"), seed="00")
    with pytest.raises(MismatchError, match="sent 0 basis projections"):
        require_same_basis(ours, (), site="x")
    with pytest.raises(MismatchError, match="differs"):
        require_same_basis(ours, (float("nan"),) * 4, site="x")
