"""The live table of a run, and the final table of one or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from fedllm.config import Config
from fedllm.runs.measures import METRICS, UNTRAINED_HEAD, base_name
from fedllm.runs.sites import largest_epsilon, spread
from fedllm.runs.whole_sites import whole_sites_spent

Event = Mapping[str, Any]
#: Columns of the live table; accuracy is left out where a task has none.
HEADINGS = ("round", "sites", "loss", "accuracy", "epsilon of each site", "up", "down", "seconds")


def bytes_text(count: float) -> str:
    """Return a number of bytes for people.

    >>> bytes_text(215_432)
    '215.4 kB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return ""


class LiveRounds:
    """Collects a run's events into one row a round."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []
        self.private = False
        self.headings: tuple[str, ...] = HEADINGS
        self.status = "waiting for the server"
        self._replies: list[Event] = []
        self._total = 0

    def add(self, event: Event) -> list[str] | None:
        """Take an event in; return a new row when it finishes a round."""
        name = event["event"]
        if name == "run_started":
            self.private = Config.from_flat(event["config"]).private_replies
            if "accuracy" not in _pair([event]).names:
                self.headings = tuple(name for name in HEADINGS if name != "accuracy")
            self._total = event["rounds"]
            self.status = "sites are joining"
        elif name == "round_started":
            self._replies = []
            self.status = (
                f"round {event['round']} of {self._total or '?'}: {len(event['sites'])} sites at work"
            )
        elif name == "site_reply":
            self._replies.append(event)
        elif name == "round_finished":
            self.status = "evaluating the result"
            self.rows.append(self._row(event))
            return self.rows[-1]
        elif name == "run_failed":
            self.status = "failed"
        elif name == "run_finished":
            self.status = f"finished after {event['seconds']:.0f} s"
        return None

    def _row(self, event: Event) -> list[str]:
        good = [reply for reply in self._replies if reply["accepted"]]
        absent = "withheld" if self.private else "-"

        def mean(key: str, form: str) -> str:
            values = [reply[key] for reply in good if reply[key] is not None]
            return format(sum(values) / len(values), form) if values else absent

        spent = [f"{reply['epsilon']:.2f}" for reply in good if reply["epsilon"] is not None]
        cells = (
            str(event["round"]),
            f"{event['accepted']}/{len(self._replies)}",
            mean("loss", ".3f"),
            mean("accuracy", ".1%"),
            " ".join(spent) or "-",
            bytes_text(event["bytes_up"]),
            bytes_text(event["bytes_down"]),
            f"{event['seconds']:.0f}",
        )
        return [cell for name, cell in zip(HEADINGS, cells, strict=True) if name in self.headings]

    def render(self) -> Table:
        """Return the table so far."""
        table = Table(caption=self.status, caption_justify="left", box=None, pad_edge=False)
        for column in self.headings:
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(*row)
        return table


@dataclass(frozen=True)
class Pair:
    """One or two metrics that the final table shows in one cell, the first one also with its interval."""

    title: str
    names: tuple[str, ...]
    scale: float = 100
    digits: int = 1
    more: Pair | None = None

    def cell(self, event: Event, prefix: str = "") -> str | None:
        """Return the metrics of an evaluation, None where the first is not there."""
        values = [event.get(f"{prefix}{name}") for name in self.names]
        if values[0] is None:
            return None
        return " / ".join("-" if value is None else self._text(value) for value in values)

    def interval(self, event: Event) -> str:
        """Return the 95 % interval of an evaluation's first metric."""
        low, high = event.get("interval_low"), event.get("interval_high")
        return "-" if low is None or high is None else f"{self._text(low)}-{self._text(high)}"

    def _text(self, value: float) -> str:
        return f"{self.scale * value:.{self.digits}f}"


LABELS = Pair(
    "accuracy / macro-F1 in %",
    ("accuracy", "macro_f1"),
    more=Pair("Brier score / calibration error", ("brier", "ece"), scale=1, digits=3),
)
ANSWERS = Pair(
    "token F1 / ROUGE-L in %",
    ("token_f1", "rouge_l"),
    more=Pair("exact match / cut answers in %", ("exact_match", "unended")),
)
EXTRACTED = Pair(
    "exact match / token F1 in %",
    ("exact_match", "token_f1"),
    more=Pair("ROUGE-L / cut answers in %", ("rouge_l", "unended")),
)
PREFERENCES = Pair("pairs with a positive margin in %", ("accuracy",))
TEXT = Pair("loss / perplexity", ("loss", "perplexity"), scale=1, digits=3)


