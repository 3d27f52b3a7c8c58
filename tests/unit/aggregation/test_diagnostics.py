"""A round's diagnostics equal their dense definitions, and are None where they mean nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedllm.aggregation.diagnostics import RoundDiagnostics, diagnose
from fedllm.aggregation.lowrank import LowRank, stack
from fedllm.errors import RunError

SHAPES = {"q": (12, 9), "v": (7, 15)}
Update = dict[str, LowRank]


def draw(seed: int, ranks: tuple[int, int]) -> Update:
    rng = np.random.default_rng(seed)
    return {
        module: LowRank(rng.standard_normal((out, rank)), rng.standard_normal((rank, into)))
        for (module, (out, into)), rank in zip(SHAPES.items(), ranks, strict=True)
    }


def flat(update: Update) -> np.ndarray:
    return np.concatenate([(update[module].up @ update[module].down).ravel() for module in SHAPES])


def test_all_three_numbers_equal_their_dense_definitions() -> None:
    reference = draw(9, (3, 2))
    updates = [draw(0, (3, 2)), draw(1, (1, 2)), draw(2, (0, 4)), draw(3, (3, 1))]
    shares = np.array([1, 2, 3, 4]) / 10
    result = diagnose(updates, [1, 2, 3, 4], reference)

    mean = sum(p * flat(update) for p, update in zip(shares, updates, strict=True))
    averaged = []
    for module, (out, into) in SHAPES.items():
        up, down = np.zeros((out, 4)), np.zeros((4, into))
        for p, update in zip(shares, updates, strict=True):
            up[:, : update[module].rank] += p * update[module].up
            down[: update[module].rank] += p * update[module].down
        averaged.append((up @ down).ravel())
    expected = np.linalg.norm(mean - np.concatenate(averaged)) / np.linalg.norm(mean)
    assert result.aggregation_error == pytest.approx(expected, rel=1e-10)

    held = total = 0.0
    for module, rank in {"q": 3, "v": 4}.items():
        change = sum(p * u[module].up @ u[module].down for p, u in zip(shares, updates, strict=True))
        energies = np.linalg.svd(change - reference[module].up @ reference[module].down)[1] ** 2
        held, total = held + energies[:rank].sum(), total + energies.sum()
    assert result.rank_energy == pytest.approx(held / total, rel=1e-10)

    changes = [flat(update) - flat(reference) for update in updates]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.combinations(changes, 2)]
    assert result.cosine == pytest.approx(np.mean(cosines), rel=1e-10)


def test_sites_that_agree_lose_nothing() -> None:
    reference, update = draw(9, (3, 3)), draw(0, (3, 3))
    start = {module: LowRank(0 * term.up, term.down) for module, term in reference.items()}
    result = diagnose([update, update], [1.0, 5.0], start)
    assert result.aggregation_error == pytest.approx(0, abs=1e-14)
    assert result.rank_energy == pytest.approx(1)
    assert result.cosine == pytest.approx(1)


def test_small_changes_on_a_large_reference_are_resolved() -> None:
    reference = draw(9, (3, 3))
    nudges = [{m: t.scaled(sign * 1e-9) for m, t in draw(0, (1, 1)).items()} for sign in (1.0, -1.0)]
    updates = [{m: stack([reference[m], nudge[m]], [1.0, 1.0]) for m in reference} for nudge in nudges]
    assert diagnose(updates, [1.0, 1.0], reference).cosine == pytest.approx(-1, abs=1e-4)


def test_nothing_is_said_where_nothing_can_be() -> None:
    reference, other = draw(9, (3, 3)), draw(1, (2, 2))
    one = diagnose([other], [1.0], reference)
    assert one.aggregation_error == 0
    assert one.cosine is None
    same = diagnose([reference, reference], [1.0, 2.0], reference)
    assert same.rank_energy is None
    assert same.cosine is None
    assert diagnose([other, reference], [1.0, 2.0], reference).cosine is None
    empty = draw(0, (0, 0))
    nothing = RoundDiagnostics(aggregation_error=None, rank_energy=None, cosine=None)
    assert diagnose([empty, empty], [1.0, 1.0], empty) == nothing


def test_bad_input_is_refused() -> None:
    reference = draw(9, (3, 3))
    with pytest.raises(RunError, match="positive and finite"):
        diagnose([], [], reference)
    with pytest.raises(RunError, match="1 updates with 2 weights"):
        diagnose([reference], [1.0, 1.0], reference)
    with pytest.raises(RunError, match="update #1 differs in v"):
        diagnose([reference, {"q": reference["q"]}], [1.0, 1.0], reference)
    turned = {module: LowRank(term.down.T, term.up.T) for module, term in reference.items()}
    with pytest.raises(RunError, match="has shape"):
        diagnose([reference, turned], [1.0, 1.0], reference)
