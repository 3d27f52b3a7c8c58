"""The byte ledger of a run: everything each site sent and got, as serialised, by stage."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.runs.events import Event, read_events
from fedllm.runs.folder import RunFolder, atomic_write

#: Stage -> what it is, in the order of a run; ``training`` is every round's.
STAGES = {
    "hello": "joining: settings, names and shapes",
    "basis": "frozen matrices, once",
    "training": "adapters, all rounds",
    "evaluation": "the finished adapter, once",
}
COLUMNS = ("stage", "round", "site", "bytes_up", "bytes_down")
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Line:
    """Bytes of one site in one stage of one round; ``up`` is from the site."""

    stage: str
    round: int
    site: str
    up: int
    down: int


def traffic(events: Iterable[Event]) -> list[Line]:
    """Return all traffic of a run, in order; rounds that a resume repeated count as often as they ran."""
    lines = []
    for event in events:
        if event["event"] not in ("traffic", "site_reply"):
            continue
        lines.append(
            Line(
                stage="training" if event["event"] == "site_reply" else event["stage"],
                round=event["round"],
                site=event["site"],
                up=event["bytes_up"],
                down=event["bytes_down"],
            )
        )
    return lines


def totals(lines: Sequence[Line]) -> dict[str, tuple[int, int]]:
    """Return stage -> bytes (up, down) of all sites, for the stages that had any."""
    stages = [*STAGES, *(line.stage for line in lines)]
    return {
        stage: (sum(line.up for line in mine), sum(line.down for line in mine))
        for stage in dict.fromkeys(stages)
        if (mine := [line for line in lines if line.stage == stage])
    }


def flowertune_mib(lines: Sequence[Line]) -> float:
    """Return FlowerTune's counter: MiB of the training messages of all sites, both ways.

    Its leaderboard allows 200,000 MiB. It leaves out joining, bases and evaluation, and counts the
    arrays of a message; here it is the message as serialised, some hundred bytes more.
    """
    return sum(line.up + line.down for line in lines if line.stage == "training") / _MIB


def write_traffic(folder: RunFolder) -> Path:
    """Write ``traffic.csv`` anew from the events: a row a stage, round and site, and the sums.

    Raises
    ------
    RunError
        If the events cannot be read, or the table cannot be written.
    """
    lines = traffic(read_events(folder))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for line in lines:
        writer.writerow([line.stage, line.round, line.site, line.up, line.down])
    for stage, (up, down) in totals(lines).items():
        writer.writerow([stage, "all", "federation", up, down])
    path = folder.path / "traffic.csv"
    atomic_write(path, text.getvalue().encode("utf-8", "replace"))
    return path
