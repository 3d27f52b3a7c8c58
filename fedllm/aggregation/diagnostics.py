"""How far a round's sites are apart, over all adapted modules, from their factors alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedllm.aggregation.factors import centred_residual
from fedllm.aggregation.lowrank import LowRank, norm, normalised, require_alike, singular_values, stack
from fedllm.errors import RunError

#: A difference below this share of its terms is rounding, not a change.
ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class RoundDiagnostics:
    """Three numbers about one round; None where one has no meaning.

    Attributes
    ----------
    aggregation_error : float or None
        ``||sum p_k B_k A_k - Bbar Abar||_F / ||sum p_k B_k A_k||_F``: what averaging the factors
        would lose. None if the mean is zero.
    rank_energy : float or None
        Share of the mean change's squared singular values that its top r components hold, r being
        the largest rank of a site: what a truncation to r keeps. None if nothing changed.
    cosine : float or None
        Mean cosine between the changes of two sites, from -1 to 1. None unless two sites changed.
    """

    aggregation_error: float | None
    rank_energy: float | None
    cosine: float | None


def diagnose(
    updates: Sequence[Mapping[str, LowRank]], weights: Sequence[float], reference: Mapping[str, LowRank]
) -> RoundDiagnostics:
    """Compare the updates of one round.

    Norms and inner products run over all modules together; the rank energy is each module's,
    weighted by the energy of its change, which is one ratio of two sums. Costs
    O((m + n) (K r)^2 + (K r)^3) a module.

    Parameters
    ----------
    updates : sequence of mapping
        One a site: module -> its whole ``s B A`` after the round.
    weights : sequence of float
        One a site, positive; normalised here.
    reference : mapping
        Module -> the ``s B A`` that all sites started from; any rank.

    Returns
    -------
    RoundDiagnostics

    Raises
    ------
    RunError
        If modules, shapes or counts differ, or weights are not positive and finite.
    """
    shares = normalised(weights)
    if len(updates) != len(shares):
        raise RunError(f"cannot diagnose {len(updates)} updates with {len(shares)} weights.")
    for index, update in enumerate(updates):
        if update.keys() != reference.keys():
            raise RunError(f"update #{index} differs in {sorted(update.keys() ^ reference.keys())[0]}.")
    sites, start = {}, {}
    for module, term in reference.items():
        *sites[module], start[module] = _in_common_coordinates([*(u[module] for u in updates), term])
    rounding = ROUNDING * max(_total(update) for update in (*updates, reference))

    mean = _total({module: stack(terms, shares) for module, terms in sites.items()})
    lost = _total({module: centred_residual(terms, shares) for module, terms in sites.items()})
    return RoundDiagnostics(
        aggregation_error=lost / mean if mean > rounding else None,
        rank_energy=_rank_energy(sites, shares, start, rounding),
        cosine=_mean_cosine(sites, len(updates), start, rounding),
    )


def _in_common_coordinates(terms: Sequence[LowRank]) -> list[LowRank]:
    """Return one module's terms rotated into their common column and row spaces.

    ``[B_1 .. B_K] = Q R`` and likewise for A: dropping both Q changes no norm and no inner product
    of their sums, and leaves matrices of at most sum r_k rows and columns.
    """
    require_alike(terms, [1.0] * len(terms))
    up = np.linalg.qr(np.hstack([term.up for term in terms]), mode="r")
    down = np.linalg.qr(np.vstack([term.down for term in terms]).T, mode="r")
    cuts = np.cumsum([term.rank for term in terms])[:-1]
    blocks = zip(
        np.split(np.asarray(up), cuts, axis=1), np.split(np.asarray(down), cuts, axis=1), strict=True
    )
    return [LowRank(left, right.T) for left, right in blocks]


def _total(terms: Mapping[str, LowRank]) -> float:
    """Return the norm over all modules."""
    return float(np.sqrt(sum(norm(term) ** 2 for term in terms.values())))


def _change(
    sites: Mapping[str, Sequence[LowRank]], weights: Sequence[float], start: Mapping[str, LowRank]
) -> dict[str, LowRank]:
    """Return ``sum_k w_k (update_k - reference)`` of every module."""
    return {
        module: stack([*terms, start[module]], [*weights, -sum(weights)]) for module, terms in sites.items()
    }


def _rank_energy(
    sites: Mapping[str, Sequence[LowRank]],
    shares: Sequence[float],
    start: Mapping[str, LowRank],
    rounding: float,
) -> float | None:
    held = total = 0.0
    for module, change in _change(sites, shares, start).items():
        energies = singular_values(change) ** 2
        held += float(energies[: max(site.rank for site in sites[module])].sum())
        total += float(energies.sum())
    return held / total if total > rounding**2 else None


def _mean_cosine(
    sites: Mapping[str, Sequence[LowRank]], count: int, start: Mapping[str, LowRank], rounding: float
) -> float | None:
    """Return the mean over pairs i < j of ``<e_i, e_j>`` with ``e_k`` site k's change over its norm.

    From one norm instead of K^2 inner products: ``||sum_k e_k||^2 = K + 2 sum_{i<j} <e_i, e_j>``.
    """
    norms = [_total(_change({m: [t[k]] for m, t in sites.items()}, [1.0], start)) for k in range(count)]
    changed = sum(size > rounding for size in norms)
    if changed < 2:
        return None
    together = _total(_change(sites, [1 / size if size > rounding else 0.0 for size in norms], start))
    return (together**2 - changed) / (changed * (changed - 1))
