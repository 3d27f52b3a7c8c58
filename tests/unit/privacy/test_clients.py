"""Privacy of whole sites: bounded influence, fixed denominator, correct adaptive clipping."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from fedllm.privacy.clients import (
    change_multiplier,
    clipped_change,
    fixed_mean,
    next_clipping_norm,
    noised_change,
    noised_mean,
    views,
)
from fedllm.privacy.entropy import SecureGenerator

GENERATOR = SecureGenerator()


def mean(changes: list[dict[str, np.ndarray]], **options: float) -> dict[str, np.ndarray]:
    settings = {"clipping_norm": 1.0, "noise_multiplier": 0.0, "sites": 4} | options
    return noised_mean(changes, generator=GENERATOR, **settings).change  # type: ignore[arg-type]


def share(change: dict[str, np.ndarray], **options: float) -> dict[str, np.ndarray]:
    return noised_change(change, generator=GENERATOR, **options)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("quorum", [1, 3, 8])
def test_the_shares_of_a_quorum_make_the_whole_noise(quorum: int) -> None:
    norm_limit, multiplier, size = 0.3, 2.0, 40_000
    rng = np.random.default_rng(1)
    # far above, exactly at and far below the norm, over two matrices
    changes = [
        {"a": scale * rng.standard_normal((size - 10, 1)), "b": scale * rng.standard_normal(10)}
        for scale in np.geomspace(1e-6, 10.0, quorum)
    ]
    shares = [
        share(change, clipping_norm=norm_limit, noise_multiplier=multiplier, shares=quorum)
        for change in changes
    ]
    clipped = [clipped_change(change, clipping_norm=norm_limit)[0] for change in changes]
    found, signal = fixed_mean(shares, sites=1), fixed_mean(clipped, sites=1)
    noise = np.concatenate([(found[key] - signal[key]).ravel() for key in found])
    expected = (multiplier * norm_limit) ** 2
    # (n - 1) s^2 / sigma^2 is chi-squared: six of its deviations hold but for one in 10^9
    assert noise.var(ddof=1) == pytest.approx(expected, rel=6 * math.sqrt(2 / size))
    assert abs(noise.mean()) < 6 * math.sqrt(expected / size)
    assert kstest(noise / math.sqrt(expected), "norm").pvalue > 1e-6
    single = (shares[0]["a"] - clipped[0]["a"]).var()
    assert single == pytest.approx(expected / quorum, rel=6 * math.sqrt(2 / size))


@given(
    scale=st.floats(1e-9, 1e9),
    limit=st.floats(1e-3, 1e3),
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
)
def test_a_site_clips_its_own_update(scale: float, limit: float, sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    change = {str(index): scale * rng.standard_normal(size) for index, size in enumerate(sizes)}
    found = share(change, clipping_norm=limit, noise_multiplier=0.0, shares=3)
    before, after = norm(change), norm(found)
    assert after <= limit * (1 + 1e-12)
    assert after == pytest.approx(min(before, limit))
    for key, value in change.items():
        assert np.allclose(found[key] * before, value * after, rtol=1e-9)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_update_that_is_not_finite_is_noise_alone(bad: float) -> None:
    found = share(
        {"a": np.array([bad, 1.0]), "b": np.ones(20_000)}, clipping_norm=0.5, noise_multiplier=2.0, shares=4
    )
    assert np.isfinite(found["a"]).all()
    assert found["b"].mean() == pytest.approx(0.0, abs=0.03)
    assert found["b"].std() == pytest.approx(2.0 * 0.5 / 2, rel=0.05)


def test_what_sites_hid_is_only_averaged_over_all_sites() -> None:
    changes = [{"a": np.full(3, size, np.float32)} for size in (1.0, 50.0)]
    assert np.allclose(fixed_mean(changes, sites=4)["a"], 51.0 / 4)
    assert fixed_mean([], sites=4) == {}


@pytest.mark.parametrize(("quorum", "others"), [(1, 1.0), (2, 0.5), (3, 2 / 3), (10, 0.9)])
def test_who_sees_how_much_noise(quorum: int, others: float) -> None:
    found = views(2.0, shares=quorum)
    assert found.outsiders == 2.0
    assert found.sites == pytest.approx(2.0 * math.sqrt(others))
    assert found.coordinator == pytest.approx(2.0 / math.sqrt(quorum))
    assert found.outsiders >= found.sites >= found.coordinator


@pytest.mark.parametrize("quorum", [2, 5])
def test_the_views_are_what_the_sums_show(quorum: int) -> None:
    """Each view is the deviation of what is left once that party has taken off what it knows."""
    nothing = {"a": np.zeros(40_000)}
    shares = [
        share(nothing, clipping_norm=1.0, noise_multiplier=3.0, shares=quorum)["a"] for _ in range(quorum)
    ]
    found, total = views(3.0, shares=quorum), sum(shares)
    bound = 6 / math.sqrt(2 * 40_000)
    assert np.std(total) == pytest.approx(found.outsiders, rel=bound)
    assert np.std(total - shares[-1]) == pytest.approx(found.sites, rel=bound)
    assert np.std(shares[0]) == pytest.approx(found.coordinator, rel=bound)


def test_one_site_moves_the_count_for_adaptive_clipping_by_one_half_at_most() -> None:
    # theorem 1 of arXiv 1905.03871, which the noise on the count relies on, needs exactly this

    class Silent(SecureGenerator):
        def normal(self, shape: tuple[int, ...]) -> np.ndarray:
            return np.zeros(shape)

    def within(changes: list[dict[str, np.ndarray]]) -> float:
        return noised_mean(
            changes,
            clipping_norm=1.0,
            noise_multiplier=1.0,
            sites=4,
            generator=Silent(),
            count_multiplier=1.0,
        ).within

    inside, outside = {"a": np.full(2, 0.1)}, {"a": np.full(2, 9.0)}
    others = [inside, outside, inside]
    for site in (inside, outside):
        assert abs(within([*others, site]) - within(others)) * 4 == pytest.approx(0.5)
    assert within([*others, inside]) == pytest.approx(0.75)
