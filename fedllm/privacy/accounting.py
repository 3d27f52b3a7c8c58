"""Privacy accounting with dp-accounting's privacy loss distributions (PLD).

A site's epsilon follows from its own steps alone; server and other sites are post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import dp_accounting
from dp_accounting import dp_event, pld, rdp
from scipy.optimize import brentq
from scipy.stats import binom

from fedllm.errors import PrivacyError

SAMPLER = "Poisson"
ACCOUNTANT = "dp-accounting PLD"
ADD_OR_REMOVE, ZERO_OUT, REPLACE = "add-or-remove-one", "zero-out-one", "replace-one"
#: Neighbouring relation -> dp-accounting's name for it.
RELATIONS = {
    ADD_OR_REMOVE: dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    ZERO_OUT: dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
    REPLACE: dp_accounting.NeighboringRelation.REPLACE_ONE,
}
_FINE, _COARSE = 1e-4, 1e-3
_LEAST = 0.02
#: Up to as many steps the coarse grid's error is below 0.1 % of an epsilon of 1 and more.
_FEW_STEPS = 2000
#: Widest grid of composed losses, in their deviations: some 2 GB.
_WIDEST = 2e6
# fractional orders below 2 converge slowly, and the bound stays one without them
_ORDERS = [*(2 + step / 5 for step in range(41)), *range(11, 65), 80, 96, 128, 192, 256, 512]
#: Largest probability that a batch is cut, as a share of delta.
_CUT = 1e-3


@dataclass(frozen=True, kw_only=True, order=True)
class Spend:
    """Steps of DP-SGD on one data set.

    Attributes
    ----------
    noise_multiplier : float
        Standard deviation of the noise over the clipping norm.
    sample_rate : float
        Probability that a step takes a record (or unit).
    steps : int
        Number of noised steps.
    cap : int
        Largest batch; what is drawn beyond it is left out at random. 0: none.
    records : int
        Number of records (or units) the batch is drawn from; only with a cap.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    cap: int = 0
    records: int = 0

    def __post_init__(self) -> None:
        # a negative number would take back what was spent
        if self.steps < 0:
            raise PrivacyError(f"a number of steps cannot be negative; got {self.steps}.")


_Event = tuple[float, float, int, int]
_Events = tuple[tuple[_Event, int], ...]


def epsilon(spends: Iterable[Spend], *, delta: float, relation: str = ADD_OR_REMOVE) -> float:
    """Return the epsilon of all spends together, an upper bound by PLD.

    Parameters
    ----------
    relation : str
        One of :data:`RELATIONS`; a cap on batches is accounted under zero-out alone.
    """
    events = _merged(spends)
    # the coarser grid is an upper bound too, a tenth of the work, and here at most 0.1 % looser
    coarse = _epsilon(events, delta, _COARSE, relation)
    capped = any(event[2] for event, _ in events)
    few = coarse >= 1 and sum(steps for _, steps in events) <= _FEW_STEPS
    if capped or few or not _fits(events, _FINE):
        return coarse
    return _epsilon(events, delta, _FINE, relation)


def _merged(spends: Iterable[Spend]) -> _Events:
    """Return equal spends together, in order."""
    merged: dict[_Event, int] = {}
    for spend in spends:
        key = (spend.noise_multiplier, spend.sample_rate, spend.cap, spend.records)
        merged[key] = merged.get(key, 0) + spend.steps
    return tuple(sorted((key, steps) for key, steps in merged.items() if steps))


@lru_cache(maxsize=4096)
def _epsilon(events: _Events, delta: float, grid: float, relation: str) -> float:
    if not events:
        return 0.0
    if relation != ZERO_OUT and any(cap for (_, _, cap, _), _ in events):
        raise PrivacyError(
            f"a cap on batches is accounted under the relation {ZERO_OUT} alone (privacy.relation)."
        )
    if not _fits(events, grid):
        least, steps = min((sigma, steps) for (sigma, *_), steps in events if sigma)
        raise PrivacyError(
            f"a noise multiplier of {least:g} over {steps} steps protects nothing, and its accounting would "
            f"not fit into memory; give {_LEAST} or more, and more for many steps."
        )
    accountant = pld.PLDAccountant(RELATIONS[relation], value_discretization_interval=grid)
    return _compose(accountant, events, delta)


def _fits(events: _Events, grid: float) -> bool:
    """Return whether the composed losses fit into memory, by how far they scatter."""
    return all(
        sigma >= _LEAST / 2 and _width(sigma, rate, steps) <= _WIDEST * grid
        for (sigma, rate, *_), steps in events
        if sigma
    )


def _width(sigma: float, rate: float, steps: int) -> float:
    # without sampling all steps are one Gaussian, whose losses are wide as their mean
    return (steps if rate >= 1 else math.sqrt(steps * rate)) / sigma / sigma


