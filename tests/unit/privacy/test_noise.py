"""Noise and sampling: the right law, and no seed anywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from fedllm.privacy.entropy import SecureGenerator
from fedllm.privacy.noise import discrete_gaussian, gaussian
from fedllm.privacy.sampling import poisson_sample, random_subset


def test_normal_has_the_right_law() -> None:
    draw = SecureGenerator().normal((200_001,))
    assert stats.kstest(draw, "norm").pvalue > 1e-4
    assert SecureGenerator().normal((3, 5, 2)).shape == (3, 5, 2)


def test_uniform_has_the_right_law_and_range() -> None:
    draw = SecureGenerator().uniform(100_000)
    assert draw.min() >= 0
    assert draw.max() < 1
    assert stats.kstest(draw, "uniform").pvalue > 1e-4


def test_seeds_of_the_experiment_do_not_reach_the_noise() -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(42)
        np.random.seed(42)
        draws.append(SecureGenerator().normal((1000,)))
    assert abs(np.corrcoef(*draws)[0, 1]) < 0.2


def test_poisson_sampling_is_binomial_and_can_be_empty() -> None:
    generator = SecureGenerator()
    sizes = [len(poisson_sample(500, rate=0.02, generator=generator)) for _ in range(2000)]
    assert abs(np.mean(sizes) - 10) < 0.4
    assert abs(np.var(sizes) - 9.8) < 1.5
    assert any(not poisson_sample(10, rate=0.01, generator=generator) for _ in range(100))
    assert poisson_sample(5, rate=1.0, generator=generator) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_discrete_gaussian_has_exactly_its_law(bits: int) -> None:
    draw = discrete_gaussian((60_000,), generator=SecureGenerator(), bits=bits)
    reach = 4 * 2**bits
    values = np.arange(-reach, reach + 1)
    law = np.exp(-(values.astype(float) ** 2) / (2 * 4.0**bits))
    counts = np.array([(draw == value).sum() for value in values])
    common = law / law.sum() * len(draw) >= 5
    expected = law[common] / law[common].sum() * counts[common].sum()
    assert stats.chisquare(counts[common], expected).pvalue > 1e-4


def test_the_fine_discrete_gaussian_looks_gaussian() -> None:
    draw = discrete_gaussian((40_000,), generator=SecureGenerator())
    assert draw.dtype == np.int64
    assert stats.kstest(draw / 2.0**24, "norm").pvalue > 1e-4
    assert discrete_gaussian((3, 4), generator=SecureGenerator()).shape == (3, 4)


def test_gaussian_has_the_deviation_asked_for() -> None:
    assert gaussian((100_000,), deviation=0.3, generator=SecureGenerator()).std() == pytest.approx(
        0.3, rel=0.02
    )


def test_a_random_subset_is_uniform_and_keeps_order() -> None:
    generator = SecureGenerator()
    drawn = [random_subset([3, 5, 8, 9], size=2, generator=generator) for _ in range(3000)]
    assert all(pair == sorted(pair) and len(set(pair)) == 2 for pair in drawn)
    counts = [sum(item in pair for pair in drawn) for item in (3, 5, 8, 9)]
    assert stats.chisquare(counts).pvalue > 1e-4
    assert random_subset([1, 2], size=5, generator=generator) == [1, 2]
