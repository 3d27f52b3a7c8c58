"""The events of a run: one JSON line each, the source of metrics and report.

A line holds ``time`` (UTC, ISO 8601), ``schema``, ``event`` and the fields below. None stands for
a value that was withheld, not measured or not finite.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, get_args

from fedllm.errors import RunError
from fedllm.runs.folder import RunFolder, write_error

Event = dict[str, Any]
Kind = type | UnionType

SCHEMA = 1
POLL_SECONDS = 0.2

#: Metrics on held-out records: of labels (accuracy to ece), of free text (perplexity), of written answers.
QUALITY = (
    "loss",
    "accuracy",
    "macro_f1",
    "brier",
    "ece",
    "perplexity",
    "exact_match",
    "token_f1",
    "rouge_l",
    "unended",
)
#: 95 % interval of a site's accuracy, exact match or token F1: of what the run is judged by first.
INTERVAL = ("interval_low", "interval_high")
#: Numbers of a classifier's calibration curve: ten ranges of confidence of equal width, of each the records,
#: their mean confidence and the share of right ones; zeros where there is no record.
CURVE = 30
#: Fields that older runs have not written; where they are absent they are None.
_LATER = {
    "site_reply": QUALITY[3:],
    "evaluated": (*QUALITY[3:], *INTERVAL, "calibration", "epsilon", "heldout_epsilon"),
    "site_noise": ("epsilon_sites", "epsilon_coordinator"),
    "run_resumed": ("versions",),
}

#: Event name -> field -> type. Rounds count from 1, bytes as serialised, times are seconds, epsilon
#: is what the site has spent over all rounds so far, metrics are on held-out records.
EVENTS: Mapping[str, Mapping[str, Kind]] = MappingProxyType(
    {
        "run_started": {
            "run_id": str,
            "sites": int,
            "rounds": int,
            "config": dict,
            "versions": dict,
        },
        "site_joined": {"site": str, "node": int, "simulated": bool},
        "round_started": {"round": int, "sites": list},
        "site_reply": {
            "round": int,
            "site": str,
            "accepted": bool,
            "reason": str,
            "bytes_up": int,
            "bytes_down": int,
            "epsilon": float | None,
            **dict.fromkeys(QUALITY, float | None),
            "seconds": float,
        },
        "round_finished": {
            "round": int,
            "accepted": int,
            "bytes_up": int,
            "bytes_down": int,
            "seconds": float,
        },
        "traffic": {"stage": str, "round": int, "site": str, "bytes_up": int, "bytes_down": int},
        "diagnosed": {
            "round": int,
            "aggregation_error": float | None,
            "rank_energy": float | None,
            "cosine": float | None,
        },
        "site_noise": {
            "round": int,
            "noise_multiplier": float,
            "clipping_norm": float,
            "epsilon": float,
            "epsilon_sites": float | None,
            "epsilon_coordinator": float | None,
        },
        "checkpoint_saved": {"round": int, "file": str, "sha256": str},
        "evaluated": {
            "stage": str,
            "site": str,
            "records": int | None,
            **dict.fromkeys(QUALITY, float | None),
            **dict.fromkeys(INTERVAL, float | None),
            "calibration": list | None,
            "majority_accuracy": float | None,
            "majority_macro_f1": float | None,
            "epsilon": float | None,
            "heldout_epsilon": float | None,
        },
        "run_resumed": {"round": int, "versions": dict | None},
        "warning": {"text": str},
        "run_finished": {"seconds": float},
        "run_failed": {"reason": str},
    }
)

#: Values allowed for ``evaluated.stage``: the base model alone, with the finished adapter, and, where
#: simulated sites train each alone, a site's own adapter on the records of the other sites.
STAGES = ("base", "final", "elsewhere")


def append_event(folder: RunFolder, event: str, **fields: object) -> None:
    """Add one event to the run and flush it to the disk.

    Parameters
    ----------
    folder : RunFolder
        The run.
    event : str
        A name of `EVENTS`.
    **fields : object
        All fields of that event; those that older runs have not written may be left out.

    Raises
    ------
    RunError
        If the event does not follow `EVENTS` (naming the field), or cannot be written.
    """
    fields = dict.fromkeys(_LATER.get(event, ())) | fields
    wrong = _violation(event, fields)
    if wrong is not None:
        raise RunError(wrong)
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "schema": SCHEMA, "event": event}
    for name, kind in EVENTS[event].items():
        line[name] = _none_unless_finite(fields[name]) if type(None) in get_args(kind) else fields[name]
    try:
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise RunError(f"event {event}: cannot be written as JSON: {error}.") from None
    try:
        with folder.events_file.open("a+b") as file:
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                # A crash may have torn the last line: it must not swallow this one.
                data = data if file.read(1) == b"\n" else b"\n" + data
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(folder.events_file, error) from None


def read_events(folder: RunFolder) -> list[Event]:
    """Return all events of a run, oldest first; lines a crash has torn are left out.

    Raises
    ------
    RunError
        If the file exists and cannot be read.
    """
    data = _read_from(folder.events_file, 0)
    return [event for line in data.split(b"\n") if (event := _parse(line)) is not None]


def follow_events(folder_path: str | Path, stop: Callable[[], bool]) -> Iterator[Event]:
    """Yield a run's events as they are written, waiting for the file to appear.

    Parameters
    ----------
    folder_path : str or Path
        The run folder; it need not exist yet.
    stop : Callable[[], bool]
        Asked before every look at the file; once it says True, what is there is yielded and the
        iteration ends.

    Raises
    ------
    RunError
        If the file exists and cannot be read.
    """
    file = RunFolder(Path(folder_path)).events_file
    offset = 0
    while True:
        last = stop()
        complete, newline, _ = _read_from(file, offset).rpartition(b"\n")
        offset += len(complete) + len(newline)
        for line in complete.split(b"\n"):
            event = _parse(line)
            if event is not None:
                yield event
        if last:
            return
        time.sleep(POLL_SECONDS)


def _read_from(file: Path, offset: int) -> bytes:
    try:
        with file.open("rb") as stream:
            stream.seek(offset)
            return stream.read()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise RunError(
            f"{file}: cannot be read: {(error.strerror or 'input/output error').lower()}."
        ) from None


def _parse(line: bytes) -> Event | None:
    """Return the event of a line, or None when the line is torn or follows another schema."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not isinstance(values.get("event"), str):
        return None
    head = ("time", "schema", "event")
    values = {**dict.fromkeys(_LATER.get(str(values["event"]), ())), **values}
    fields = {key: value for key, value in values.items() if key not in head}
    if not isinstance(values.get("time"), str) or _violation(values["event"], fields) is not None:
        return None
    return values


def _violation(event: str, fields: Mapping[str, object]) -> str | None:
    """Return what is wrong with an event, or None."""
    schema = EVENTS.get(event)
    if schema is None:
        return f"event {event}: unknown; known are {', '.join(EVENTS)}."
    for name, kind in schema.items():
        if name not in fields:
            return f"event {event}: field '{name}' is missing."
        if not _fits(fields[name], kind):
            wanted = kind.__name__ if isinstance(kind, type) else str(kind)
            return f"event {event}: field '{name}' must be {wanted}, got {type(fields[name]).__name__}."
    extra = next((name for name in fields if name not in schema), None)
    if extra is not None:
        return f"event {event}: unknown field '{extra}'."
    if event == "evaluated" and fields["stage"] not in STAGES:
        return f"event evaluated: field 'stage' must be one of {', '.join(STAGES)}."
    return None


def _fits(value: object, kind: Kind) -> bool:
    kinds = get_args(kind) or (kind,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)


def _none_unless_finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
