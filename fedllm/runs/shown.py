"""What trackers are shown of a run: settings, a round's numbers, and the final evaluation's means."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fedllm.config import Config
from fedllm.runs.events import QUALITY, Event
from fedllm.runs.metrics import RoundMetrics
from fedllm.runs.sites import site_summaries, total
from fedllm.settings import PATHS, Scalar

NUMBERS = ("accepted", "epsilon", "bytes_up", "bytes_down", "seconds")
_FORBIDDEN = re.compile(r"[^\w. -]|^\.+")


def shown_settings(config: Config) -> dict[str, Scalar]:
    """Return all settings that name no file or folder of this machine."""
    return {key: value for key, value in config.to_flat().items() if key not in PATHS}


def shown_values(metrics: RoundMetrics) -> dict[str, float]:
    """Return a round's numbers: ``federation/loss``, and ``loss/north`` for a site called north.

    What a site withheld or did not measure is absent.
    """
    rows = {"federation/{}": metrics.federation}
    rows |= {f"{{}}/{_FORBIDDEN.sub('_', row.site)}": row for row in metrics.sites}
    return {
        place.format(name): float(value)
        for place, row in rows.items()
        for name in (*QUALITY, *NUMBERS)
        if (value := vars(row)[name]) is not None
    }


def final_values(events: Iterable[Event]) -> dict[str, float]:
    """Return the final evaluation's means over sites: ``final/loss``, and ``base/loss`` without the adapter.

    ``elsewhere/loss`` is that of sites' own adapters at the other sites, where each trains alone. What the
    sites withheld or did not measure is absent.
    """
    mean = total(site_summaries(events))
    return {
        f"{stage}/{name}": value
        for stage, scores in (("final", mean.final), ("base", mean.base), ("elsewhere", mean.elsewhere))
        for name, value in scores.items()
        if value is not None
    }
