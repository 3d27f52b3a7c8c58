"""Privacy of whole sites: the clipped and noised mean of their changes (DP-FedAvg, arXiv 1710.06963)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedllm.privacy.entropy import SecureGenerator

Numbers = npt.NDArray[np.float64]


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


def noised_mean(
    changes: Iterable[Mapping[str, npt.NDArray[np.floating]]],
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
    within = 0
    for change in changes:
        norm = math.sqrt(sum(float(np.sum(value.astype(np.float64) ** 2)) for value in change.values()))
        finite = math.isfinite(norm)
        within += finite and norm <= clipping_norm
        factor = min(1.0, clipping_norm / norm) if norm > 0 else 1.0
        for key, value in change.items():
            held = total.setdefault(key, np.zeros(value.shape))
            if finite:
                held += factor * value
    noised = {
        key: (value + noise_multiplier * clipping_norm * generator.normal(value.shape)) / sites
        for key, value in total.items()
    }
    counted = math.nan
    if count_multiplier:
        counted = (within + count_multiplier * float(generator.normal((1,))[0])) / sites
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
