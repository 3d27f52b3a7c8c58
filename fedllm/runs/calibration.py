"""How far a classifier's probabilities can be believed, as a report shows it."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from fedllm.config import Config
from fedllm.runs.charts import Plot
from fedllm.runs.events import CURVE, Event
from fedllm.runs.measures import base_name
from fedllm.runs.plots import Part, reliability_plot
from fedllm.runs.sites import SiteSummary, total
from fedllm.runs.wording import count, percent

#: Brier score and calibration error.
MEASURES = ("brier", "ece")


def calibration_rows(config: Config, sites: Sequence[SiteSummary]) -> list[tuple[str, tuple[str, ...]]]:
    """Return a row a site and one of their means: each of `MEASURES` of the base, then with the adapter.

    Returns
    -------
    list of (name, cells)
        The last one is of all sites; empty where nothing was measured or it was withheld.
    """
    if not config.data.labelled or not any(_measured(site) for site in sites):
        return []
    return [(site.name, _cells(site)) for site in (*sites, total(sites))]


def pooled_curve(events: Sequence[Event], stage: str) -> list[Part]:
    """Return the calibration curve of all sites' records together, from the newest evaluation of each.

    Returns
    -------
    list of (records, mean confidence, share of right answers)
        In order of confidence; ranges without a record are left out.
    """
    newest = {
        e["site"]: e["calibration"] for e in events if e["event"] == "evaluated" and e["stage"] == stage
    }
    curves = [curve for curve in newest.values() if curve is not None]
    pooled = []
    for place in range(0, CURVE, 3):
        parts = [curve[place : place + 3] for curve in curves]
        if records := sum(part[0] for part in parts):
            confidence, right = (sum(part[0] * part[n] for part in parts) / records for n in (1, 2))
            pooled.append((records, confidence, right))
    return pooled


def reliability_chart(config: Config, events: Sequence[Event]) -> Plot | None:
    """Return how sure the model was and how often right, all sites together; None where it is not known."""
    tuned, base = (pooled_curve(events, stage) for stage in ("final", "base"))
    if not tuned:
        return None
    title = "Confidence and right answers"
    said = "; ".join(
        f"{percent(confidence)} sure, {percent(right)} right of {count(round(records), 'record')}"
        for records, confidence, right in tuned
    )
    svg = reliability_plot(title, tuned=tuned, base=base, alt=f"{title}, with the finished adapter: {said}.")
    keys = (
        ("", "with the finished adapter"),
        ("second", base_name(config)),
        ("site", "as right as it is sure"),
    )
    return Plot(title, Markup(svg), keys=keys)


def _measured(site: SiteSummary) -> bool:
    return any(site.final[name] is not None for name in MEASURES)


def _cells(site: SiteSummary) -> tuple[str, ...]:
    values = [scores[name] for name in MEASURES for scores in (site.base, site.final)]
    return tuple("-" if value is None else f"{value:.3f}" for value in values)
