"""The table of a run, derived from its events and so rebuilt at any time."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from fedllm.config import Config
from fedllm.runs.events import QUALITY, Event, read_events
from fedllm.runs.folder import RunFolder, atomic_write, load_config

FEDERATION = "federation"
WITHHELD = "withheld"
COLUMNS = (
    "round",
    "site",
    "accepted",
    "reason",
    *QUALITY,
    "epsilon",
    "bytes_up",
    "bytes_down",
    "seconds",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one site (or the federation) did in one round.

    Attributes
    ----------
    accepted : int
        1 or 0 for a site, the number of accepted replies for the federation.
    loss, accuracy, macro_f1, and what follows them in `QUALITY` : float or None
        On held-out records; for the federation the plain mean over the sites that released them.
    epsilon : float or None
        Spent over all rounds so far; for the federation the largest.
    bytes_up, bytes_down : int
        As serialised; for the federation the sum.
    seconds : float or None
        Wall time; None while a round is not finished.
    """

    round: int
    site: str
    accepted: int
    reason: str
    loss: float | None
    accuracy: float | None
    macro_f1: float | None
    brier: float | None
    ece: float | None
    perplexity: float | None
    exact_match: float | None
    token_f1: float | None
    rouge_l: float | None
    unended: float | None
    epsilon: float | None
    bytes_up: int
    bytes_down: int
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class RoundMetrics:
    """The rows of one round: one a site, and the whole federation's."""

    round: int
    sites: tuple[Row, ...]
    federation: Row


def metrics_withheld(config: Config) -> bool:
    """Return whether sites of this run keep their held-out metrics to themselves."""
    noised = config.evaluation.noise_multiplier > 0 and config.federation.mode != "base"
    shown = config.data.heldout_public or noised
    return config.private_replies and not shown


def as_told(config: Config, events: Iterable[Event]) -> Config:
    """Return a run's settings with what its sites made of ``data.heldout_public``.

    Real sites decide by their own policies (``heldout_path``), whatever the recipe says: where metrics of
    a private run came that no noise was accounted for, the records they were measured on are public ones.
    Where others sent noised counts beside them, the run has both.
    """
    if not config.private_replies or config.data.heldout_public:
        return config
    seen = [event for event in events if event["event"] in ("site_reply", "evaluated")]
    clear = [event for event in seen if event.get("heldout_epsilon") is None]
    if not any(event.get(name) is not None for event in clear for name in QUALITY):
        return config
    noise = config.evaluation.noise_multiplier if len(clear) < len(seen) else 0.0
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, heldout_public=True),
        evaluation=dataclasses.replace(config.evaluation, noise_multiplier=noise),
    )


def measured(config: Config) -> tuple[str, ...]:
    """Return which of `QUALITY` a run's sites measure."""
    if config.data.labelled:
        return ("loss", "accuracy", "macro_f1", "brier", "ece")
    if config.train.objective == "dpo":
        return ("loss", "accuracy")
    written = ("exact_match", "token_f1", "rouge_l", "unended")
    return ("loss", "perplexity", *(written if config.evaluation.generate else ()))


def round_metrics(events: Iterable[Event]) -> list[RoundMetrics]:
    """Return the metrics of every round, in order.

    A round that starts again (after a resume) replaces its earlier attempt and all later rounds.
    """
    replies: dict[int, dict[str, Event]] = {}
    seconds: dict[int, float] = {}
    for event in events:
        match event["event"]:
            case "round_started":
                for number in [number for number in replies if number >= event["round"]]:
                    del replies[number]
                    seconds.pop(number, None)
            case "site_reply":
                replies.setdefault(event["round"], {})[event["site"]] = event
            case "round_finished":
                seconds[event["round"]] = event["seconds"]
    return [
        _round_metrics(number, list(replies[number].values()), seconds.get(number))
        for number in sorted(replies)
    ]


def write_metrics(folder: RunFolder) -> Path:
    """Write ``metrics.csv`` anew from the events.

    Raises
    ------
    RunError
        If settings or events cannot be read, or the table cannot be written.
    """
    events = read_events(folder)
    config = as_told(load_config(folder), events)
    withheld = measured(config) if metrics_withheld(config) else ()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for metrics in round_metrics(events):
        for row in (*metrics.sites, metrics.federation):
            writer.writerow(_cells(row, withheld if row.accepted else ()))
    atomic_write(folder.metrics_file, text.getvalue().encode("utf-8", "replace"))
    return folder.metrics_file


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there, or None when there are none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def worst_site(values: Mapping[str, float], *, best: str = "highest") -> tuple[str, float]:
    """Return the site that fares worst, and its value; of equal ones the first by name.

    Parameters
    ----------
    values : Mapping[str, float]
        Site -> metric; not empty.
    best : {"highest", "lowest"}
        Which end of the metric is the good one; a loss's is the lowest.

    >>> worst_site({"b": 0.5, "a": 0.5, "c": 0.9}), worst_site({"a": 1.0, "b": 2.0}, best="lowest")
    (('a', 0.5), ('b', 2.0))
    """
    sign = 1 if best == "highest" else -1
    name = min(sorted(values), key=lambda site: sign * values[site])
    return name, values[name]


def site_gap(values: Mapping[str, float]) -> float:
    """Return the distance of the best site from the worst.

    >>> site_gap({"a": 0.5, "b": 0.75})
    0.25
    """
    return max(values.values()) - min(values.values())


def _round_metrics(number: int, replies: Sequence[Event], seconds: float | None) -> RoundMetrics:
    sites = tuple(
        Row(
            round=number,
            site=reply["site"],
            accepted=int(reply["accepted"]),
            reason=reply["reason"],
            **{name: reply[name] for name in QUALITY},
            epsilon=reply["epsilon"],
            bytes_up=reply["bytes_up"],
            bytes_down=reply["bytes_down"],
            seconds=reply["seconds"],
        )
        for reply in replies
    )
    used = [row for row in sites if row.accepted]
    federation = Row(
        round=number,
        site=FEDERATION,
        accepted=len(used),
        reason="",
        **{name: mean(vars(row)[name] for row in used) for name in QUALITY},
        epsilon=max((row.epsilon for row in sites if row.epsilon is not None), default=None),
        bytes_up=sum(row.bytes_up for row in sites),
        bytes_down=sum(row.bytes_down for row in sites),
        seconds=seconds,
    )
    return RoundMetrics(round=number, sites=sites, federation=federation)


def _cells(row: Row, withheld: Collection[str]) -> list[object]:
    """Return a row's cells; a reply that was set aside withheld nothing, its metrics are empty."""
    found = {name: vars(row)[name] for name in QUALITY}
    metrics = [
        (WITHHELD if name in withheld else "") if value is None else value for name, value in found.items()
    ]
    rest = [
        "" if value is None else value for value in (row.epsilon, row.bytes_up, row.bytes_down, row.seconds)
    ]
    return [row.round, _plain_text(row.site), row.accepted, _plain_text(row.reason), *metrics, *rest]


def _plain_text(text: str) -> str:
    """Keep a spreadsheet from reading another party's text as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
