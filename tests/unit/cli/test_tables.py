"""The live table of a run."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from fedllm.cli.tables import HEADINGS, LiveRounds, final_table
from fedllm.config import Config
from fedllm.settings import DataSettings, TrainSettings

REPLY = {"event": "site_reply", "accepted": True, "loss": 1.5, "accuracy": None, "epsilon": None}
FINISHED = {
    "event": "round_finished",
    "round": 1,
    "accepted": 1,
    "bytes_up": 1,
    "bytes_down": 2,
    "seconds": 3,
}


@pytest.mark.parametrize(
    ("config", "accuracy"),
    [
        (Config(), True),
        (Config(data=DataSettings(task="generate")), False),
        (
            Config(data=DataSettings(task="generate", rejected="no"), train=TrainSettings(objective="dpo")),
            True,
        ),
    ],
)
def test_a_task_without_labels_has_no_column_of_accuracy(config: Config, accuracy: bool) -> None:
    rounds = LiveRounds()
    rounds.add({"event": "run_started", "config": config.to_flat(), "rounds": 1})
    rounds.add({"event": "round_started", "round": 1, "sites": ["a"]})
    rounds.add(REPLY)
    row: Any = rounds.add(FINISHED)
    assert rounds.headings == tuple(name for name in HEADINGS if accuracy or name != "accuracy")
    assert dict(zip(rounds.headings, row, strict=True))["loss"] == "1.500"
    assert [column.header for column in rounds.render().columns] == list(rounds.headings)


def test_names_are_shown_as_they_are() -> None:
    scores = {"event": "evaluated", "stage": "final", "accuracy": 0.5, "macro_f1": 0.5, "epsilon": None}
    events = [{**scores, "site": site} for site in ("a[/b]", "[red]c")]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(final_table([("run[/1]", events)]))
    assert "run[/1]  a[/b]" in shown.get()
    assert "run[/1]: worst site [red]c" in shown.get() or "run[/1]: worst site a[/b]" in shown.get()
