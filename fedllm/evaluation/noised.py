"""Accuracy from counts that carry noise."""

from __future__ import annotations

import math

#: Standard deviations of a 95 % interval.
_WIDTH = 1.96


def noised_accuracy(records: float, right: float, *, deviation: float) -> tuple[float, float, float] | None:
    """Return the accuracy that two noised counts come to, and its 95 % interval.

    Parameters
    ----------
    records, right : float
        Number of records, and of those that were right, each with Gaussian noise of its own.
    deviation : float
        Standard deviation of that noise.

    Returns
    -------
    tuple[float, float, float] or None
        Accuracy, low and high, in [0, 1]; the interval has the sampling of the records and, to first order,
        the noise. None if the noise is as large as half the count.
    """
    if records < 2 * deviation or records < 1:
        return None
    found = min(1.0, max(0.0, right / records))
    spread = math.sqrt(found * (1 - found) / records + (1 + found**2) * (deviation / records) ** 2)
    return found, max(0.0, found - _WIDTH * spread), min(1.0, found + _WIDTH * spread)
