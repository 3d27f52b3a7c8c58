"""How far a classifier's probabilities can be believed, site by site, as a report shows it."""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.config import Config
from fedllm.runs.sites import SiteSummary, total

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


def _measured(site: SiteSummary) -> bool:
    return any(site.final[name] is not None for name in MEASURES)


def _cells(site: SiteSummary) -> tuple[str, ...]:
    values = [scores[name] for name in MEASURES for scores in (site.base, site.final)]
    return tuple("-" if value is None else f"{value:.3f}" for value in values)
