"""What an evaluation sends: aggregates of a list, an interval, and nothing of private records."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from rich.console import Console

from fedllm.cli.tables import final_table
from fedllm.config import Config
from fedllm.errors import ConfigError, PrivacyError, WireError
from fedllm.federation.records import amounts, pack, unpack, wire_size
from fedllm.privacy.release import RELEASES, require_released
from fedllm.runs.events import CURVE, INTERVAL, QUALITY, read_events
from fedllm.runs.folder import RunFolder

WRITTEN = ("exact_match", "token_f1", "rouge_l", "unended")
LABELS = ("accuracy", "macro_f1", "brier", "ece")


@pytest.fixture
def text(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "questions.jsonl"
    rows = [{"text": f"question {i}", "label": f"answer {i % 5}"} for i in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "data__source": "file",
        "data__path": str(path),
        "data__task": "generate",
        "data__heldout": 0.3,
        "evaluation__generate": True,
        "evaluation__max_new_tokens": 3,
    }


def shown(folder: RunFolder) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(final_table([("run", read_events(folder))]))
    return capture.get()


def test_written_answers_travel_as_aggregates(federate: Any, events: Any, text: dict[str, Any]) -> None:
    notes: list[dict[str, Any]] = []

    def watch(message: Message, reply: Message) -> Message:
        notes.append(unpack(reply.content)[0])
        return reply

    folder = federate(watch, **text)
    assert all(not isinstance(note[name], list | bytes) for note in notes for name in note if name in QUALITY)
    for event in (*events(folder, "evaluated"), *events(folder, "site_reply")):
        assert all(0 <= event[name] <= 1 for name in WRITTEN)
        assert event["perplexity"] == pytest.approx(math.exp(event["loss"]))
        assert all(event[name] is None for name in LABELS)
    for event in events(folder, "evaluated"):
        assert 0 <= event["interval_low"] <= event["token_f1"] <= event["interval_high"] <= 1
        assert event["calibration"] is None
    with folder.metrics_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["rouge_l"]) <= 1 and row["accuracy"] == "" for row in rows)
    table = shown(folder)
    assert "token F1 / ROUGE-L in %" in table
    assert "run: worst site site-" in table


def test_labels_travel_with_calibration_and_interval(federate: Any, events: Any) -> None:
    replies: dict[str, list[dict[str, Any]]] = {"train": [], "evaluate": []}

    def watch(message: Message, reply: Message) -> Message:
        if message.metadata.message_type in replies:
            replies[message.metadata.message_type].append(unpack(reply.content)[0])
        return reply

    folder = federate(watch)
    assert not any("calibration" in note for note in replies["train"])
    for note in replies["evaluate"]:
        curves = {name: value for name, value in note.items() if name.endswith("calibration")}
        assert set(curves) == {"calibration", "base_calibration"}
        assert wire_size(pack(curves)) < 700
    for event in events(folder, "evaluated"):
        parts = [event["calibration"][place : place + 3] for place in range(0, CURVE, 3)]
        assert sum(records for records, _, _ in parts) == event["records"]
        hits = sum(records * right for records, _, right in parts)
        assert hits / event["records"] == pytest.approx(event["accuracy"])
        assert event["interval_low"] <= event["accuracy"] <= event["interval_high"]
        assert 0 <= event["brier"] <= 2
        assert 0 <= event["ece"] <= 1
        assert all(event[name] is None for name in (*WRITTEN, "perplexity"))
    assert "accuracy / macro-F1 in %" in shown(folder)


def test_a_private_run_sends_none_of_it_unless_the_records_are_public(
    federate: Any, events: Any, text: dict[str, Any]
) -> None:
    private = {"privacy__enabled": True, "privacy__epsilon": 6.0, "privacy__delta": 1e-4}
    for public in (False, True):
        folder = federate(dir=str(public), **text, **private, data__heldout_public=public)
        replies = events(folder, "site_reply")
        assert all(reply["accepted"] for reply in replies), replies
        for event in (*replies, *events(folder, "evaluated")):
            assert all((event[name] is not None) == public for name in (*WRITTEN, "perplexity"))
        with folder.metrics_file.open(newline="") as file:
            row = next(csv.DictReader(file))
        assert (row["rouge_l"] == "withheld") == (not public)
        assert row["accuracy"] == ""
        assert ("withheld" in shown(folder)) == (not public)


@pytest.mark.parametrize(
    "curve", [[1.0] * (CURVE - 1), [-1.0] * CURVE, [math.inf] * CURVE, ["1"] * CURVE, 3.0]
)
def test_a_curve_of_another_form_is_no_curve(curve: Any) -> None:
    assert amounts({"calibration": [0.5] * CURVE}, "calibration", length=CURVE) == [0.5] * CURVE
    assert amounts({}, "calibration", length=CURVE) is None
    with pytest.raises(WireError, match=f"'calibration' is not a list of {CURVE}"):
        amounts({"calibration": curve}, "calibration", length=CURVE)


def test_the_release_list_names_every_metric_and_nothing_of_a_record() -> None:
    for prefix in ("", "base_", "elsewhere_"):
        for name in (*QUALITY, *INTERVAL, "calibration"):
            assert RELEASES[f"{prefix}{name}"].treatment == "public"
            with pytest.raises(PrivacyError):
                require_released([f"{prefix}{name}"], metrics_public=False, simulated=True)
    with pytest.raises(PrivacyError):
        require_released(["correct"], metrics_public=True, simulated=True)


def test_settings_that_cannot_hold_are_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is written"):
        Config.from_flat({"evaluation.generate": True})
    with pytest.raises(ConfigError, match="evaluation.generate=true"):
        Config.from_flat({"data.task": "generate", "evaluation.extract": "number"})
