"""The mean: exact in the product where one factor is frozen, and well-behaved at its edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.adapters.basis import seeded_basis
from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.aggregation import weighted_mean
from fedllm.errors import MismatchError, RunError


def make_spec(rank: int, out: int, into: int) -> AdapterSpec:
    return AdapterSpec(
        method="fed-sb", rank=rank, scale=1.0, shapes={"m": (out, into)}, basis="seeded:00", base="b"
    )


@st.composite
def federations(draw: st.DrawFn) -> tuple[AdapterSpec, list[AdapterState], list[float]]:
    rank = draw(st.integers(1, 6))
    spec = make_spec(rank, draw(st.integers(rank, 12)), draw(st.integers(rank, 12)))
    sites = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    states = [
        AdapterState(spec, {"m.R": rng.standard_normal((rank, rank)).astype(np.float32)})
        for _ in range(sites)
    ]
    weights = draw(st.lists(st.floats(0.01, 100), min_size=sites, max_size=sites))
    return spec, states, weights


@settings(deadline=None)
@given(federations())
def test_mean_of_r_is_the_mean_of_b_r_a(case: tuple[AdapterSpec, list[AdapterState], list[float]]) -> None:
    spec, states, weights = case
    basis = seeded_basis(spec.shapes, rank=spec.rank, seed="00")
    up, down = basis.up["m"].astype(np.float64), basis.down["m"].astype(np.float64)
    shares = np.array(weights) / sum(weights)
    expected = sum(
        p * up @ s.tensors["m.R"].astype(np.float64) @ down for p, s in zip(shares, states, strict=True)
    )
    mean = weighted_mean(states, weights).tensors["m.R"].astype(np.float64)
    # the result is stored in float32; before that rounding the two are equal to 1e-12
    assert np.allclose(up @ mean @ down, expected, atol=1e-6)


@settings(deadline=None)
@given(federations(), st.randoms())
def test_scaling_weights_one_site_and_identical_sites(
    case: tuple[AdapterSpec, list[AdapterState], list[float]], random: object
) -> None:
    _, states, weights = case
    mean = weighted_mean(states, weights)
    scaled = weighted_mean(states, [3.0 * weight for weight in weights])
    assert np.allclose(mean.tensors["m.R"], scaled.tensors["m.R"], atol=1e-6)
    backwards = weighted_mean(states[::-1], weights[::-1])
    assert np.allclose(mean.tensors["m.R"], backwards.tensors["m.R"], atol=1e-6)
    alone = weighted_mean(states[:1], [7.0])
    assert np.array_equal(alone.tensors["m.R"], states[0].tensors["m.R"])
    same = weighted_mean([states[0]] * len(states), weights)
    assert np.allclose(same.tensors["m.R"], states[0].tensors["m.R"], atol=1e-6)


def test_states_that_do_not_match_never_meet() -> None:
    one = AdapterState(make_spec(2, 4, 4), {"m.R": np.eye(2, dtype=np.float32)})
    other = AdapterState(make_spec(3, 4, 4), {"m.R": np.eye(3, dtype=np.float32)})
    with pytest.raises(MismatchError, match="adapter rank is 3, expected 2"):
        weighted_mean([one, other], [1.0, 1.0])
    with pytest.raises(RunError, match="positive and finite"):
        weighted_mean([one, one], [1.0, float("nan")])
    with pytest.raises(RunError, match="cannot average 0 states"):
        weighted_mean([], [])
