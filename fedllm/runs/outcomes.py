"""What finished runs measured, side by side: a row a method over its seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from statistics import fmean, stdev

from scipy.stats import t as student

from fedllm.runs.events import Event, read_events
from fedllm.runs.folder import RunFolder, load_config
from fedllm.runs.measures import METRICS, UNTRAINED_HEAD, UNTUNED_BASE, base_name
from fedllm.runs.metrics import mean, site_gap, worst_site
from fedllm.runs.sites import largest_epsilon
from fedllm.runs.whole_sites import whole_sites_spent

#: Key in a comparison's ``[baselines]`` -> name in table and picture, and the line's dashes there.
BASELINES = {
    "chance": "chance",
    "base": UNTUNED_BASE,
    "majority": "majority class",
    "local": "local only",
    "central": "central",
}
#: Where private runs have other held-out records than the rest: they drop no repeated one.
PRIVATE_MAJORITY = "majority class, private runs"
#: What follows a method's name where sites train each alone, and are judged on the records of the others.
ELSEWHERE = ", elsewhere"
#: What is a line in the picture and no method; encoders have a base of another name.
LINES = (*BASELINES.values(), UNTRAINED_HEAD, PRIVATE_MAJORITY, f"{BASELINES['local']}{ELSEWHERE}")
SCALARS = ("bytes_up", "bytes_down", "bytes_total", "epsilon", "sites_epsilon", "seconds")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Held-out metrics of one run; None where they were withheld or not measured.

    Attributes
    ----------
    means : Mapping[str, float or None]
        Key of `METRICS` -> mean over sites.
    worst : float or None
        The compared metric at the site that fares worst.
    gap : float or None
        How far the best site is from it; None for one site.
    """

    means: Mapping[str, float | None]
    worst: float | None
    gap: float | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one finished run measured.

    Attributes
    ----------
    tuned, base, majority, elsewhere : Scores
        With the finished adapter, of the untuned base, of each site's majority class, and, where each trains
        alone, of its adapter at the other sites.
    bytes_up, bytes_down : float
        What a site sends and gets in a round, mean over sites and rounds.
    bytes_total : int
        All sites, both directions, one-off traffic included.
    epsilon : float or None
        Largest of all sites; None in a run without privacy for records.
    sites_epsilon : float or None
        Of whole sites, towards those who get the adapter; None where that is not promised.
    seconds : float
        Of work, also before a resume.
    base_name : str
        What the base is called: an encoder's has an untrained head.
    """

    group: str
    method: str
    seed: int
    tuned: Scores
    base: Scores
    majority: Scores
    elsewhere: Scores
    bytes_up: float
    bytes_down: float
    bytes_total: int
    epsilon: float | None
    sites_epsilon: float | None
    seconds: float
    base_name: str

    @property
    def is_private(self) -> bool:
        """Return whether records or whole sites were protected."""
        return self.epsilon is not None or self.sites_epsilon is not None


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % interval (None for one seed)."""

    mean: float
    half: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method in one group, over its seeds; None stands for withheld or not applicable."""

    group: str
    method: str
    seeds: int
    scores: Mapping[str, Estimate | None]
    worst: float | None
    gap: float | None
    bytes_up: float | None = None
    bytes_down: float | None = None
    bytes_total: float | None = None
    epsilon: float | None = None
    sites_epsilon: float | None = None
    seconds: float | None = None

    @property
    def is_private(self) -> bool:
        """Return whether records or whole sites were protected."""
        return self.epsilon is not None or self.sites_epsilon is not None

    @property
    def is_line(self) -> bool:
        """Return whether the picture shows a horizontal line: a baseline, or nothing was sent."""
        return self.method in LINES or not self.bytes_total


def read_outcome(folder: RunFolder, *, group: str, method: str, seed: int, metric: str) -> Outcome:
    """Read what a finished run measured from its events.

    Raises
    ------
    RunError
        If settings or events cannot be read.
    """
    events = read_events(folder)
    replies = [event for event in events if event["event"] == "site_reply"]
    # a round's event repeats the sum of its replies
    counted = [e for e in events if "bytes_up" in e and "bytes_down" in e and e["event"] != "round_finished"]
    whole = whole_sites_spent(events)
    return Outcome(
        group=group,
        method=method,
        seed=seed,
        tuned=_scores(events, "final", metric),
        base=_scores(events, "base", metric),
        majority=_scores(events, "final", metric, prefix="majority_"),
        elsewhere=_scores(events, "elsewhere", metric),
        bytes_up=mean(reply["bytes_up"] for reply in replies) or 0.0,
        bytes_down=mean(reply["bytes_down"] for reply in replies) or 0.0,
        bytes_total=sum(event["bytes_up"] + event["bytes_down"] for event in counted),
        epsilon=largest_epsilon(event for event in events if event["event"] in ("site_reply", "evaluated")),
        sites_epsilon=None if whole is None else whole.outsiders,
        seconds=_seconds(events),
        base_name=base_name(load_config(folder)),
    )


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Return mean and 95 % interval of the values that are there, or None when there are none.

    >>> estimate([0.5, 0.5, 0.5])
    Estimate(mean=0.5, half=0.0)
    """
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return Estimate(known[0], None) if known else None
    quantile = float(student.ppf(0.975, len(known) - 1))
    return Estimate(fmean(known), quantile * stdev(known) / math.sqrt(len(known)))


