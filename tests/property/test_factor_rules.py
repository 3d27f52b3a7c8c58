"""Each paper's rule: exact where it claims to be, and indifferent to what must not matter."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.aggregation import spectral
from fedllm.aggregation.alignment import align, nearest_rotation
from fedllm.aggregation.factors import (
    centred_residual,
    factor_mean,
    fair,
    hetlora,
    rank_partitioned,
    sparsity_weights,
)
from fedllm.aggregation.lowrank import LowRank, Matrix64, norm, normalised, stack, truncate
from fedllm.errors import RunError

Case = tuple[list[LowRank], list[float]]
Rule = Callable[[Sequence[LowRank], Sequence[float]], LowRank]


def exact_mean(terms: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    return stack(terms, normalised(weights))


def exact_truncated(terms: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    return truncate(exact_mean(terms, weights), rank=max(term.rank for term in terms))


def weightless_hetlora(terms: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    return hetlora(terms)


def two_stage_sketch(terms: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """FedASK with a sketch as wide as all ranks together."""
    shares = normalised(weights)
    total = sum(term.rank for term in terms)
    test = spectral.omega("round-1/q_proj", terms[0].shape[1], total)
    basis = spectral.range_of(
        np.sum([p * spectral.sketch(t, test) for p, t in zip(shares, terms, strict=True)], axis=0)
    )
    back = np.sum([p * spectral.back_project(t, basis) for p, t in zip(shares, terms, strict=True)], axis=0)
    return spectral.rebuild(basis, back, rank=total)


RULES: list[Rule] = [
    factor_mean,
    rank_partitioned,
    weightless_hetlora,
    fair,
    exact_mean,
    exact_truncated,
    two_stage_sketch,
]


def dense(term: LowRank) -> Matrix64:
    return term.up @ term.down


def size(terms: Sequence[LowRank]) -> float:
    """Return a bound on every factor mean's norm, the yardstick of relative errors."""
    ups = max(float(np.linalg.norm(term.up)) for term in terms)
    return ups * max(float(np.linalg.norm(term.down)) for term in terms) + 1e-300


def distance(left: LowRank, right: LowRank) -> float:
    return float(np.linalg.norm(dense(left) - dense(right)))


def gaussian(rng: np.random.Generator, out: int, into: int, rank: int) -> LowRank:
    return LowRank(rng.standard_normal((out, rank)), rng.standard_normal((rank, into)))