def final_table(runs: Sequence[tuple[str, Sequence[Event]]]) -> Table:
    """Return base, majority class and tuned adapter, a row for each run and site.

    Parameters
    ----------
    runs : sequence of (name, events)
        Base and majority class are those of each run's own held-out records.
    """
    pairs = [_pair(events) for _, events in runs]
    titles = "; ".join(_title(pair) for pair in dict.fromkeys(pairs))
    table = Table(title=f"held-out records: {titles}", title_justify="left", box=None, pad_edge=False)
    for column in ("run", "site"):
        table.add_column(column)
    abroad = any(event.get("stage") == "elsewhere" for _, events in runs for event in events)
    heads = ("base", "majority", "tuned", "95 %", *(("at other sites",) if abroad else ()), "more", "epsilon")
    for column in heads:
        table.add_column(column, justify="right")
    for (name, events), pair in zip(runs, pairs, strict=True):
        for site in sorted({event["site"] for event in events if event["event"] == "evaluated"}):
            table.add_row(escape(name), escape(site), *_site_cells(site, events, pair, abroad))
        table.add_section()
    lines = [_fairness(name, events, pair) for (name, events), pair in zip(runs, pairs, strict=True)]
    lines += sorted({_terms(events) for _, events in runs} | {_base(events) for _, events in runs})
    if any(lines):
        table.caption, table.caption_justify = escape("\n".join(line for line in lines if line)), "left"
    return table


def _title(pair: Pair) -> str:
    return pair.title if pair.more is None else f"{pair.title}, more: {pair.more.title}"


def _pair(events: Sequence[Event]) -> Pair:
    """Return what a run measured, by its settings."""
    started = next((event for event in events if event["event"] == "run_started"), None)
    config = Config() if started is None else Config.from_flat(started["config"])
    if config.data.labelled:
        return LABELS
    if config.train.objective == "dpo":
        return PREFERENCES
    if config.evaluation.generate:
        return ANSWERS if config.evaluation.extract == "none" else EXTRACTED
    return TEXT


def _fairness(name: str, events: Sequence[Event], pair: Pair) -> str:
    """Say which site fares worst and how far the best is, empty for fewer than two sites."""
    metric = pair.names[0]
    final = {e["site"]: e[metric] for e in events if e["event"] == "evaluated" and e["stage"] == "final"}
    found = spread(final, best=METRICS[metric].best)
    if found is None:
        return ""
    worst, gap = (f"{pair.scale * number:.{pair.digits}f}" for number in (found.worst, found.gap))
    return f"{name}: worst site {found.site} with {worst}, {gap} between sites"


def _terms(events: Sequence[Event]) -> str:
    """Return what a private run's epsilon means, empty for other runs."""
    started = next((event for event in events if event["event"] == "run_started"), None)
    if started is None:
        return ""
    config = Config.from_flat(started["config"])
    if not config.privacy.enabled:
        return ""
    unit = f"all records of one {config.data.unit}" if config.data.unit else "one record"
    return f"epsilon at delta={config.privacy.delta:g} for {unit}; {config.privacy.relation}, Poisson, PLD"


def _base(events: Sequence[Event]) -> str:
    """Return what an encoder's base is, empty for other runs."""
    started = next((event for event in events if event["event"] == "run_started"), None)
    if started is None or base_name(Config.from_flat(started["config"])) != UNTRAINED_HEAD:
        return ""
    return "base: an encoder under an untrained head, drawn at random; compare with the majority class"


def _site_cells(site: str, events: Sequence[Event], pair: Pair, abroad: bool) -> list[str]:
    stages = {e["stage"]: e for e in events if e["event"] == "evaluated" and e["site"] == site}
    started = (Config.from_flat(e["config"]) for e in events if e["event"] == "run_started")
    private = any(config.private_replies for config in started)
    absent = "withheld" if private else "-"
    base, final = stages.get("base", {}), stages.get("final", {})
    said = (e for e in events if e["event"] in ("site_reply", "evaluated") and e["site"] == site)
    spent, whole = largest_epsilon(said), whole_sites_spent(events)
    promises = [f"{spent:.2f}"] if spent else []
    promises += [f"{whole.outsiders:.2f} (whole sites)"] if whole is not None else []
    return [
        pair.cell(base) or absent,
        pair.cell(final or base, "majority_") or (absent if pair is LABELS else "-"),
        pair.cell(final) or absent,
        pair.interval(final),
        *([pair.cell(stages.get("elsewhere", {})) or "-"] if abroad else []),
        (pair.more and pair.more.cell(final)) or "-",
        ", ".join(promises) or "none",
    ]
