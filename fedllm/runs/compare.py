"""Finished runs side by side: one table over seeds, one picture of quality against bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from matplotlib.ticker import EngFormatter

from fedllm.runs.compare_picture import draw, picture
from fedllm.runs.figures import figures_csv
from fedllm.runs.folder import atomic_write
from fedllm.runs.manifest import versions
from fedllm.runs.measures import METRICS, Metric
from fedllm.runs.outcomes import Estimate, Outcome, Row, make_rows

#: Metrics that a table shows together.
_TABLES = (("accuracy", "macro_f1"), ("exact_match", "token_f1", "rouge_l"), ("loss",))
NOTE = (
    "Held-out records; mean over sites, then mean over seeds ± half of the 95 % interval (Student t; none "
    "for one seed). Worst site: {end} {metric} of a site; gap: how far the best site is from it; both mean "
    "over seeds. Up, down: bytes a site sends and gets in a round. Run total: all sites, both directions, "
    "one-off traffic included. Elsewhere: each site's own adapter on pooled records of the others. "
    "Epsilon: largest of all sites and seeds. Private sites drop no repeated "
    "record: what is held out there, and its majority class, can differ a little."
)


def shown_metrics(metric: str) -> tuple[str, ...]:
    """Return the metrics of a table: the compared one and those of its kind."""
    return next(names for names in _TABLES if metric in names)


def columns(metric: str) -> tuple[str, ...]:
    """Return a table's heads."""
    return (
        "group",
        "method",
        "seeds",
        *(METRICS[name].heading for name in shown_metrics(metric)),
        f"worst site {METRICS[metric].unit}".strip(),
        "gap",
        "up",
        "down",
        "run total",
        "epsilon",
        "seconds",
    )


def row_cells(row: Row, metric: str) -> list[str]:
    """Return a row's texts in the order of :func:`columns`."""

    def score(value: Estimate | None, kind: Metric) -> str:
        if value is None:
            # what stands beside a metric that was sent was not withheld, but never measured
            kept = row.is_private and not any(row.scores.values())
            return "withheld" if kept else "-"
        half = "" if value.half is None else f" ± {kind.scale * value.half:.{kind.digits}f}"
        return f"{kind.scale * value.mean:.{kind.digits}f}{half}"

    traffic = EngFormatter(unit="B", places=1)
    return [
        row.group,
        row.method,
        str(row.seeds or "-"),
        *(score(row.scores[name], METRICS[name]) for name in shown_metrics(metric)),
        *(
            score(None if value is None else Estimate(value, None), METRICS[metric])
            for value in (row.worst, row.gap)
        ),
        *("-" if n is None else traffic(n) for n in (row.bytes_up, row.bytes_down, row.bytes_total)),
        _epsilon(row),
        "-" if row.seconds is None else f"{row.seconds:.0f}",
    ]


def _epsilon(row: Row) -> str:
    parts = [] if row.epsilon is None else [f"{row.epsilon:.2f}"]
    if row.sites_epsilon is not None:
        parts.append(f"{row.sites_epsilon:.2f} (whole sites)")
    return ", ".join(parts) or "none"


def write_comparison(
    folder: Path,
    outcomes: Sequence[Outcome],
    *,
    title: str,
    metric: str,
    baselines: Iterable[str],
    chance: Mapping[str, float] | None = None,
    missing: Sequence[str],
    aside: Sequence[str] = (),
    source: bytes,
    digests: Mapping[str, str],
) -> list[Row]:
    """Write table, picture and manifest of a comparison, and return the table's rows.

    Parameters
    ----------
    folder : Path
        Gets compare.md, compare.csv, compare.svg, compare.png, comparison.toml and manifest.json.
    outcomes : Sequence[Outcome]
        Its finished runs, at least one.
    title, metric : str
        The picture's title and the metric it shows, a key of `METRICS`.
    baselines : Iterable[str]
        Which of ``base`` and ``majority`` to show.
    chance : Mapping[str, float], optional
        Group -> accuracy of guessing among its labels, where it is to be shown.
    missing : Sequence[str]
        Runs that are not there; the table's page names them.
    aside : Sequence[str]
        Runs and their sites of which replies were set aside; the page names them, too.
    source : bytes
        The comparison's file.
    digests : Mapping[str, str]
        Run -> sha256 of its settings, as in that run's own manifest.

    Raises
    ------
    RunError
        If a file cannot be written.
    """
    rows = make_rows(outcomes, baselines=set(baselines), chance=chance)
    figure = draw(rows, title=title, metric=metric)
    manifest = {
        "schema": 1,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "config_sha256": dict(digests),
    }
    files = {
        "compare.md": _markdown(rows, title=title, metric=metric, missing=missing, aside=aside).encode(),
        "compare.csv": figures_csv(outcomes).encode(),
        "compare.svg": picture(figure, "svg"),
        "compare.png": picture(figure, "png"),
        "comparison.toml": source,
        "manifest.json": json.dumps(manifest, indent=2).encode() + b"\n",
    }
    for name, data in files.items():
        atomic_write(folder / name, data)
    return rows


def _markdown(
    rows: Sequence[Row], *, title: str, metric: str, missing: Sequence[str], aside: Sequence[str]
) -> str:
    heads, kind = columns(metric), METRICS[metric]
    lines = [f"# {title}", "", _line(heads), _line(["---", "---", *["---:"] * (len(heads) - 2)])]
    lines += [_line(row_cells(row, metric)) for row in rows]
    end = "lowest" if kind.best == "highest" else "highest"
    lines += ["", NOTE.format(metric=kind.title, end=end), "", "![The picture](compare.png)"]
    if missing:
        lines += ["", f"Not finished: {'; '.join(missing)}."]
    if aside:
        lines += ["", f"Not all sites took part throughout; replies were set aside: {'; '.join(aside)}."]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
