"""Runs that show their rounds elsewhere: what arrives is what the table says; no failure there ends them."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from typing import Any

import pytest
from flwr.app import Message
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedllm.config import Config
from fedllm.errors import ConfigError
from fedllm.federation.plan import check_recipe
from fedllm.runs import tracking
from fedllm.runs.events import QUALITY, read_events
from fedllm.runs.folder import RunFolder
from fedllm.runs.metrics import FEDERATION, WITHHELD
from fedllm.runs.shown import NUMBERS, final_values
from fedllm.runs.tracking import Tracked
from fedllm.settings import Scalar


class Away:
    """A tracker whose server is away from the second round on."""

    def __init__(self, run: Tracked) -> None:
        self.run = run

    def settings(self, values: Mapping[str, Scalar]) -> None:
        pass

    def round(self, number: int, values: Mapping[str, float]) -> None:
        if number == 2:
            raise TimeoutError("no answer")

    def close(self, *, finished: bool) -> None:
        pass


def shown(folder: RunFolder) -> dict[tuple[str, int], float]:
    found = EventAccumulator(str(folder.path / "tracking" / "tensorboard"))
    found.Reload()
    return {(tag, e.step): e.value for tag in found.Tags()["scalars"] for e in found.Scalars(tag)}


def table(folder: RunFolder) -> dict[tuple[str, int], float]:
    """Return the numbers of metrics.csv, and of the final evaluation, under the names that trackers use."""
    with folder.metrics_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = max(int(row["round"]) for row in rows)
    return {(name, last): value for name, value in final_values(read_events(folder)).items()} | {
        (
            f"{FEDERATION}/{name}" if row["site"] == FEDERATION else f"{name}/{row['site']}",
            int(row["round"]),
        ): (float(row[name]))
        for row in rows
        for name in (*QUALITY, *NUMBERS)
        if row[name] not in ("", WITHHELD)
    }


def test_a_private_run_shows_its_table_and_a_failing_tracker_does_not_end_it(
    federate: Any, events: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracking.BACKENDS, "mlflow", Away)
    folder = federate(
        run__tracking="mlflow,tensorboard",
        privacy__enabled=True,
        privacy__epsilon=6.0,
        privacy__delta=1e-4,
        privacy__clipping_norm=0.5,
    )
    assert events(folder, "run_finished")
    (warning,) = events(folder, "warning")
    assert "mlflow failed (TimeoutError)" in warning["text"]
    found, expected = shown(folder), table(folder)
    assert found == pytest.approx(expected, rel=1e-6)
    assert WITHHELD in folder.metrics_file.read_text()
    names = {name for tag, _ in found for name in tag.split("/")}
    assert not names & set(QUALITY)
    assert {"epsilon", "bytes_up", "site-0", FEDERATION} <= names


def test_a_resumed_run_goes_on_where_it_was_shown(federate: Any, resume: Any, events: Any) -> None:
    def stop(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and message.metadata.group_id == "2":
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        federate(stop, run__tracking="tensorboard")
    # as long a name: the settings that are sent hold it, and bytes are compared
    whole = federate(dir="all", run__tracking="tensorboard")
    broken = RunFolder(whole.path.parent / "run")
    assert {step for _, step in shown(broken)} == {1}
    resumed = resume(broken.path)
    timeless = {key: value for key, value in shown(resumed).items() if "seconds" not in key[0]}
    assert shown(resumed) == pytest.approx(table(resumed), rel=1e-6)
    assert timeless == {key: value for key, value in shown(whole).items() if "seconds" not in key[0]}
    assert {("federation/loss", 2), ("final/loss", 2), ("base/loss", 2)} <= set(timeless)
    assert events(resumed, "warning") == []


def test_a_missing_package_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb is not installed where the coordinator runs; `pip install"):
        check_recipe(Config.from_flat({"run.tracking": "wandb"}))
    check_recipe(Config())
