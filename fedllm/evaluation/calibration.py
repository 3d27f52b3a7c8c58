"""How far a classifier's probabilities can be believed.

A label's probability is its text's likelihood over the sum of all labels' likelihoods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Bins of the curve that a site reports; the calibration error has finer ones.
REPORTED_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Bin:
    """The records of one range of confidence.

    Attributes
    ----------
    confidence, accuracy : float
        Mean probability of the guessed label, and the share of right guesses.
    """

    records: int
    confidence: float
    accuracy: float


def label_probabilities(log_likelihoods: ArrayLike) -> NDArray[np.float64]:
    """Return each row of log-likelihoods as probabilities that sum to 1; shape (records, labels).

    >>> label_probabilities([[0.0, 0.0]]).tolist()
    [[0.5, 0.5]]
    """
    logs = np.asarray(log_likelihoods, dtype=np.float64)
    weights: NDArray[np.float64] = np.exp(logs - logs.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def brier_score(probabilities: ArrayLike, truth: Sequence[int]) -> float:
    """Return the mean squared distance to the truth, summed over labels: 0 is best, 2 worst.

    Parameters
    ----------
    probabilities : array of shape (records, labels)
        Rows sum to 1.
    truth : sequence of int
        Column of each record's true label.

    References
    ----------
    Brier, "Verification of forecasts expressed in terms of probability", 1950.

    >>> brier_score([[1.0, 0.0], [0.5, 0.5]], [0, 1])
    0.25
    """
    found = np.asarray(probabilities, dtype=np.float64)
    return float(((found - np.eye(found.shape[1])[list(truth)]) ** 2).sum(axis=1).mean())


def calibration_bins(probabilities: ArrayLike, truth: Sequence[int], *, bins: int = 15) -> tuple[Bin, ...]:
    """Return the calibration curve of the guessed labels: bins of equal width, empty ones left out.

    A bin holds its upper end; the first one holds 0, too.

    Parameters are those of :func:`brier_score`.
    """
    return tuple(_binned(probabilities, truth, bins).values())


def reported_curve(probabilities: ArrayLike, truth: Sequence[int]) -> tuple[float, ...]:
    """Return the calibration curve as a site reports it, so that curves of several sites can be joined.

    Parameters are those of :func:`brier_score`.

    Returns
    -------
    tuple of float
        Ten bins of equal width, three numbers each: records, mean confidence, share of right guesses; zeros
        where there is no record.

    >>> reported_curve([[0.75, 0.25], [0.125, 0.875]], [0, 0])[-9:]
    (1.0, 0.75, 1.0, 1.0, 0.875, 0.0, 0.0, 0.0, 0.0)
    """
    held, empty = _binned(probabilities, truth, REPORTED_BINS), Bin(records=0, confidence=0.0, accuracy=0.0)
    parts = [held.get(place, empty) for place in range(REPORTED_BINS)]
    return tuple(float(value) for part in parts for value in (part.records, part.confidence, part.accuracy))


def calibration_error(curve: Sequence[Bin]) -> float:
    """Return the expected calibration error: mean over records of a bin's |confidence - accuracy|.

    References
    ----------
    Guo et al., "On calibration of modern neural networks", arXiv 1706.04599, section 2.
    """
    records = sum(part.records for part in curve)
    return sum(part.records * abs(part.confidence - part.accuracy) for part in curve) / records


def _binned(probabilities: ArrayLike, truth: Sequence[int], bins: int) -> dict[int, Bin]:
    """Return place from 0 -> bin, of those that hold a record."""
    found = np.asarray(probabilities, dtype=np.float64)
    confidence = found.max(axis=1)
    right = found.argmax(axis=1) == np.asarray(truth)
    edges = np.linspace(0, 1, bins + 1)
    place = np.searchsorted(edges[1:-1], confidence)
    return {
        int(number): Bin(
            records=int((place == number).sum()),
            confidence=float(confidence[place == number].mean()),
            accuracy=float(right[place == number].mean()),
        )
        for number in np.unique(place)
    }