@st.composite
def federations(draw: st.DrawFn, same_rank: bool = False, alive: bool = False) -> Case:
    """Sites of one shape with their own ranks, scales (0 included) and weights."""
    out, into, sites = draw(st.integers(8, 16)), draw(st.integers(12, 20)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ranks = draw(st.lists(st.integers(0, 5), min_size=sites, max_size=sites))
    ranks = [ranks[0]] * sites if same_rank else ranks
    sizes = st.sampled_from([0.1, 1.0, 8.0] if alive else [0.0, 0.1, 1.0, 8.0])
    scales = draw(st.lists(sizes, min_size=sites, max_size=sites))
    weights = draw(st.lists(st.floats(0.01, 100), min_size=sites, max_size=sites))
    return [gaussian(rng, out, into, r).scaled(s) for r, s in zip(ranks, scales, strict=True)], weights


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=40)
@given(federations(), st.randoms(use_true_random=False))
def test_the_order_of_sites_changes_nothing(rule: Rule, case: Case, random: object) -> None:
    terms, weights = case
    order = list(range(len(terms)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = rule([terms[i] for i in order], [weights[i] for i in order])
    assert distance(rule(terms, weights), shuffled) <= 1e-10 * size(terms)


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=40)
@given(federations())
def test_one_site_and_equal_sites_are_the_identity(rule: Rule, case: Case) -> None:
    terms, weights = case
    assert distance(rule(terms[:1], weights[:1]), terms[0]) <= 1e-10 * size(terms[:1])
    assert distance(rule([terms[0]] * len(terms), weights), terms[0]) <= 1e-10 * size(terms[:1])


@pytest.mark.parametrize("rule", [*RULES, centred_residual])
def test_sites_without_rank_or_without_a_change_are_harmless(rule: Rule) -> None:
    rng = np.random.default_rng(3)
    empty, still, live = gaussian(rng, 6, 5, 0), gaussian(rng, 6, 5, 2).scaled(0), gaussian(rng, 6, 5, 3)
    for terms in ([empty], [empty, empty], [empty, still], [still, live, empty]):
        result = rule(terms, [1.0] * len(terms))
        assert result.shape == (6, 5)
        assert np.isfinite(dense(result)).all()
        if live not in terms:
            assert norm(result) == 0


@settings(deadline=None)
@given(federations())
def test_the_residual_completes_the_factor_mean_with_rank_k_minus_1_r(case: Case) -> None:
    terms, weights = case
    residual = centred_residual(terms, weights)
    assert residual.rank == (len(terms) - 1) * max(term.rank for term in terms)
    whole = stack([factor_mean(terms, weights), residual], [1.0, 1.0])
    assert distance(whole, exact_mean(terms, weights)) <= 1e-10 * size(terms)


def test_the_specifications_numbers() -> None:
    rng = np.random.default_rng(0)
    terms = [gaussian(rng, 200, 300, 6) for _ in range(4)]
    residual = centred_residual(terms, [1.0] * 4)
    assert residual.rank == np.linalg.matrix_rank(dense(residual)) == 18
    for weights in ([1.0] * 4, [1.0, 2.0, 3.0, 4.0]):
        p = np.array(normalised(weights))
        # independent factors: E||sum p BA||^2 : E||residual||^2 = sum p^2 : that less 2 sum p^3 - (sum p^2)^2
        expected = np.sqrt(1 - (2 * np.sum(p**3) - np.sum(p**2) ** 2) / np.sum(p**2))
        error = norm(centred_residual(terms, weights)) / norm(stack(terms, list(p)))
        assert error == pytest.approx(expected, abs=0.02)
        assert 0.78 < error < 0.88


@settings(deadline=None)
@given(federations())
def test_partitions_average_over_their_owners_alone(case: Case) -> None:
    terms, weights = case
    expected = np.zeros(terms[0].shape)
    cuts = sorted({0, *(term.rank for term in terms)})
    for low, high in itertools.pairwise(cuts):
        owners = [(t, w) for t, w in zip(terms, weights, strict=True) if t.rank >= high]
        for term, weight in owners:
            share = weight / sum(w for _, w in owners)
            expected += share * term.up[:, low:high] @ term.down[low:high]
    result = rank_partitioned(terms, weights)
    assert np.linalg.norm(dense(result) - expected) <= 1e-10 * size(terms)
    assert result.rank == sum(term.rank for term in terms)


@settings(deadline=None)
@given(federations(same_rank=True))
def test_equal_ranks_make_partitioning_the_exact_mean(case: Case) -> None:
    assert distance(rank_partitioned(*case), exact_mean(*case)) <= 1e-10 * size(case[0])


@settings(deadline=None)
@given(federations())
def test_sparsity_weights_follow_the_norm_of_the_product(case: Case) -> None:
    terms, _ = case
    norms = np.array([np.linalg.norm(dense(term)) for term in terms])
    uniform = np.full(len(terms), 1 / len(terms))
    assert np.allclose(sparsity_weights(terms), norms / norms.sum() if norms.any() else uniform)
    assert sum(sparsity_weights(terms)) == pytest.approx(1)


@settings(deadline=None)
@given(federations())
def test_fair_is_least_squares_with_the_mean_down_factor(case: Case) -> None:
    terms, weights = case
    result, target = fair(terms, weights), dense(exact_mean(terms, weights))
    assert np.allclose(result.down, factor_mean(terms, weights).down, atol=0)
    missed = target - dense(result)
    # least squares: what is missed is orthogonal to every row of Abar
    assert np.linalg.norm(missed @ result.down.T) <= 1e-8 * size(terms)
    averaged = np.linalg.norm(target - dense(factor_mean(terms, weights)))
    assert np.linalg.norm(missed) <= averaged + 1e-10 * size(terms)


def test_fair_withstands_a_mean_factor_without_full_rank() -> None:
    rng = np.random.default_rng(1)
    row = rng.standard_normal((1, 9))
    terms = [LowRank(rng.standard_normal((7, 3)), np.vstack([row, row, 0 * row])) for _ in range(3)]
    assert distance(fair(terms, [1.0, 2.0, 3.0]), exact_mean(terms, [1.0, 2.0, 3.0])) < 1e-12


def rotation(rng: np.random.Generator, rank: int) -> Matrix64:
    return nearest_rotation(rng.standard_normal((rank, rank)))


@settings(deadline=None)
@given(federations(), st.integers(0, 5), st.sampled_from(["A", "B"]), st.floats(0, 1))
def test_alignment_keeps_the_product(case: Case, rank: int, factor: str, softness: float) -> None:
    terms, _ = case
    reference = gaussian(np.random.default_rng(rank), *terms[0].shape, rank)
    turned = align(terms[0], reference, factor=factor, softness=softness)  # type: ignore[arg-type]
    assert distance(turned, terms[0]) <= 1e-10 * size(terms)


@settings(deadline=None)
@given(federations(same_rank=True, alive=True), st.integers(0, 2**32), st.sampled_from(["A", "B"]))
def test_alignment_undoes_each_sites_rotation(case: Case, seed: int, factor: str) -> None:
    terms, weights = case
    rng = np.random.default_rng(seed)
    reference = gaussian(rng, *terms[0].shape, terms[0].rank)
    turns = [rotation(rng, t.rank) if t.rank else np.eye(0) for t in terms]
    turned = [LowRank(t.up @ q, q.T @ t.down) for t, q in zip(terms, turns, strict=True)]
    means = [
        factor_mean([align(t, reference, factor=factor) for t in group], weights)  # type: ignore[arg-type]
        for group in (terms, turned)
    ]
    assert distance(*means) <= 1e-8 * size(terms)


def test_hard_alignment_recovers_the_reference_and_soft_goes_part_of_the_way() -> None:
    rng = np.random.default_rng(5)
    reference = gaussian(rng, 9, 12, 4)
    turn = rotation(rng, 4)
    term = LowRank(rng.standard_normal((9, 4)), turn @ reference.down)
    gaps = [
        float(np.linalg.norm(align(term, reference, factor="A", softness=s).down - reference.down))
        for s in (0.0, 0.3, 0.6, 1.0)
    ]
    assert gaps[0] < 1e-12
    assert gaps == sorted(gaps)
    assert np.allclose(align(term, reference, factor="A", softness=1.0).down, term.down)
    by_up = LowRank(reference.up @ turn, term.down)
    assert np.allclose(align(by_up, reference, factor="B").up, reference.up)
    start = LowRank(np.zeros((9, 4)), reference.down)
    assert np.array_equal(align(term, start, factor="B").up, term.up)
    mirror = align(LowRank(term.up, reference.down * [[-1.0], [1], [1], [1]]), reference, factor="A")
    assert not np.allclose(mirror.down, reference.down)
    with pytest.raises(RunError, match="softness"):
        align(term, reference, factor="A", softness=1.5)
    with pytest.raises(RunError, match="factor to align"):
        align(term, reference, factor="C")  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**32))
