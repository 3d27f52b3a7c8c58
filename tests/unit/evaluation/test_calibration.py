"""Probabilities of labels: against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from fedllm.evaluation.calibration import (
    brier_score,
    calibration_bins,
    calibration_error,
    label_probabilities,
    reported_curve,
)

LOGS = np.random.default_rng(3).normal(size=(300, 4)) * 2
TRUTH = [int(x) for x in np.random.default_rng(4).integers(0, 4, 300)]


def test_probabilities_are_a_softmax_even_of_very_unlikely_labels() -> None:
    assert label_probabilities(LOGS) == pytest.approx(torch.softmax(torch.tensor(LOGS), 1).numpy())
    assert label_probabilities([[-5000.0, -5000.0 + np.log(3)]]).tolist() == [pytest.approx([0.25, 0.75])]


def test_brier_score_equals_scikit_learn() -> None:
    found = label_probabilities(LOGS)
    expected = brier_score_loss(TRUTH, found, labels=[0, 1, 2, 3], scale_by_half=False)
    assert brier_score(found, TRUTH) == pytest.approx(expected)


def test_brier_score_of_certain_and_uniform_guesses() -> None:
    assert brier_score([[1, 0], [0, 1]], [0, 1]) == 0
    assert brier_score([[1, 0], [0, 1]], [1, 0]) == 2
    assert brier_score([[0.25] * 4], [2]) == pytest.approx(0.75**2 + 3 * 0.25**2)


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_the_curve_equals_scikit_learn(bins: int) -> None:
    found = label_probabilities(LOGS)
    right = found.argmax(axis=1) == np.array(TRUTH)
    accuracy, confidence = calibration_curve(right, found.max(axis=1), n_bins=bins)
    curve = calibration_bins(found, TRUTH, bins=bins)
    assert [part.accuracy for part in curve] == pytest.approx(list(accuracy))
    assert [part.confidence for part in curve] == pytest.approx(list(confidence))
    assert sum(part.records for part in curve) == 300


def test_calibration_error_by_hand() -> None:
    # (0.6, 0.8]: confidences 0.7 and 0.8, one right; (0.8, 1]: 0.9, right
    found = [[0.7, 0.3], [0.2, 0.8], [0.9, 0.1]]
    curve = calibration_bins(found, [0, 0, 0], bins=5)
    assert [(part.records, part.confidence) for part in curve] == [
        (2, pytest.approx(0.75)),
        (1, pytest.approx(0.9)),
    ]
    assert calibration_error(curve) == pytest.approx((2 * abs(0.75 - 0.5) + abs(0.9 - 1)) / 3)


def test_the_reported_curve_holds_every_bin_in_its_place() -> None:
    found = label_probabilities(LOGS)
    curve = reported_curve(found, TRUTH)
    parts = [curve[start : start + 3] for start in range(0, len(curve), 3)]
    assert len(parts) == 10
    for place, (records, confidence, _) in enumerate(parts):
        assert records == ((found.max(axis=1) > place / 10) & (found.max(axis=1) <= (place + 1) / 10)).sum()
        assert (confidence == 0) == (records == 0)
    held = [
        (part.records, part.confidence, part.accuracy) for part in calibration_bins(found, TRUTH, bins=10)
    ]
    assert [part for part in parts if part[0]] == held


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=1), st.integers(1, 20))
def test_every_record_is_in_one_bin_and_the_error_is_a_share(
    records: list[tuple[float, int]], bins: int
) -> None:
    found = [[first, 1 - first] for first, _ in records]
    curve = calibration_bins(found, [label for _, label in records], bins=bins)
    assert sum(part.records for part in curve) == len(records)
    assert all(0 <= part.confidence <= 1 and 0 <= part.accuracy <= 1 for part in curve)
    assert 0 <= calibration_error(curve) <= 1
    assert 0 <= brier_score(found, [label for _, label in records]) <= 2
