"""A run in plain words, for people who decide about it and train no models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedllm.adapters import METHODS
from fedllm.config import Config
from fedllm.runs.events import Event
from fedllm.runs.measures import UNTRAINED_HEAD, Metric, base_name, judged_by
from fedllm.runs.metrics import metrics_withheld
from fedllm.runs.privacy_text import NOTHING_TRAINED, best_guess
from fedllm.runs.sites import SiteSummary, spread, total
from fedllm.runs.traffic import totals, traffic
from fedllm.runs.whole_sites import towards, whole_sites_spent
from fedllm.runs.wording import count, duration, moment, percent, size

STATUS = {
    "run_started": "running",
    "run_resumed": "running",
    "run_finished": "finished",
    "run_failed": "failed",
}
#: Fewer scored records a site than this, and one record is a point or more of accuracy.
FEW_RECORDS = 100

#: Source -> what a board calls its records.
TEXTS = {
    "icd10": "descriptions of ICD-10-CM codes",
    "mcc": "descriptions of merchant categories",
    "file": "records from files",
}
AT_RANDOM = "An untrained head answers at random: the most frequent label is what has to be beaten."


@dataclass(frozen=True)
class Answer:
    """A question somebody on a board asks, and the answer in sentences."""

    question: str
    sentences: tuple[str, ...]


def status_of(events: Sequence[Event]) -> str:
    """Return ``not started``, ``running``, ``finished`` or ``failed``."""
    return next((STATUS[e["event"]] for e in reversed(events) if e["event"] in STATUS), "not started")


def last(events: Sequence[Event], name: str) -> Event | None:
    """Return the newest event of a name, or None."""
    return next((event for event in reversed(events) if event["event"] == name), None)


def summarise(config: Config, events: Sequence[Event], sites: Sequence[SiteSummary]) -> list[Answer]:
    """Answer what was trained, whether it helped, what left the sites and what was promised.

    Parameters
    ----------
    config : Config
        The settings of the run.
    events : Sequence[Event]
        Its events, oldest first.
    sites : Sequence[SiteSummary]
        What it was for each site.
    """
    return [
        Answer("What was trained, and by whom?", _trained(config, events)),
        Answer("Did it help?", _helped(config, events, sites)),
        Answer("What left the sites?", _left(config, events)),
        Answer("What privacy was promised?", _promised(config, events, sites)),
        Answer("What is not protected?", _open(config)),
    ]


def _trained(config: Config, events: Sequence[Event]) -> tuple[str, ...]:
    started, joined = last(events, "run_started"), last(events, "site_joined")
    kind = "simulated site" if joined is not None and joined["simulated"] else "site"
    # real sites have files of their own, whatever the recipe names
    source = "file" if joined is not None and not joined["simulated"] else config.data.source
    by = count(started["sites"] if started else config.federation.sites, kind)
    rounds = count(started["rounds"] if started else config.federation.rounds, "round")
    records = {**TEXTS, "hub": config.data.name}.get(source, f"{source} records")
    if config.federation.mode == "base":
        measured = f"the untuned language model {config.model.called} was measured on held-out {records}"
        return (f"Nothing: {measured} of {by}. This is a baseline.", *_outcome(events))
    together = {
        "federated": f"{by} trained together over {rounds}",
        "local": f"{by} trained over {rounds}, each alone: this is a baseline",
        "central": f"The pooled records of {by} trained it over {rounds}: this is a baseline",
    }[config.federation.mode]
    method = METHODS[config.adapter.method].title
    replies = [event for event in events if event["event"] == "site_reply"]
    used = sum(event["accepted"] for event in replies)
    return (
        f"A small addition (adapter: {method}, rank {config.adapter.rank}) to the language model "
        f"{config.model.called}, on {records}. The model itself was not changed.",
        f"{together}.",
        *_outcome(events),
        *((f"{used} of {count(len(replies), 'reply', 'replies')} were used.",) if replies else ()),
    )


def _outcome(events: Sequence[Event]) -> tuple[str, ...]:
    resumed = [str(event["round"]) for event in events if event["event"] == "run_resumed"]
    again = (f"It was resumed at round {', '.join(resumed)}.",) if resumed else ()
    finished, failed = last(events, "run_finished"), last(events, "run_failed")
    match status_of(events):
        case "finished" if finished is not None:
            return (f"The run finished after {duration(finished['seconds'])}.", *again)
        case "failed" if failed is not None:
            return (f"The run failed: {failed['reason']}", *again)
        case "running":
            when = moment(events[-1]["time"])
            return (f"No end is recorded: the run is under way or was stopped. Last event: {when}.", *again)
        case _:
            return ("The run has not started.",)


def _helped(config: Config, events: Sequence[Event], sites: Sequence[SiteSummary]) -> tuple[str, ...]:
    if metrics_withheld(config):
        return (
            "This page cannot say: held-out records are private, and their results stay at the sites. "
            "Each site can measure the adapter on its own records.",
        )
    name, metric = next(iter(judged_by(config).items()))
    mean = total(sites)
    final, base, majority = mean.final[name], mean.base[name], mean.majority.get(name)
    untrained = base_name(config) == UNTRAINED_HEAD
    constant = "" if majority is None else f", most frequent label {metric.text(majority)}"
    direction = "" if metric.best == "highest" else " (lower is better)"
    if config.federation.mode == "base" and base is not None:
        untuned = f"{base_name(config)} {metric.text(base)}{constant}{direction}"
        return (f"Nothing was trained. Mean {metric.title} on held-out records: {untuned}.",)
    if final is None or base is None or (untrained and majority is None):
        if sites and status_of(events) == "finished":
            return ("This page cannot say: no held-out records were scored.",)
        return ("Not measured yet: base and finished adapter are compared at the end of a run.",)
    against = {}
    if not untrained:
        against["the untuned base"] = _against(sites, metric, name, lambda site: site.base[name])
    against["always answering a site's most frequent label"] = _against(
        sites, metric, name, lambda site: site.majority.get(name)
    )
    over_base = None if untrained else metric.gain(final, base)
    over_majority = None if majority is None else metric.gain(final, majority)
    return (
        _verdict(over_base, over_majority),
        *_doubt(sites, metric, [gain for gain in (over_base, over_majority) if gain is not None]),
        f"Mean {metric.title} on held-out records: tuned {metric.text(final)}, "
        f"{base_name(config)} {metric.text(base)}{constant}{direction}.",
        *((AT_RANDOM,) if untrained else ()),
        *(
            f"Against {other} it was better at {better} of {count(measured, 'site')}{_rest(equal, worse)}."
            for other, (better, equal, worse) in against.items()
            if (measured := better + equal + worse)
        ),
        *_fairness(sites, metric, name),
        *_elsewhere(mean, metric, name),
        *_chance(sites, metric),
    )


def _fairness(sites: Sequence[SiteSummary], metric: Metric, name: str) -> tuple[str, ...]:
    found = spread({site.name: site.final[name] for site in sites}, best=metric.best)
    if found is None:
        return ()
    return (
        f"The worst site is {found.site} with {metric.text(found.worst)}, "
        f"{metric.distance(found.gap)} from the best.",
    )


def _elsewhere(mean: SiteSummary, metric: Metric, name: str) -> tuple[str, ...]:
    value = mean.elsewhere[name]
    if value is None:
        return ()
    return (f"On the records of the other sites a site's own model has {metric.text(value)}.",)


def _chance(sites: Sequence[SiteSummary], metric: Metric) -> tuple[str, ...]:
    few = min((site.records for site in sites if site.records), default=0)
    if metric.unit != "%" or not 0 < few < FEW_RECORDS:
        return ()
    return (
        f"Few records were scored: at the site with fewest, {few}, one record makes {100 / few:.1f} points. "
        "Small differences may be chance.",
    )


def _verdict(over_base: float | None, over_majority: float | None) -> str:
    """Return the answer on average: beating the untuned base counts in full only above the majority label.

    Where there is no base but an untrained head (None), the majority label alone counts.
    """
    if over_base is None:
        return "On average, yes." if over_majority is not None and over_majority > 0 else "On average, no."
    if over_base <= 0:
        return "On average, no."
    if over_majority is not None and over_majority <= 0:
        return "On average, only against the untuned base."
    return "On average, yes."


def _doubt(sites: Sequence[SiteSummary], metric: Metric, gains: Sequence[float]) -> tuple[str, ...]:
    """Say so where the smallest lead is within the 95 % interval of the mean over sites.

    The interval is that of the tuned model's mean, sites independent: half widths add as squares.
    """
    intervals = [site.interval for site in sites if site.interval is not None]
    lead = min((gain for gain in gains if gain > 0), default=None)
    if lead is None or not sites or len(intervals) < len(sites):
        return ()
    half = math.hypot(*((high - low) / 2 for low, high in intervals)) / len(sites)
    if lead > half:
        return ()
    return (
        f"But a lead of {metric.distance(lead)} is no more than other held-out records could make of it "
        f"(± {metric.distance(half)}, 95 %).",
    )


def _against(
    sites: Sequence[SiteSummary], metric: Metric, name: str, pick: Callable[[SiteSummary], float | None]
) -> tuple[int, int, int]:
    """Return at how many sites the tuned model was better, equal and worse."""
    gains = [
        metric.gain(final, other)
        for site in sites
        if (final := site.final[name]) is not None and (other := pick(site)) is not None
    ]
    return sum(gain > 0 for gain in gains), sum(gain == 0 for gain in gains), sum(gain < 0 for gain in gains)


def _rest(equal: int, worse: int) -> str:
    parts = [f"{number} {word}" for number, word in ((equal, "equal"), (worse, "worse")) if number]
    return f" ({', '.join(parts)})" if parts else ""


def _left(config: Config, events: Sequence[Event]) -> tuple[str, ...]:
    sums = totals(traffic(events))
    if not sums:
        return ("Nothing yet.",)
    up, down = (sum(pair[side] for pair in sums.values()) for side in (0, 1))
    adapters = sums.get("training", (0, 0))[0]
    basis = sums.get("basis", (0, 0))[0]
    once = f", {size(basis)} for frozen matrices sent once" if basis else ""
    if config.federation.mode == "central":
        records = "This baseline needs all records in one place."
    else:
        records = "Training records stayed where they were."
    return (
        f"{size(up)} in all from all sites: {size(adapters)} for adapter updates{once}, and "
        f"{size(up - adapters - basis)} for joining and evaluation. {size(down)} went to the sites.",
        records,
    )


def _promised(config: Config, events: Sequence[Event], sites: Sequence[SiteSummary]) -> tuple[str, ...]:
    if config.federation.mode == "base":
        return (NOTHING_TRAINED,)
    sentences: tuple[str, ...] = ()
    if config.privacy.enabled:
        sentences += _promised_for_units(config, total(sites).epsilon)
    if config.site_privacy.enabled:
        found = towards(config, whole_sites_spent(events))
        said = ". ".join(f"{who}: {what}" for who, what in found)
        sentences += (f"Whole sites are protected, at delta {config.site_privacy.delta:g}. {said}.",)
    return sentences or ("None: this run used no differential privacy.",)


def _promised_for_units(config: Config, epsilon: float | None) -> tuple[str, ...]:
    unit, delta = config.data.unit, config.privacy.delta
    whom = f"each {unit} (all records of one '{unit}' at a site)" if unit else "each single record at a site"
    promise = f"Differential privacy for {whom}, towards everyone outside that site."
    if epsilon is None:
        return (promise, "No site has reported what it spent yet.")
    return (
        f"{promise} Largest epsilon of a site: {epsilon:.2f}, at delta {delta:g}.",
        "In the worst case, somebody who knows everything else and starts at even odds can tell in "
        f"{_share(best_guess(epsilon, delta))} of cases whether {'a ' + unit if unit else 'a record'} took "
        "part; a coin toss has 50 %. The smaller epsilon, the closer to the coin.",
    )


def _share(value: float) -> str:
    """Return a share that never rounds up to certainty."""
    return "nearly all (over 99.9 %)" if value > 0.999 else f"at most {percent(value)}"


def _open(config: Config) -> tuple[str, ...]:
    always = "settings and labels, who takes part and when, and how many bytes are sent"
    if config.federation.mode == "base":
        return (f"Open are measured results that were sent, {always}.",)
    if not config.private_replies:
        return (
            "The records behind updates and adapter: whoever sees those may learn something about single "
            f"records. Also open are measured results, {always}.",
        )
    more = "; held-out records are declared public" if config.data.heldout_public else ""
    return (f"Open by design: {always}{more}. The section on privacy has the whole list.",)