def test_the_nearest_rotation_is_a_rotation(rank: int, seed: int) -> None:
    turn = rotation(np.random.default_rng(seed), rank)
    assert np.allclose(turn @ turn.T, np.eye(rank))
    assert np.linalg.det(turn) == pytest.approx(1)
    half_turn = nearest_rotation(np.zeros((rank, rank)))  # polar((I + Q) / 2) where Q = -I
    assert np.linalg.det(half_turn) == pytest.approx(1)


@settings(deadline=None)
@given(federations(), st.booleans())
def test_refactoring_keeps_the_product_and_makes_a_orthonormal(case: Case, zero: bool) -> None:
    term = case[0][0].scaled(0.0 if zero else 1.0)
    result = spectral.refactor(term.up, term.down)
    assert distance(result, term) <= 1e-10 * size([term])
    assert result.rank == term.rank
    assert np.allclose(result.down @ result.down.T, np.eye(term.rank), atol=1e-12)


def test_refactoring_more_components_than_the_matrix_holds() -> None:
    term = gaussian(np.random.default_rng(2), 3, 4, 6)
    result = spectral.refactor(term.up, term.down)
    assert result.rank == 6
    assert distance(result, term) < 1e-12


@settings(deadline=None)
@given(federations(), st.integers(0, 5), st.integers(0, 2**32))
def test_a_wide_sketch_is_exact_balanced_and_free_of_gauge(case: Case, rank: int, seed: int) -> None:
    terms, weights = case
    exact, result = exact_mean(terms, weights), two_stage_sketch(terms, weights)
    assert distance(result, exact) <= 1e-10 * size(terms)
    assert np.allclose(np.linalg.norm(result.up, axis=0), np.linalg.norm(result.down, axis=1))
    cut = LowRank(result.up[:, :rank], result.down[:rank])
    best = truncate(exact, rank=rank)
    assert distance(cut, exact) == pytest.approx(distance(best, exact), abs=1e-10 * size(terms))
    rng = np.random.default_rng(seed)
    gauges = [np.eye(t.rank) + 0.1 * rng.standard_normal((t.rank, t.rank)) for t in terms]
    turned = [LowRank(t.up @ g, np.linalg.inv(g) @ t.down) for t, g in zip(terms, gauges, strict=True)]
    assert distance(two_stage_sketch(turned, weights), exact) <= 1e-10 * size(terms)


def test_the_test_matrix_is_the_same_for_every_party() -> None:
    one, other = spectral.omega("7/q_proj", 6, 4), spectral.omega("7/q_proj", 6, 4)
    assert np.array_equal(one, other)
    assert not np.array_equal(one, spectral.omega("8/q_proj", 6, 4))
    assert one.shape == (6, 4)


@pytest.mark.parametrize("rule", [factor_mean, centred_residual, rank_partitioned, fair])
def test_bad_input_is_refused(rule: Rule) -> None:
    rng = np.random.default_rng(0)
    term = gaussian(rng, 3, 4, 2)
    with pytest.raises(RunError, match="cannot aggregate 0 terms"):
        rule([], [])
    with pytest.raises(RunError, match="positive and finite"):
        rule([term, term], [1.0, 0.0])
    with pytest.raises(RunError, match="term #1 has shape"):
        rule([term, gaussian(rng, 4, 3, 2)], [1.0, 1.0])


def test_sketches_that_do_not_fit_are_refused() -> None:
    term = gaussian(np.random.default_rng(0), 3, 4, 2)
    with pytest.raises(RunError, match="with 4 rows"):
        spectral.sketch(term, np.ones((3, 2)))
    with pytest.raises(RunError, match="with 3 rows"):
        spectral.back_project(term, np.ones((4, 2)))
    with pytest.raises(RunError, match="do not multiply"):
        spectral.rebuild(np.ones((3, 2)), np.ones((4, 3)), rank=2)
    with pytest.raises(RunError, match="NaN"):
        spectral.refactor(np.full((3, 2), np.nan), term.down)
