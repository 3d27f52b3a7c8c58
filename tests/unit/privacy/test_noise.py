"""Noise and sampling: the right law, and no seed anywhere."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from fedllm.privacy.noise import SecureGenerator, poisson_sample


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