def make_rows(
    outcomes: Sequence[Outcome], *, baselines: Iterable[str], chance: Mapping[str, float] | None = None
) -> list[Row]:
    """Return a row for each group and method, in order, after the group's base and majority class.

    A method whose sites train each alone has a second one, of their adapters at the other sites.

    Parameters
    ----------
    outcomes : Sequence[Outcome]
        Finished runs, in the order of the table.
    baselines : Iterable[str]
        ``base`` and ``majority`` where wanted; each seed's comes from its first run that has it. Private runs
        have a majority class of their own where it differs.
    chance : Mapping[str, float], optional
        Group -> accuracy of guessing among its labels.
    """
    rows = []
    for group in dict.fromkeys(outcome.group for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.group == group]
        if chance and group in chance:
            means = {**dict.fromkeys(METRICS), "accuracy": chance[group]}
            guessed = Scores(means=means, worst=chance[group], gap=0.0)
            rows.append(replace(_row(group, BASELINES["chance"], [guessed]), seeds=0))
        if "base" in baselines:
            for name in dict.fromkeys(outcome.base_name for outcome in mine):
                found = _by_seed((run.seed, run.base) for run in mine if run.base_name == name)
                rows += [_row(group, name, list(found.values()))] if found else []
        if "majority" in baselines:
            every = _by_seed((run.seed, run.majority) for run in mine)
            private = _by_seed((run.seed, run.majority) for run in mine if run.is_private)
            rows += [_row(group, BASELINES["majority"], list(every.values()))] if every else []
            if any(scores != every[seed] for seed, scores in private.items()):
                rows.append(_row(group, PRIVATE_MAJORITY, list(private.values())))
        for method in dict.fromkeys(outcome.method for outcome in mine):
            runs = [outcome for outcome in mine if outcome.method == method]
            scalars = {name: [getattr(run, name) for run in runs] for name in SCALARS}
            spent = {
                name: max((value for value in scalars.pop(name) if value is not None), default=None)
                for name in ("epsilon", "sites_epsilon")
            }
            # what a baseline sent, its evaluation alone, is no price of the method
            means = {
                name: mean(values)
                for name, values in scalars.items()
                if method not in LINES or name == "seconds"
            }
            rows.append(_row(group, method, [run.tuned for run in runs], **spent, **means))
            abroad = _by_seed((run.seed, run.elsewhere) for run in runs)
            if abroad:
                rows.append(_row(group, f"{method}{ELSEWHERE}", list(abroad.values()), **spent))
    return rows


def _by_seed(found: Iterable[tuple[int, Scores]]) -> dict[int, Scores]:
    """Return each seed's first scores that were measured."""
    first: dict[int, Scores] = {}
    for seed, scores in found:
        if any(value is not None for value in scores.means.values()):
            first.setdefault(seed, scores)
    return first


def _scores(events: Sequence[Event], stage: str, metric: str, *, prefix: str = "") -> Scores:
    """Return a stage's means over sites; of a site evaluated twice, after a resume, the newest counts."""
    newest = {e["site"]: e for e in events if e["event"] == "evaluated" and e["stage"] == stage}
    # the majority class has no loss and writes no answer
    found = {name: {s: event.get(f"{prefix}{name}") for s, event in newest.items()} for name in METRICS}
    known = {site: value for site, value in found[metric].items() if value is not None}
    return Scores(
        means={name: mean(values.values()) for name, values in found.items()},
        worst=worst_site(known, best=METRICS[metric].best)[1] if known else None,
        gap=site_gap(known) if len(known) > 1 else None,
    )


def _seconds(events: Sequence[Event]) -> float:
    """Return the last session's seconds, plus those from first to last event of earlier ones."""
    total = sum(event["seconds"] for event in events if event["event"] == "run_finished")
    starts = [place for place, event in enumerate(events) if event["event"] == "run_resumed"]
    for begin, end in zip([0, *starts], starts, strict=False):
        first, last = events[begin]["time"], events[max(begin, end - 1)]["time"]
        total += (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()
    return float(total)


def _row(group: str, method: str, scores: Sequence[Scores], **rest: float | None) -> Row:
    return Row(
        group=group,
        method=method,
        seeds=len(scores),
        scores={name: estimate(score.means[name] for score in scores) for name in METRICS},
        worst=mean(score.worst for score in scores),
        gap=mean(score.gap for score in scores),
        **rest,
    )
