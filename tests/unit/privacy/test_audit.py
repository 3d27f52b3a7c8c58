"""The audits' statistics: bounds that hold, and that are close where they can be."""

from __future__ import annotations

import numpy as np
import pytest
from dp_accounting import get_epsilon_gaussian

from fedllm.privacy.audit import (
    area_interval,
    area_under_curve,
    best_one_run,
    epsilon_by_counts,
    epsilon_by_gaussian,
    epsilon_one_run,
    hits_at,
    rate,
)


def worlds(sigma: float, trials: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed).standard_normal((2, trials)) * sigma
    return draw[0], 1 + draw[1]


def test_clopper_pearson_oracles() -> None:
    # exact binomial intervals as R's binom.test gives them
    half = rate(5, 10)
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.18709, 0.81291), abs=1e-5)
    assert (rate(0, 10).low, rate(10, 10).high) == (0.0, 1.0)
    assert rate(0, 10).high == pytest.approx(0.30850, abs=1e-5)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_bounds_of_a_gaussian_stay_below_its_epsilon_and_come_near(sigma: float) -> None:
    theory = get_epsilon_gaussian(sigma, 1e-5)
    by_gaussian = epsilon_by_gaussian(*worlds(sigma, 20_000), delta=1e-5)
    by_counts = epsilon_by_counts(*worlds(sigma, 20_000), delta=1e-5)
    assert 0.6 * theory < by_gaussian <= theory
    assert 0 < by_counts < by_gaussian


def test_bounds_hold_at_their_confidence() -> None:
    theory = get_epsilon_gaussian(1.0, 1e-5)
    above = [epsilon_by_gaussian(*worlds(1.0, 400, seed), delta=1e-5) > theory for seed in range(300)]
    assert np.mean(above) <= 0.08


def test_equal_worlds_prove_nothing() -> None:
    draw = np.random.default_rng(0).standard_normal((2, 5000))
    assert epsilon_by_gaussian(draw[0], draw[1], delta=1e-5) < 0.2
    assert epsilon_by_counts(draw[0], draw[1], delta=1e-5) < 0.3


def test_one_run_bound() -> None:
    # pure randomised response: a share e^eps / (1 + e^eps) of right guesses proves nearly epsilon
    assert epsilon_one_run(canaries=1000, guesses=1000, correct=500, delta=1e-5) == 0.0
    many = epsilon_one_run(canaries=10_000, guesses=10_000, correct=7311, delta=0.0)
    assert 0.93 < many < 1.0
    assert epsilon_one_run(canaries=1000, guesses=400, correct=400, delta=1e-5) > 3
    # delta buys hits
    assert epsilon_one_run(canaries=1000, guesses=400, correct=300, delta=1e-3) < epsilon_one_run(
        canaries=1000, guesses=400, correct=300, delta=1e-6
    )


def test_best_guesses_are_the_extreme_scores() -> None:
    included = np.arange(100) % 2 == 0
    bound, guesses, correct = best_one_run(
        included.astype(float) + np.linspace(0, 0.1, 100), included, delta=0.0
    )
    assert (guesses, correct) == (40, 40)
    assert bound > 2


def test_area_and_hits() -> None:
    members, others = np.arange(100.0) + 50, np.arange(100.0)
    assert area_under_curve(np.array([2.0, 2.0]), np.array([2.0])) == 0.5
    assert area_under_curve(members, others) == pytest.approx(0.875)
    low, high = area_interval(members, others)
    assert low < 0.875 < high
    # one of a hundred others may lie above: the threshold is the second largest, 98
    found = hits_at(members, others, false_positive_rate=0.01)
    assert found is not None
    assert found.value == 0.51
    assert hits_at(members, others, false_positive_rate=0.001) is None
