"""The figures of a comparison as a csv file: a line a run, shares as fractions, nothing rounded."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedllm.errors import RunError
from fedllm.runs.measures import METRICS
from fedllm.runs.outcomes import SCALARS, Outcome, Scores

#: Columns of a stage, after its name.
_SCORES = (*METRICS, "worst", "gap")
_STAGES = ("tuned", "base", "majority", "elsewhere")
#: What says which run a line is of.
Key = tuple[str, str, int]


def figures_csv(outcomes: Sequence[Outcome]) -> str:
    """Return the csv file's text."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["group", "method", "seed", *(f"{s}_{n}" for s in _STAGES for n in _SCORES), *SCALARS])
    for run in outcomes:
        scores = (run.tuned, run.base, run.majority, run.elsewhere)
        found = [value for score in scores for value in (*score.means.values(), score.worst, score.gap)]
        writer.writerow([run.group, run.method, run.seed, *found, *(getattr(run, name) for name in SCALARS)])
    return text.getvalue()


def read_figures(file: Path, base_names: Mapping[Key, str]) -> list[Outcome]:
    """Return the outcomes that a csv file of :func:`figures_csv` holds.

    Parameters
    ----------
    file : Path
        Columns that its version did not have yet count as not measured.
    base_names : Mapping[Key, str]
        (group, method, seed) of each run that is wanted -> what its base is called. Other lines are left out.

    Raises
    ------
    RunError
        If the file cannot be read, naming the line that is wrong.
    """
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{file}: cannot be read ({error}).") from None
    found: dict[Key, Outcome] = {}
    for number, row in enumerate(rows, start=2):
        try:
            key = (row["group"], row["method"], int(row["seed"]))
            if key in base_names:
                found[key] = _outcome(row, key, base_names[key])
        except (KeyError, TypeError, ValueError):
            raise RunError(
                f"{file}, line {number}: not the figures of a run, as compare.csv has them."
            ) from None
    return [found[key] for key in base_names if key in found]


def _outcome(row: Mapping[str, str], key: Key, base_name: str) -> Outcome:
    def number(name: str) -> float | None:
        text = row.get(name)
        return float(text) if text else None

    def scores(stage: str) -> Scores:
        means = {name: number(f"{stage}_{name}") for name in METRICS}
        return Scores(means=means, worst=number(f"{stage}_worst"), gap=number(f"{stage}_gap"))

    tuned, base, majority, elsewhere = map(scores, _STAGES)
    group, method, seed = key
    return Outcome(
        group=group,
        method=method,
        seed=seed,
        tuned=tuned,
        base=base,
        majority=majority,
        elsewhere=elsewhere,
        bytes_up=float(row["bytes_up"]),
        bytes_down=float(row["bytes_down"]),
        bytes_total=int(row["bytes_total"]),
        epsilon=number("epsilon"),
        sites_epsilon=number("sites_epsilon"),
        seconds=float(row["seconds"]),
        base_name=base_name,
    )
