"""Privacy accounting with dp-accounting's privacy loss distributions (PLD).

Relation: add or remove one record. Sampler: Poisson. A site's epsilon follows from its own
(noise multiplier, sample rate, steps) alone; server and other sites are post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import dp_accounting
from dp_accounting import pld
from scipy.optimize import brentq

from fedllm.errors import PrivacyError

RELATION = "add-or-remove-one"
SAMPLER = "Poisson"
ACCOUNTANT = "dp-accounting PLD"
_FINE, _COARSE = 1e-4, 1e-3
_LEAST = 0.02


@dataclass(frozen=True, kw_only=True, order=True)
class Spend:
    """Steps of DP-SGD on one data set.

    Attributes
    ----------
    noise_multiplier : float
        Standard deviation of the noise over the clipping norm.
    sample_rate : float
        Probability that a step takes a record.
    steps : int
        Number of noised steps.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


def epsilon(spends: Iterable[Spend], *, delta: float) -> float:
    """Return the epsilon of all spends together, an upper bound by PLD on a 1e-4 grid."""
    return _epsilon(_merged(spends), delta, _FINE)


def _merged(spends: Iterable[Spend]) -> tuple[tuple[float, float, int], ...]:
    """Return (noise multiplier, sample rate, steps) of equal spends together, in order."""
    merged: dict[tuple[float, float], int] = {}
    for spend in spends:
        key = (spend.noise_multiplier, spend.sample_rate)
        merged[key] = merged.get(key, 0) + spend.steps
    return tuple(sorted((sigma, rate, steps) for (sigma, rate), steps in merged.items() if steps))


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[tuple[float, float, int], ...], delta: float, grid: float) -> float:
    if not events:
        return 0.0
    accountant = pld.PLDAccountant(value_discretization_interval=grid)
    for sigma, rate, steps in events:
        accountant.compose(_event(sigma, rate), steps)
    return float(accountant.get_epsilon(delta))


def _event(sigma: float, rate: float) -> dp_accounting.DpEvent:
    gaussian = dp_accounting.GaussianDpEvent(sigma)
    return gaussian if rate >= 1 else dp_accounting.PoissonSampledDpEvent(rate, gaussian)


@lru_cache(maxsize=1024)
def calibrate(
    *, target: float, delta: float, sample_rate: float, steps: int, prior: tuple[Spend, ...] = ()
) -> float:
    """Return the smallest noise multiplier whose epsilon after all steps is at most ``target``.

    Brent's method finds it to 0.05 % on a 1e-3 grid, in logarithms, where the curve is nearly a
    straight line. A coarser grid is an upper bound too, only a looser one, and ten times as fast.

    Parameters
    ----------
    prior : tuple[Spend, ...]
        What the same run has spent already and the target has to cover too.

    Raises
    ------
    PrivacyError
        If no noise multiplier below 1000 reaches the target.
    """
    held = tuple((spend.noise_multiplier, spend.sample_rate, spend.steps) for spend in prior)

    def reached(sigma: float) -> float:
        return _epsilon(tuple(sorted((*held, (sigma, sample_rate, steps)))), delta, _COARSE)

    def excess(log_sigma: float) -> float:
        return math.log(max(reached(math.exp(log_sigma)), 1e-9) / target)

    low, high = 0.2, 0.4
    while reached(high) > target:
        low, high = high, 2 * high
        if high > 1000:
            raise PrivacyError(f"no noise multiplier reaches epsilon {target:g} in {steps} more steps.")
    while reached(low) <= target:
        if low < _LEAST:
            return low
        low, high = low / 2, low
    sigma = math.exp(brentq(excess, math.log(low), math.log(high), xtol=5e-4))
    while reached(sigma) > target:
        sigma *= 1.0005
    return sigma


def within(spends: Iterable[Spend], *, delta: float, limit: float) -> bool:
    """Return whether the epsilon of all spends is at most a limit.

    The 1e-3 grid decides where it can; the 1e-4 grid is asked only where that is too loose.
    """
    events = _merged(spends)
    return _epsilon(events, delta, _COARSE) <= limit or _epsilon(events, delta, _FINE) <= limit


def require_delta(delta: float, *, records: int, site: str) -> None:
    """Refuse a delta that would allow one record of the site to be published outright.

    Raises
    ------
    PrivacyError
        If ``delta >= 1 / records``.
    """
    if not delta < 1 / records:
        raise PrivacyError(
            f"site {site}: privacy.delta={delta:g} is too large for its number of records: it must be "
            f"below 1/n. Use a smaller delta."
        )
