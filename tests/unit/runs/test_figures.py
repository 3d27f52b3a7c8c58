"""Figures of a comparison, written and read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedllm.errors import RunError
from fedllm.runs.figures import figures_csv, read_figures
from fedllm.runs.measures import METRICS
from fedllm.runs.outcomes import Outcome, Scores

NOTHING = Scores(means=dict.fromkeys(METRICS), worst=None, gap=None)


def outcome(method: str = "A, x", **changes: object) -> Outcome:
    means = {name: 1 / (3 + place) for place, name in enumerate(METRICS)}
    values: dict[str, object] = {
        "group": "all",
        "method": method,
        "seed": 1,
        "tuned": Scores(means=means, worst=0.1, gap=0.2),
        "base": NOTHING,
        "majority": Scores(means={**dict.fromkeys(METRICS), "accuracy": 0.25}, worst=0.25, gap=None),
        "elsewhere": Scores(means={**dict.fromkeys(METRICS), "loss": 1.5}, worst=2.5, gap=None),
        "bytes_up": 10.5,
        "bytes_down": 20.0,
        "bytes_total": 12345,
        "epsilon": None,
        "sites_epsilon": 2.5,
        "seconds": 0.1 + 0.2,
        "base_name": "untrained head",
    }
    return Outcome(**values | changes)  # type: ignore[arg-type]


def test_what_is_written_is_read_back_exactly_and_what_is_not_asked_for_left_out(tmp_path: Path) -> None:
    runs = [outcome(), outcome("B", seed=2, epsilon=8.0), outcome("C")]
    file = tmp_path / "compare.csv"
    file.write_text(figures_csv(runs))
    wanted = {("all", "B", 2): "untrained head", ("all", "A, x", 1): "untrained head", ("all", "D", 1): ""}
    assert read_figures(file, wanted) == [runs[1], runs[0]]


def test_columns_of_later_versions_count_as_not_measured(tmp_path: Path) -> None:
    file = tmp_path / "compare.csv"
    file.write_text(
        "group,method,seed,tuned_accuracy,bytes_up,bytes_down,bytes_total,seconds\nall,A,1,0.5,1,2,3,4\n"
    )
    (found,) = read_figures(file, {("all", "A", 1): "untuned base"})
    assert found.tuned == Scores(means={**dict.fromkeys(METRICS), "accuracy": 0.5}, worst=None, gap=None)
    assert (found.base, found.majority, found.elsewhere, found.sites_epsilon) == (*[NOTHING] * 3, None)


@pytest.mark.parametrize(
    "text", ["text,label\nno,yes\n", "group,method,seed\nall,A,x\n", "group,method,seed\nall,A,1\n"]
)
def test_another_file_is_named_with_its_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "other.csv"
    file.write_text(text)
    with pytest.raises(RunError, match=r"other.csv, line 2: not the figures of a run"):
        read_figures(file, {("all", "A", 1): ""})
    with pytest.raises(RunError, match="cannot be read"):
        read_figures(tmp_path / "none.csv", {})
