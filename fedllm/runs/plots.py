"""The report's plots: small SVGs whose colours are the page's CSS variables.

Drawn in placeholder colours that are then replaced by variables, so that one drawing suits light
and dark. Text stays text; names of sites stand only in escaped ``<title>`` elements.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, MaxNLocator, PercentFormatter, ScalarFormatter

from fedllm.errors import RunError

Values = Sequence[float | None]
#: Records, mean confidence and share of right answers of one range of confidence.
Part = tuple[float, float, float]

TEXT, GRID, SITE, MAIN, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {
    TEXT: "var(--muted)",
    GRID: "var(--line)",
    SITE: "var(--site)",
    MAIN: "var(--accent)",
    SECOND: "var(--second)",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedllm",
    "font.size": 9.5,
    "text.color": TEXT,
    "axes.edgecolor": GRID,
    "axes.labelcolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "xtick.labelcolor": TEXT,
    "ytick.color": GRID,
    "ytick.labelcolor": TEXT,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}
#: Inches at 72 points: close to the width of a phone, so that text keeps its size there.
SIZE = (4.4, 2.6)
MARKED_ROUNDS = 40
THICK_SITES = 16


def metric_plot(
    name: str,
    *,
    rounds: Sequence[int],
    sites: Mapping[str, Values],
    mean: Values,
    share: bool = False,
    alt: str = "",
) -> str:
    """Draw a metric a round: one thin line a site and the thick mean.

    Parameters
    ----------
    name : str
        What is drawn; ids inside the picture begin with it.
    rounds : Sequence[int]
        The rounds, R of them.
    sites : Mapping[str, Values]
        Site -> R values, None where there is none.
    mean : Values
        R values of the federation.
    share : bool
        Show values as percentages.
    alt : str
        What is to be seen, for screen readers; empty: the name.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    formatter = PercentFormatter(1.0, decimals=0) if share else ScalarFormatter(useOffset=False)
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(rounds, formatter)
        _site_lines(axes, rounds, sites)
        _line(axes, rounds, mean, color=MAIN, linewidth=2.6, zorder=3)
        if share:
            axes.set_ylim(bottom=0)
        return _svg(figure, name, list(sites), alt)


def epsilon_plot(
    name: str, *, rounds: Sequence[int], sites: Mapping[str, Values], budget: float | None, alt: str = ""
) -> str:
    """Draw the epsilon each site has spent after each round, and the budget as a dashed line."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(rounds, ScalarFormatter(useOffset=False))
        _site_lines(axes, rounds, sites)
        if budget is not None:
            axes.axhline(budget, color=SECOND, linewidth=1.6, linestyle=(0, (4, 3)))
        axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
        return _svg(figure, name, list(sites), alt)


def bytes_plot(
    name: str, *, rounds: Sequence[int], up: Sequence[int], down: Sequence[int], alt: str = ""
) -> str:
    """Draw the bytes all sites together sent up and received a round: bars, or lines over many rounds."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(rounds, EngFormatter(unit="B"))
        if len(rounds) <= MARKED_ROUNDS:
            axes.bar([number - 0.2 for number in rounds], up, width=0.36, color=MAIN)
            axes.bar([number + 0.2 for number in rounds], down, width=0.36, color=SECOND)
        else:
            _line(axes, rounds, down, color=SECOND, linewidth=3.2)
            _line(axes, rounds, up, color=MAIN, linewidth=1.2)
            axes.set_ylim(bottom=0)
        return _svg(figure, name, [], alt)


def bounds_plot(name: str, bounds: Sequence[tuple[str, float, float]], *, alt: str = "") -> str:
    """Draw what audits prove beside what the accountant says: one pair of bars an audit.

    Parameters
    ----------
    bounds : sequence of (name, epsilon by the accountant, lower bound)
        From the top down.
    """
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(SIZE[0], 0.9 + 0.5 * len(bounds)), layout="constrained")
        axes = figure.add_subplot()
        places = range(len(bounds), 0, -1)
        axes.barh([place + 0.19 for place in places], [t for _, t, _ in bounds], height=0.34, color=MAIN)
        axes.barh([place - 0.19 for place in places], [b for _, _, b in bounds], height=0.34, color=SECOND)
        axes.set_yticks(list(places), [label for label, _, _ in bounds])
        axes.set_xlabel("epsilon")
        return _svg(figure, name, [], alt)


def reliability_plot(name: str, *, tuned: Sequence[Part], base: Sequence[Part], alt: str = "") -> str:
    """Draw the share of right answers against confidence; a point is as large as its share of the records.

    Parameters
    ----------
    tuned, base : sequence of (records, mean confidence, share of right answers)
        With the finished adapter and of the base, in order of confidence; empty: not drawn.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0], 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=SITE, linewidth=1.1)
        for parts, colour, width in ((base, SECOND, 1.4), (tuned, MAIN, 2.2)):
            records = sum(part[0] for part in parts)
            confidence, right = [part[1] for part in parts], [part[2] for part in parts]
            axes.plot(confidence, right, color=colour, linewidth=width)
            sizes = [8 + 140 * part[0] / records for part in parts]
            axes.scatter(confidence, right, s=sizes, color=colour, clip_on=False, zorder=3)
        axes.set_xlabel("mean confidence")
        axes.set_ylabel("right answers")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=5))
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        return _svg(figure, name, [], alt)


def save_epsilon_picture(path: Path, curves: Mapping[str, Sequence[float]], *, limit: float) -> None:
    """Write a picture of the epsilon in all after each booked round, a line a site and data set.

    Raises
    ------
    RunError
        If the file cannot be written, or its ending names no kind of picture.
    """
    figure = Figure(figsize=(6.4, 3.8), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    for name, values in curves.items():
        axes.step([0, *range(1, len(values) + 1)], [0.0, *values], where="post", label=name)
    if limit < 1e9:
        axes.axhline(limit, color="0.4", linestyle="--", label=f"budget {limit:g}")
    axes.set_xlabel("round booked")
    axes.set_ylabel("epsilon")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", linewidth=0.4)
    axes.legend(fontsize=8, frameon=False)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: the picture cannot be written ({error}).") from None


def _axes(rounds: Sequence[int], formatter: Formatter) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("round")
    axes.set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(formatter)
    return figure, axes


def _site_lines(axes: Axes, rounds: Sequence[int], sites: Mapping[str, Values]) -> None:
    width = 1.1 if len(sites) <= THICK_SITES else 0.5
    for index, values in enumerate(sites.values()):
        _line(axes, rounds, values, color=SITE, linewidth=width, gid=f"site-{index}")


def _line(axes: Axes, rounds: Sequence[int], values: Values, **style: str | float) -> None:
    heights = [float("nan") if value is None else value for value in values]
    marker = "o" if len(rounds) <= MARKED_ROUNDS else ""
    axes.plot(rounds, heights, marker=marker, markersize=2.5, **style)  # type: ignore[arg-type]


def _svg(figure: Figure, name: str, titles: Sequence[str], alt: str) -> str:
    """Return the figure as one element that fits its container and shares no id with another."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    prefix = re.sub(r"\W+", "-", name.lower())
    for reference in ('id="', "url(#", 'href="#'):
        text = text.replace(reference, f"{reference}{prefix}-")
    for index, title in enumerate(titles):
        group = f'<g id="{prefix}-site-{index}">'
        text = text.replace(group, f"{group}<title>{escape(title)}</title>")
    head, _, body = text[text.index("<svg") :].partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, "matplotlib writes a viewBox"
    return f'<svg {box[0]} role="img" aria-label="{escape(alt or name)}">{body}'
