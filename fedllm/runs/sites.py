"""What the whole run was for each site: one summary a site, from the events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.runs.events import INTERVAL, QUALITY, Event
from fedllm.runs.metrics import mean, site_gap, worst_site

Scores = Mapping[str, float | None]
#: The majority class's metrics, of those in `QUALITY`.
MAJORITY = ("accuracy", "macro_f1")


@dataclass(frozen=True, kw_only=True)
class SiteSummary:
    """What the whole run was for one site; None stands for withheld or not measured.

    Attributes
    ----------
    base, final : Mapping[str, float or None]
        The untuned base's and the finished adapter's metrics, by the names in `QUALITY`.
    elsewhere : Mapping[str, float or None]
        Those of a site's own adapter on the records of the other sites, where each trains alone.
    majority : Mapping[str, float or None]
        Those of always answering the site's most frequent label.
    interval : tuple[float, float] or None
        95 % interval of the finished adapter, of the first metric of `judged_by`.
    heldout_epsilon : float or None
        Spent on private held-out records, where counts over them left with noise.
    """

    name: str
    majority: Scores
    base: Scores
    final: Scores
    elsewhere: Scores
    interval: tuple[float, float] | None
    records: int | None
    epsilon: float | None
    heldout_epsilon: float | None
    bytes_up: int
    bytes_down: int
    answered: int
    asked: int


def site_summaries(events: Iterable[Event]) -> list[SiteSummary]:
    """Return one summary a site, in the order of appearance.

    Bytes and epsilon count every reply, also those of rounds that a resume has repeated.
    """
    names: dict[str, None] = {}
    asked: dict[str, set[int]] = {}
    replies: dict[str, list[Event]] = {}
    evaluated: dict[tuple[str, str], Event] = {}
    for event in events:
        match event["event"]:
            case "site_joined":
                names.setdefault(event["site"])
            case "round_started":
                for site in event["sites"]:
                    names.setdefault(str(site))
                    asked.setdefault(str(site), set()).add(event["round"])
            case "site_reply":
                names.setdefault(event["site"])
                replies.setdefault(event["site"], []).append(event)
            case "evaluated":
                names.setdefault(event["site"])
                evaluated[event["site"], event["stage"]] = event
    return [
        _summary(
            name,
            replies.get(name, []),
            asked=asked.get(name, set()),
            base=evaluated.get((name, "base"), {}),
            final=evaluated.get((name, "final"), {}),
            elsewhere=evaluated.get((name, "elsewhere"), {}),
        )
        for name in names
    ]


def total(sites: Sequence[SiteSummary]) -> SiteSummary:
    """Return all sites as one: means of metrics, the largest epsilon, sums of the rest."""
    records = [site.records for site in sites if site.records is not None]
    return SiteSummary(
        name="All sites",
        majority=_means(MAJORITY, (site.majority for site in sites)),
        base=_means(QUALITY, (site.base for site in sites)),
        final=_means(QUALITY, (site.final for site in sites)),
        elsewhere=_means(QUALITY, (site.elsewhere for site in sites)),
        interval=None,
        records=sum(records) if records else None,
        epsilon=_largest(site.epsilon for site in sites),
        heldout_epsilon=_largest(site.heldout_epsilon for site in sites),
        bytes_up=sum(site.bytes_up for site in sites),
        bytes_down=sum(site.bytes_down for site in sites),
        answered=sum(site.answered for site in sites),
        asked=sum(site.asked for site in sites),
    )


def largest_epsilon(events: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the largest epsilon that replies and evaluations report, None where none does.

    An evaluation's counts what was booked for replies that came too late.
    """
    return _largest(event.get("epsilon") for event in events)


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How differently sites fare: the worst one, its value, and how far the best one is from it."""

    site: str
    worst: float
    gap: float


def spread(values: Mapping[str, float | None], *, best: str) -> Spread | None:
    """Return how far sites lie apart, None where fewer than two have a value.

    Parameters
    ----------
    values : Mapping[str, float or None]
        Site -> metric.
    best : {"highest", "lowest"}
        Which end of the metric is the good one.

    >>> spread({"a": 0.75, "b": 0.5, "c": None}, best="highest")
    Spread(site='b', worst=0.5, gap=0.25)
    """
    known = {site: value for site, value in values.items() if value is not None}
    if len(known) < 2:
        return None
    site, worst = worst_site(known, best=best)
    return Spread(site=site, worst=worst, gap=site_gap(known))


def _means(names: Sequence[str], scores: Iterable[Scores]) -> dict[str, float | None]:
    every = list(scores)
    return {name: mean(found[name] for found in every) for name in names}


def _summary(
    name: str, replies: Sequence[Event], *, asked: set[int], base: Event, final: Event, elsewhere: Event
) -> SiteSummary:
    either = {**base, **{key: value for key, value in final.items() if value is not None}}
    low, high = (final.get(key) for key in INTERVAL)
    return SiteSummary(
        name=name,
        majority={metric: either.get(f"majority_{metric}") for metric in MAJORITY},
        base={metric: base.get(metric) for metric in QUALITY},
        final={metric: final.get(metric) for metric in QUALITY},
        elsewhere={metric: elsewhere.get(metric) for metric in QUALITY},
        interval=None if low is None or high is None else (low, high),
        records=either.get("records"),
        epsilon=largest_epsilon([*replies, final]),
        heldout_epsilon=final.get("heldout_epsilon"),
        bytes_up=sum(reply["bytes_up"] for reply in replies),
        bytes_down=sum(reply["bytes_down"] for reply in replies),
        answered=len({reply["round"] for reply in replies if reply["accepted"]}),
        asked=len(asked | {reply["round"] for reply in replies}),
    )