def _compose(accountant: dp_accounting.PrivacyAccountant, events: _Events, delta: float) -> float:
    for event, steps in events:
        accountant.compose(_event(*event), steps)
    return float(accountant.get_epsilon(delta))


def _event(sigma: float, rate: float, cap: int, records: int) -> dp_accounting.DpEvent:
    if cap:
        return dp_accounting.TruncatedSubsampledGaussianDpEvent(records, rate, cap, sigma)
    gaussian = dp_accounting.GaussianDpEvent(sigma)
    return gaussian if rate >= 1 else dp_accounting.PoissonSampledDpEvent(rate, gaussian)


@lru_cache(maxsize=1024)
def calibrate(
    *,
    target: float,
    delta: float,
    sample_rate: float,
    steps: int,
    prior: tuple[Spend, ...] = (),
    cap: int = 0,
    records: int = 0,
    relation: str = ADD_OR_REMOVE,
) -> float:
    """Return the smallest noise multiplier whose epsilon after all steps is at most ``target``.

    Brent's method finds it to 0.05 % on a 1e-3 grid, in logarithms, where the curve is nearly a
    straight line. A coarser grid is an upper bound too, only a looser one, and ten times as fast.

    Parameters
    ----------
    prior : tuple[Spend, ...]
        What the same run has spent already and the target has to cover too.
    cap, records, relation
        As in :class:`Spend` and :func:`epsilon`.

    Raises
    ------
    PrivacyError
        If no noise multiplier below 1000 reaches the target.
    """

    def reached(sigma: float) -> float:
        spend = Spend(noise_multiplier=sigma, sample_rate=sample_rate, steps=steps, cap=cap, records=records)
        return _epsilon(_merged((*prior, spend)), delta, _COARSE, relation)

    def excess(log_sigma: float) -> float:
        return math.log(max(reached(math.exp(log_sigma)), 1e-9) / target)

    # no smaller one than fits; its epsilon would be in the thousands
    low = max(0.2, math.sqrt(_width(1.0, sample_rate, steps) / (_WIDEST * _COARSE)) * (1 + 1e-9))
    high = 2 * low
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


def within(spends: Iterable[Spend], *, delta: float, limit: float, relation: str = ADD_OR_REMOVE) -> bool:
    """Return whether the epsilon of all spends is at most a limit.

    The 1e-3 grid decides where it can; the 1e-4 grid is asked only where that is too loose, and fits.
    """
    events = _merged(spends)
    if _epsilon(events, delta, _COARSE, relation) <= limit:
        return True
    return _fits(events, _FINE) and _epsilon(events, delta, _FINE, relation) <= limit


def cross_check(spends: Iterable[Spend], *, delta: float) -> dict[str, float]:
    """Return the same epsilon by three accountants, under add-or-remove and without caps.

    PLD is the reference. RDP is a looser upper bound; PRV (Opacus) is computed with an error bound
    of 0.01, which it adds. A PLD value far from PRV's or above RDP's would be a mistake somewhere.
    """
    # Opacus takes seconds to import and is asked only here
    from opacus.accountants import PRVAccountant

    events = _merged(replace(spend, cap=0, records=0) for spend in spends)
    if not events:
        return {"PLD": 0.0, "PRV": 0.0, "RDP": 0.0}
    prv = PRVAccountant()
    prv.history = [(sigma, rate, steps) for (sigma, rate, _, _), steps in events]
    return {
        "PLD": _epsilon(events, delta, _FINE, ADD_OR_REMOVE),
        "PRV": float(prv.get_epsilon(delta)),
        "RDP": _compose(rdp.RdpAccountant(_ORDERS), events, delta),
    }


def batch_cap(*, records: int, rate: float, delta: float) -> int:
    """Return the smallest batch that a Poisson draw exceeds with probability at most delta/1000."""
    return min(records, int(binom.isf(_CUT * delta, records, rate)) + 1)


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
            f"below 1/n. Use a smaller delta.",
            public=f"site {site}: privacy.delta is too large for its number of records; use a smaller one.",
        )


def selected_epsilon(spend: Spend, *, mean: float, delta: float) -> float:
    """Return the epsilon of the best of a random number of equally private runs (arXiv 2110.03620).

    The number is geometric on 1, 2, ... with the given mean; only the best run is released, and its
    score is part of what each run releases privately. By RDP, the one accountant that has it.

    Parameters
    ----------
    spend : Spend
        One whole run.
    mean : float
        Expected number of runs, above 1.
    """
    run = dp_accounting.SelfComposedDpEvent(
        _event(spend.noise_multiplier, spend.sample_rate, 0, 0), spend.steps
    )
    accountant = rdp.RdpAccountant(_ORDERS)
    accountant.compose(dp_event.RepeatAndSelectDpEvent(run, mean=mean, shape=1))
    return float(accountant.get_epsilon(delta))
