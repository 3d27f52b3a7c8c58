"""The picture of a comparison: a metric against the bytes of a whole run."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from fedllm.runs.measures import METRICS, UNTRAINED_HEAD, UNTUNED_BASE, Metric
from fedllm.runs.outcomes import PRIVATE_MAJORITY, Estimate, Row

DASHES: dict[str, Any] = {
    "chance": (0, (1, 4)),
    UNTUNED_BASE: (0, (1.2, 2)),
    UNTRAINED_HEAD: (0, (1.2, 2)),
    "majority class": (0, (4, 2, 1, 2)),
    PRIVATE_MAJORITY: (0, (4, 2, 1, 2, 1, 2)),
    "local only": (0, (6, 3)),
    "local only, elsewhere": (0, (6, 3, 1, 3)),
}
INK, ACCENT, MUTED, GRID = "#1d2126", "#17616a", "#5f6871", "#e2e4e7"
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "fedllm",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
#: Least distance of two names beside their lines, as a share of the panel's height.
NAME_GAP = 0.05
#: Points nearer than these shares of both axes, or with bars that overlap, are drawn side by side.
NEAR = (0.045, 0.05)
AXIS = (
    "bytes of a whole run: all sites, both directions (log scale; what would overlap is drawn side by side)"
)


def draw(rows: Sequence[Row], *, title: str, metric: str) -> Figure:
    """Draw the metric against the bytes of a whole run: a numbered point a method, a line a baseline.

    Groups get a panel each, two side by side, with the same vertical axis.
    """
    kind = METRICS[metric]
    shown = [row for row in rows if row.scores[metric] is not None]
    groups = list(dict.fromkeys(row.group for row in rows))
    methods = dict.fromkeys(row.method for row in shown if not row.is_line)
    numbers = {name: number for number, name in enumerate(methods, start=1)}
    across = min(len(groups), 2)
    height = math.ceil(len(groups) / across)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0 if across == 1 else 12.0, 1.2 + 4.2 * height), layout="constrained")
        panels = list(figure.subplots(height, across, sharey=True, squeeze=False).flat)
        low, high = _range([_height(row, metric) for row in shown], kind)
        for panel, group in zip(panels, groups, strict=False):
            panel.set_ylim(low, high)
            panel.set_title(group if len(groups) > 1 else "", loc="left", fontsize=11, fontweight="bold")
            mine = [row for row in shown if row.group == group]
            _lines(panel, [row for row in mine if row.is_line], metric)
            _points(panel, [row for row in mine if not row.is_line], metric, numbers)
        for panel in panels[len(groups) :]:
            panel.remove()
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.supxlabel(AXIS + _signs(shown), fontsize=9.5, linespacing=1.5)
        unit = f" ({kind.unit})" if kind.unit else ""
        figure.supylabel(f"held-out {kind.title}, mean over sites{unit}", fontsize=9.5)
        # a figure space is as wide as a digit
        names = [f"{number:\u2007>2}  {name}" for name, number in numbers.items()]
        handles = [Line2D([], [], linestyle="none") for _ in names]
        figure.legend(
            handles, names, loc="outside right center", frameon=False, handlelength=0, handletextpad=0
        )
    return figure


def picture(figure: Figure, kind: str) -> bytes:
    """Return a figure as an svg or png file."""
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def _height(row: Row, metric: str) -> Estimate:
    """Return where a row that has the metric stands in the picture."""
    score, scale = row.scores[metric], METRICS[metric].scale
    assert score is not None, "rows without it are not drawn"
    return Estimate(scale * score.mean, None if score.half is None else scale * score.half)


def _range(values: Sequence[Estimate], kind: Metric) -> tuple[float, float]:
    """Return limits that hold all intervals; of shares at least 10 points apart where 0 to 100 allows."""
    most, least = (100.0, 10.0) if kind.unit == "%" else (math.inf, 0.1)
    ends = [value.mean + sign * (value.half or 0) for value in values for sign in (-1, 1)] or [0, 10 * least]
    low, high = max(min(ends), 0), min(max(ends), most)
    margin = max(0.08 * (high - low), (least - (high - low)) / 2)
    return max(low - margin, -least / 10), min(high + margin, most + least / 10)


def _lines(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    """Draw a horizontal line a row, with its name in the right margin."""
    low, high = axes.get_ylim()
    at = 0.0
    for row in sorted(rows, key=lambda row: _height(row, metric).mean):
        value = _height(row, metric).mean
        dashes = DASHES.get(row.method, "-")
        axes.axhline(value, color=MUTED, linewidth=1.3, linestyle=dashes, zorder=1)
        height = (value - low) / (high - low)
        at = max(height, at + NAME_GAP)
        inside = axes.transAxes
        axes.plot([1, 1.025], [height, at], color=MUTED, linewidth=0.6, clip_on=False, transform=inside)
        name = f"{row.method} {value:.{METRICS[metric].digits}f}"
        axes.text(1.03, at, name, color=MUTED, va="center", fontsize=9, transform=inside)


def _signs(rows: Sequence[Row]) -> str:
    """Explain bars and hollow points where there are any."""
    signs = []
    if any(row.seeds > 1 for row in rows):
        signs.append("bars: 95 % interval over seeds")
    if any(row.is_private for row in rows):
        signs.append("hollow: private run")
    return "\n" + "; ".join(signs) if signs else ""


def _points(axes: Axes, rows: Sequence[Row], metric: str, numbers: Mapping[str, int]) -> None:
    """Draw a numbered point with its interval a row, hollow for private runs."""
    totals = [float(row.bytes_total or 1) for row in rows] or [1.0]
    wide = max(totals) > 20 * min(totals)
    axes.set_xscale("log")
    axes.set_xlim(min(totals) / 1.6, 1.6 * max(totals))
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7))
    heights = [_height(row, metric) for row in rows]
    for row, x, height in zip(rows, _side_by_side(totals, heights, axes), heights, strict=False):
        level = 3 + numbers[row.method]
        fill, edge = (ACCENT, "white") if not row.is_private else ("white", ACCENT)
        axes.errorbar(
            x,
            height.mean,
            yerr=height.half,
            color=ACCENT,
            linewidth=1.4,
            capsize=3,
            marker="o",
            markersize=12.5,
            markerfacecolor=fill,
            markeredgecolor=edge,
            zorder=level,
        )
        axes.annotate(
            str(numbers[row.method]),
            (x, height.mean),
            color=edge,
            ha="center",
            va="center_baseline",
            fontsize=7.5,
            fontweight="bold",
            zorder=level + 0.5,
        )


def _side_by_side(totals: Sequence[float], heights: Sequence[Estimate], axes: Axes) -> list[float]:
    """Move points apart that nearly coincide or whose bars overlap; return their bytes."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    step = NEAR[0] * math.log(right / left)
    moved = list(totals[: len(heights)])
    order = sorted(range(len(heights)), key=totals.__getitem__)
    for place, index in enumerate(order):
        for other in order[:place]:
            bars = (heights[index].half or 0.0) + (heights[other].half or 0.0)
            if abs(heights[index].mean - heights[other].mean) < max(bars, NEAR[1] * (high - low)):
                moved[index] = max(moved[index], moved[other] * math.exp(step))
    return moved
