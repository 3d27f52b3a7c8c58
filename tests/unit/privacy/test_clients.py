"""Privacy of whole sites: bounded influence, fixed denominator, correct adaptive clipping."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedllm.privacy.clients import change_multiplier, next_clipping_norm, noised_mean
from fedllm.privacy.entropy import SecureGenerator

GENERATOR = SecureGenerator()


def mean(changes: list[dict[str, np.ndarray]], **options: float) -> dict[str, np.ndarray]:
    settings = {"clipping_norm": 1.0, "noise_multiplier": 0.0, "sites": 4} | options
    return noised_mean(changes, generator=GENERATOR, **settings).change  # type: ignore[arg-type]


def norm(tensors: dict[str, np.ndarray]) -> float:
    return math.sqrt(sum(float((value**2).sum()) for value in tensors.values()))


@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0, math.inf, math.nan])
def test_a_site_moves_the_mean_by_at_most_its_share(size: float) -> None:
    rng = np.random.default_rng(0)
    others = [{"a": rng.standard_normal((3, 2)), "b": rng.standard_normal(4)} for _ in range(3)]
    one = {"a": np.full((3, 2), size), "b": np.full(4, size)}
    with_it, without = mean([*others, one]), mean(others)
    moved = norm({key: with_it[key] - without[key] for key in with_it})
    # Flower's own wrapper lets a site with nine tenths of the examples move it by nine tenths
    assert moved <= 1.0 / 4 + 1e-12
    assert all(np.isfinite(value).all() for value in with_it.values())


def test_a_small_change_is_not_clipped_and_zero_is_harmless() -> None:
    found = mean([{"a": np.full(4, 0.1)}, {"a": np.zeros(4)}], sites=2)
    assert np.allclose(found["a"], 0.05)


def test_noise_has_the_deviation_z_s_over_m() -> None:
    found = mean([{"a": np.zeros(50_000)}], clipping_norm=0.3, noise_multiplier=2.0, sites=5)
    assert found["a"].std() == pytest.approx(2.0 * 0.3 / 5, rel=0.03)


def test_the_count_has_its_own_noise_and_share_of_the_budget() -> None:
    assert change_multiplier(1.0, 1.0) == pytest.approx(1 / math.sqrt(1 - 0.25))
    assert change_multiplier(1.0, 1e6) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="above half"):
        change_multiplier(1.0, 0.5)
    changes = [{"a": np.full(4, size)} for size in (0.1, 0.2, 5.0, 9.0)]
    shares = [
        noised_mean(
            changes,
            clipping_norm=1.0,
            noise_multiplier=0.0,
            sites=4,
            generator=GENERATOR,
            count_multiplier=0.4,
        ).within
        for _ in range(2000)
    ]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.02)
    assert np.std(shares) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("start", [0.05, 20.0])
def test_the_clipping_norm_moves_towards_the_quantile(start: float) -> None:
    # Flower's own wrapper has the sign wrong: it shrinks from 0.1 to 0.00025 and grows from 10 to 4034
    norms = np.linspace(0.5, 1.5, 101)
    clip = start
    for _ in range(200):
        clip = next_clipping_norm(clip, within=float((norms <= clip).mean()), quantile=0.5, rate=0.2)
    assert clip == pytest.approx(1.0, abs=0.1)
