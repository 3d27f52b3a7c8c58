"""What an evaluation measures, metrics of a classification by label and of preferences, and intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

_LARGEST_LOSS = 700.0
#: Resamples drawn at once: bounds memory where there are many records.
_BATCH = 50


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one evaluation measured; None where it does not apply to the task or was not asked for.

    Attributes
    ----------
    records : int
        Records scored.
    loss : float
        Mean over records of the mean negative log-likelihood of the answer's tokens, or of DPO's loss,
        in nats.
    accuracy : float or None
        Share of right labels, or of pairs with a positive margin.
    macro_f1, brier, ece : float or None
        Of a classification: hits a label, and how far the labels' probabilities can be believed.
    perplexity : float or None
        Of free text: exp(loss).
    exact_match, token_f1, rouge_l : float or None
        Of written answers, means over records.
    unended : float or None
        Share of written answers that were cut at the largest length.
    calibration : tuple[float, ...]
        Of a classification: :func:`~fedllm.evaluation.calibration.reported_curve`.
    correct : tuple[float, ...]
        A record's hit (1, or 0; half for a margin of zero) in accuracy or exact match; never sent.
    token_f1s : tuple[float, ...]
        A record's token F1 where no part of the answer alone is judged; never sent.
    """

    records: int
    loss: float
    accuracy: float | None = None
    macro_f1: float | None = None
    brier: float | None = None
    ece: float | None = None
    perplexity: float | None = None
    exact_match: float | None = None
    token_f1: float | None = None
    rouge_l: float | None = None
    unended: float | None = None
    calibration: tuple[float, ...] = ()
    correct: tuple[float, ...] = ()
    token_f1s: tuple[float, ...] = ()


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite where it is too large for a float.

    >>> perplexity(0.0), perplexity(1e6)
    (1.0, inf)
    """
    return math.exp(loss) if loss < _LARGEST_LOSS else math.inf


def bootstrap_interval(
    values: Sequence[float], *, seed: int, level: float = 0.95, resamples: int = 1000
) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval of the mean, None for fewer than two values.

    Parameters
    ----------
    values : sequence of float
        One a record.
    seed : int
        The interval is a pure function of values and seed.

    References
    ----------
    Efron and Tibshirani, "An introduction to the bootstrap", 1993, chapter 13.
    """
    if len(values) < 2:
        return None
    found = bootstrap(
        (np.asarray(values, dtype=np.float64),),
        np.mean,
        n_resamples=resamples,
        batch=_BATCH,
        confidence_level=level,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def accuracy(truth: Sequence[str], guess: Sequence[str]) -> float:
    """Return the share of records whose guess is the truth."""
    return sum(t == g for t, g in zip(truth, guess, strict=True)) / len(truth)


def pair_hits(margins: Sequence[float]) -> tuple[float, ...]:
    """Return 1 for each pair with a positive margin, one half for a margin of zero (a coin's), else 0.

    >>> pair_hits([2.0, -1.0, 0.0])
    (1.0, 0.0, 0.5)
    """
    return tuple((margin > 0) + 0.5 * (margin == 0) for margin in margins)


def macro_f1(truth: Sequence[str], guess: Sequence[str]) -> float:
    """Return the mean F1 over the labels that occur in truth or guess.

    >>> macro_f1(["a", "a", "b"], ["a", "a", "a"])
    0.4
    """
    scores = []
    for label in sorted({*truth, *guess}):
        hit = sum(t == g == label for t, g in zip(truth, guess, strict=True))
        said, held = sum(g == label for g in guess), sum(t == label for t in truth)
        scores.append(2 * hit / (said + held))
    return sum(scores) / len(scores)


def majority(train: Sequence[str], truth: Sequence[str]) -> tuple[float, float]:
    """Return accuracy and macro-F1 of always answering the training records' commonest label."""
    counts = Counter(train)
    label = min(counts, key=lambda name: (-counts[name], name))
    guess = [label] * len(truth)
    return accuracy(truth, guess), macro_f1(truth, guess)
