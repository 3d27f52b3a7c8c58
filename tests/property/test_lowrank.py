"""The factor algebra agrees with dense matrices, at every shape and rank down to zero."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.aggregation.lowrank import (
    LowRank,
    Matrix64,
    inner,
    norm,
    normalised,
    singular_values,
    stack,
    svd,
    truncate,
)
from fedllm.errors import RunError

Case = tuple[list[LowRank], list[float]]


def dense(term: LowRank) -> Matrix64:
    return term.up @ term.down


def close(left: Matrix64, right: Matrix64, *, size: float = 0.0) -> bool:
    scale = max(size, float(np.linalg.norm(right)), 1e-300)
    return bool(np.linalg.norm(left - right) <= 1e-10 * scale)


def gaussian(rng: np.random.Generator, out: int, into: int, rank: int) -> LowRank:
    return LowRank(rng.standard_normal((out, rank)), rng.standard_normal((rank, into)))


@st.composite
def federations(draw: st.DrawFn) -> Case:
    """Sites of one shape with their own ranks (0 included), scales (0 included) and weights."""
    out, into, sites = draw(st.integers(1, 14)), draw(st.integers(1, 14)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ranks = draw(st.lists(st.integers(0, 6), min_size=sites, max_size=sites))
    scales = draw(st.lists(st.sampled_from([0.0, 0.1, 1.0, 8.0]), min_size=sites, max_size=sites))
    weights = draw(st.lists(st.floats(0.01, 100), min_size=sites, max_size=sites))
    return [gaussian(rng, out, into, r).scaled(s) for r, s in zip(ranks, scales, strict=True)], weights


@settings(deadline=None)
@given(federations())
def test_sums_inner_products_and_norms_are_exact(case: Case) -> None:
    terms, weights = case
    total = stack(terms, weights)
    expected = sum(w * dense(t) for w, t in zip(weights, terms, strict=True))
    size = float(sum(w * np.linalg.norm(dense(t)) for w, t in zip(weights, terms, strict=True)))
    assert total.rank == sum(t.rank for t in terms)
    assert close(dense(total), expected, size=size)
    assert norm(total) == pytest.approx(np.linalg.norm(expected), rel=1e-10, abs=1e-10 * size)
    a, b = terms[0], terms[-1]
    assert inner(a, b) == pytest.approx(
        np.sum(dense(a) * dense(b)), rel=1e-10, abs=1e-10 * norm(a) * norm(b) + 1e-300
    )
    assert close(dense(a.scaled(-3.0)), -3.0 * dense(a))
    assert close(dense(a.padded(9)), dense(a))
    assert a.padded(9).rank == 9


@settings(deadline=None)
@given(federations())
def test_the_small_core_gives_the_whole_decomposition(case: Case) -> None:
    total = stack(*case)
    left, values, right = svd(total)
    assert close(left * values @ right, dense(total))
    assert np.allclose(left.T @ left, np.eye(len(values)), atol=1e-12)
    assert np.allclose(right @ right.T, np.eye(len(values)), atol=1e-12)
    expected = np.linalg.svd(dense(total), compute_uv=False)[: len(values)]
    scale = expected.max(initial=0.0)
    assert np.allclose(values, expected, rtol=0, atol=1e-12 * scale)
    assert np.allclose(singular_values(total), expected, rtol=0, atol=1e-12 * scale)
    assert (np.take_along_axis(left, np.abs(left).argmax(axis=0)[None], axis=0) > 0).all()


@settings(deadline=None)
@given(federations(), st.integers(0, 8), st.booleans())
def test_truncation_is_the_best_one_and_nested(case: Case, rank: int, balanced: bool) -> None:
    total = stack(*case)
    left, values, right = np.linalg.svd(dense(total), full_matrices=False)
    cut = truncate(total, rank=rank, balanced=balanced)
    assert cut.rank == min(rank, total.rank, *total.shape)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    # two equal singular values may be exchanged: compare the error, then the matrix where it is unique
    error = np.linalg.norm(dense(total) - dense(cut))
    assert error == pytest.approx(np.linalg.norm(values[rank:]), abs=1e-10 * norm(total))
    if rank >= len(values) or values[rank - 1] - values[rank] > 1e-4 * values[0]:
        assert np.linalg.norm(dense(cut) - best) <= 1e-10 * norm(total)
    smaller = truncate(total, rank=rank // 2, balanced=balanced)
    first = LowRank(cut.up[:, : rank // 2], cut.down[: rank // 2])
    assert np.array_equal(first.up, smaller.up)
    assert np.array_equal(first.down, smaller.down)
    sizes = np.linalg.norm(cut.up, axis=0), np.linalg.norm(cut.down, axis=1)
    assert np.allclose(*sizes) if balanced else np.allclose(sizes[1], 1.0)


@settings(deadline=None)
@given(federations(), st.floats(0, 1))
def test_energy_keeps_the_fewest_components_that_hold_it(case: Case, energy: float) -> None:
    total = stack(*case)
    cut = truncate(total, energy=energy)
    squares = singular_values(total) ** 2
    slack = 1e-12 * squares.sum()
    assert squares[: cut.rank].sum() >= energy * squares.sum() - slack
    assert cut.rank == 0 or squares[: cut.rank - 1].sum() <= energy * squares.sum() + slack
    assert truncate(total, rank=1, energy=energy).rank == min(cut.rank, 1)


@settings(deadline=None)
@given(federations(), st.randoms(use_true_random=False), st.integers(0, 2**32))
def test_order_and_gauge_of_the_sites_change_nothing(case: Case, random: object, seed: int) -> None:
    terms, weights = case
    order = list(range(len(terms)))
    random.shuffle(order)  # type: ignore[attr-defined]
    rng = np.random.default_rng(seed)
    turned = []
    for index in order:
        gauge = np.linalg.qr(rng.standard_normal((terms[index].rank,) * 2))[0] * rng.uniform(0.2, 5)
        turned.append(LowRank(terms[index].up @ gauge, np.linalg.inv(gauge) @ terms[index].down))
    one, other = stack(terms, weights), stack(turned, [weights[index] for index in order])
    size = sum(weights) * max(norm(term) for term in terms)
    assert close(dense(other), dense(one), size=size)
    full = truncate(other, rank=one.rank)
    assert close(dense(full), dense(one), size=size)
    assert np.allclose(singular_values(one), singular_values(other), rtol=0, atol=1e-10 * size)


def test_a_difference_far_below_its_terms_is_still_measured() -> None:
    rng = np.random.default_rng(0)
    term = gaussian(rng, 30, 20, 4)
    nudge = LowRank(term.up[:, :1] * 1e-10, term.down[:1])
    assert norm(stack([term, nudge, term], [1.0, 1.0, -1.0])) == pytest.approx(norm(nudge), rel=1e-4)


def test_float32_comes_in_and_float64_goes_out() -> None:
    term = LowRank(np.ones((3, 1), np.float32), np.ones((1, 2), np.float32))  # type: ignore[arg-type]
    assert term.up.dtype == term.down.dtype == np.float64
    assert term.shape == (3, 2)


def test_bad_input_is_refused_with_what_is_wrong() -> None:
    term = LowRank(np.ones((3, 1)), np.ones((1, 2)))
    with pytest.raises(RunError, match="do not multiply"):
        LowRank(np.ones((3, 2)), np.ones((1, 2)))
    with pytest.raises(RunError, match="NaN or infinity"):
        LowRank(np.full((3, 1), np.nan), np.ones((1, 2)))
    with pytest.raises(RunError, match="cannot aggregate 0 terms"):
        stack([], [])
    with pytest.raises(RunError, match="cannot aggregate 1 terms with 2 weights"):
        stack([term], [1.0, 1.0])
    with pytest.raises(RunError, match=r"term #1 has shape \(2, 3\), expected \(3, 2\)"):
        inner(term, LowRank(term.down.T, term.up.T))
    with pytest.raises(RunError, match="truncate to rank -1"):
        truncate(term, rank=-1)
    with pytest.raises(RunError, match="share between 0 and 1"):
        truncate(term, energy=1.5)
    for weights in ([], [0.0], [-1.0, 2.0], [float("inf")], [float("nan")]):
        with pytest.raises(RunError, match="positive and finite"):
            normalised(weights)
    assert normalised([1, 3]) == [0.25, 0.75]
