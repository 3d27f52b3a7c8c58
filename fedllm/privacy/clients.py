"""Privacy of whole sites: the clipped and noised mean of their changes (DP-FedAvg, arXiv 1710.06963)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedllm.privacy.entropy import SecureGenerator
from fedllm.privacy.noise import gaussian

Numbers = npt.NDArray[np.float64]
Change = Mapping[str, npt.NDArray[np.floating]]


@dataclass(frozen=True, kw_only=True)
class Views:
    """The noise multiplier that a site's change is hidden with, by who looks.

    Attributes
    ----------
    outsiders : float
        Whoever gets the adapter alone.
    sites : float
        Another site, which knows what it sent itself.
    coordinator : float
        Who sees every update apart; 0: nothing is hidden.
    """

    outsiders: float
    sites: float
    coordinator: float


def views(noise_multiplier: float, *, shares: int) -> Views:
    """Return what everybody sees of a sum that holds at least ``shares`` shares of the noise.

    A share has the variance ``(z S)^2 / shares``. Outsiders face all of them, so z; another site
    takes its own off, which leaves ``z sqrt((shares - 1) / shares)``; the coordinator faces the one
    that the site itself added, ``z / sqrt(shares)``. That one is in every sum that the site's change is
    in, so that another site never faces less than the coordinator.
    """
    return Views(
        outsiders=noise_multiplier,
        sites=noise_multiplier * math.sqrt(max(shares - 1, 1) / shares),
        coordinator=noise_multiplier / math.sqrt(shares),
    )


@dataclass(frozen=True, kw_only=True)
class NoisedMean:
    """One round's release.

    Attributes
    ----------
    change : dict[str, ndarray]
        Key -> (sum of clipped changes + noise) / sites.
    within : float
        Noised share of sites whose change was not longer than the clipping norm; NaN if not asked for.
    """

    change: dict[str, Numbers]
    within: float


def clipped_change(change: Change, *, clipping_norm: float) -> tuple[dict[str, Numbers], bool]:
    """Return a change scaled to at most a norm over all its matrices, and whether it was within it.

    One that is not finite counts as none.
    """
    norm = math.sqrt(sum(float(np.sum(value.astype(np.float64) ** 2)) for value in change.values()))
    if not math.isfinite(norm):
        return {key: np.zeros(value.shape) for key, value in change.items()}, False
    factor = min(1.0, clipping_norm / norm) if norm > 0 else 1.0
    return {key: factor * value.astype(np.float64) for key, value in change.items()}, norm <= clipping_norm


def noised_change(
    change: Change,
    *,
    clipping_norm: float,
    noise_multiplier: float,
    shares: int,
    generator: SecureGenerator,
) -> dict[str, Numbers]:
    """Return one site's clipped change with its share of the noise: variance ``(z S)^2 / shares``.

    The sum over ``shares`` sites has the noise that :func:`noised_mean` adds to the sum of changes.

    Parameters
    ----------
    clipping_norm, noise_multiplier : float
        S and z, as in :func:`noised_mean`.
    shares : int
        Sites that the sum has at least.
    """
    deviation = noise_multiplier * clipping_norm / math.sqrt(shares)
    clipped, _ = clipped_change(change, clipping_norm=clipping_norm)
    return {
        key: value + gaussian(value.shape, deviation=deviation, generator=generator)
        for key, value in clipped.items()
    }


def fixed_mean(changes: Iterable[Change], *, sites: int) -> dict[str, Numbers]:
    """Return the sum of changes over the number of sites in the federation, whoever replied."""
    total: dict[str, Numbers] = {}
    for change in changes:
        for key, value in change.items():
            total[key] = total.get(key, 0.0) + value.astype(np.float64)
    return {key: value / sites for key, value in total.items()}


def noised_mean(
    changes: Iterable[Change],
    *,
    clipping_norm: float,
    noise_multiplier: float,
    sites: int,
    generator: SecureGenerator,
    count_multiplier: float = 0.0,
) -> NoisedMean:
    """Return the mean change of a round with every site's influence bounded and hidden.

    The denominator is the number of sites in the federation, whoever replied, so that a site that
    is left out changes nothing else. A change that is not finite counts as none.

    Parameters
    ----------
    changes : Iterable[Mapping[str, ndarray]]
        Each site's change over all matrices it sent; all have the same keys.
    clipping_norm : float
        S, the largest norm a change contributes.
    noise_multiplier : float
        z; the noise on the sum has deviation z S.
    sites : int
        Sites of the federation.
    count_multiplier : float
        Deviation of the noise on the number of changes within S, for adaptive clipping; 0: not asked.
    """
    total: dict[str, Numbers] = {}
    within = 0.0
    for change in changes:
        clipped, inside = clipped_change(change, clipping_norm=clipping_norm)
        # one half is subtracted, so that a site moves the sum by one half at most, as theorem 1 has it
        within += inside - 0.5
        for key, value in clipped.items():
            total[key] = total.get(key, 0.0) + value
    noised = {
        key: (value + noise_multiplier * clipping_norm * generator.normal(value.shape)) / sites
        for key, value in total.items()
    }
    counted = math.nan
    if count_multiplier:
        counted = (within + count_multiplier * float(generator.normal((1,))[0])) / sites + 0.5
    return NoisedMean(change=noised, within=counted)


def change_multiplier(noise_multiplier: float, count_multiplier: float) -> float:
    """Return the noise multiplier of the changes that leaves room for that of the count.

    Changes and count together are one Gaussian of multiplier z: ``z_change = (z^-2 - (2 b)^-2)^-1/2``
    (Andrew et al., arXiv 1905.03871, theorem 1).

    Raises
    ------
    ValueError
        If the count alone spends everything.
    """
    if 2 * count_multiplier <= noise_multiplier:
        raise ValueError("the noise on the count must be above half the noise multiplier.")
    return 1 / math.sqrt(noise_multiplier**-2 - (2 * count_multiplier) ** -2)


def next_clipping_norm(clipping_norm: float, *, within: float, quantile: float, rate: float) -> float:
    """Return the clipping norm of the next round: towards a quantile of the changes' norms.

    ``S exp(-rate (within - quantile))``: if more changes than wanted lie within S, it shrinks
    (Andrew et al., arXiv 1905.03871, section 2.1). ``within`` is the share that was NOT clipped; the
    new norm serves the next round, never the noise of this one.
    """
    return clipping_norm * math.exp(-rate * (min(1.0, max(0.0, within)) - quantile))
