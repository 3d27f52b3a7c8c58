"""Federations on pairs of answers, from the data to the report, and their audits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedllm.cli.tables import final_table
from fedllm.config import Config
from fedllm.federation.audit import static_checks, subject
from fedllm.federation.estimate import estimate
from fedllm.federation.inversion import attack_updates
from fedllm.federation.membership import attack_membership
from fedllm.runs.events import read_events
from fedllm.runs.folder import RunFolder
from fedllm.runs.report import write_report

Federate = Callable[..., RunFolder]
Events = Callable[[RunFolder, str], list[Mapping[str, Any]]]
PRIVATE = {"privacy__enabled": True, "privacy__noise_multiplier": 0.6, "privacy__delta": 1e-3}


@pytest.fixture
def pairs(tmp_path: Path) -> dict[str, Any]:
    """Write pairs and return the settings that read them."""
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"question {row}", "chosen": "YES " * (1 + row % 3), "rejected": f"no, not {row}"}
        for row in range(90)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "data__source": "file",
        "data__path": str(path),
        "data__text": "prompt",
        "data__label": "chosen",
        "data__rejected": "rejected",
        "data__task": "generate",
        "data__heldout": 0.4,
        "train__objective": "dpo",
        "train__lr": 0.03,
        "adapter__method": "fed-sb",
    }


def shown(folder: RunFolder) -> str:
    """Return the final table's cells, in one line."""
    columns = final_table([("run", read_events(folder))]).columns
    return " | ".join(str(cell) for column in columns for cell in column.cells)


def test_held_out_pairs_are_won_and_nothing_else_is_claimed(
    federate: Federate, events: Events, pairs: dict[str, Any]
) -> None:
    folder = federate(**pairs, train__local_steps=6)
    replies = events(folder, "site_reply")
    assert all(reply["accepted"] for reply in replies), replies
    assert all(reply["accuracy"] is not None and reply["macro_f1"] is None for reply in replies)
    stages = {
        stage: [e for e in events(folder, "evaluated") if e["stage"] == stage] for stage in ("base", "final")
    }
    for event in stages["base"]:
        assert event["loss"] == pytest.approx(0.6931, abs=1e-4)
        assert event["accuracy"] == 0.5
    for event in stages["final"]:
        assert event["loss"] < 0.69
        assert event["accuracy"] > 0.5
        assert event["macro_f1"] is event["majority_accuracy"] is event["majority_macro_f1"] is None
    cells = shown(folder)
    assert "50.0" in cells
    assert "withheld" not in cells
    text = write_report(folder).read_text(encoding="utf-8")
    words = " ".join(text.split())
    assert "Mean share of pairs with a positive margin on held-out records: tuned" in words
    assert "untuned base 50.0" in words
    card = " ".join((folder.adapter_dir / "README.md").read_text(encoding="utf-8").split())
    assert "preferences between answers (DPO, beta 0.1)" in card
    assert "share of pairs with a positive margin: untuned base" in card


@pytest.mark.parametrize("public", [False, True])
def test_a_private_run_withholds_preferences_unless_they_are_public(
    public: bool, federate: Federate, events: Events, pairs: dict[str, Any]
) -> None:
    folder = federate(**pairs, **PRIVATE, data__heldout_public=public, federation__rounds=1)
    replies = events(folder, "site_reply")
    assert all(reply["accepted"] and reply["epsilon"] for reply in replies), replies
    final = [event for event in events(folder, "evaluated") if event["stage"] == "final"]
    assert all((event["accuracy"] is not None) == public for event in final)
    assert ("withheld" in shown(folder)) == (not public)


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter.method": "lora", "strategy.name": "flora"},
        {"adapter.method": "prompt"},
        {"adapter.method": "lora", "strategy.name": "rolora", "privacy.enabled": True},
        {"adapter.basis": "public-gradient"},
        {"adapter.basis": "dp-gradient", "adapter.basis_records": 5, "privacy.enabled": True},
    ],
)
def test_other_methods_train_on_pairs(
    changes: dict[str, Any], federate: Federate, events: Events, pairs: dict[str, Any]
) -> None:
    if changes.get("privacy.enabled"):
        changes = {**changes, "privacy.noise_multiplier": 0.6, "privacy.delta": 1e-3}
    if changes.get("adapter.basis") == "public-gradient":
        changes = {**changes, "adapter.basis_path": pairs["data__path"]}
    folder = federate(**(pairs | {key.replace(".", "__"): value for key, value in changes.items()}))
    assert all(reply["accepted"] for reply in events(folder, "site_reply"))


def settings(pairs: dict[str, Any], **changes: Any) -> Config:
    values = {
        "model.name": "tiny-llama",
        "model.dtype": "float32",
        "adapter.rank": 3,
        "adapter.layers": "0",
        "federation.sites": 2,
        "federation.rounds": 2,
        "train.batch_size": 4,
        "train.max_length": 160,
    }
    given = {**pairs, **changes}
    return Config.from_flat(values | {key.replace("__", "."): value for key, value in given.items()})


def test_a_private_recipe_passes_its_audits(pairs: dict[str, Any]) -> None:
    config = settings(pairs, **PRIVATE, privacy__clipping_norm=0.1)
    checks = static_checks(subject(config))
    assert [check for check in checks if check.passed is False] == []
    found = attack_updates(config, records=3, candidates=5, rank=4)
    assert found.matching.found == 3


def test_membership_is_measured_on_pairs(federate: Federate, pairs: dict[str, Any]) -> None:
    folder = federate(**pairs, federation__rounds=1)
    found = attack_membership(folder.path, records=6)
    assert found.members == 18
    assert 0 <= found.area <= 1


def test_a_pair_takes_the_memory_of_two_rows(pairs: dict[str, Any]) -> None:
    dpo = estimate(settings(pairs))
    sft = estimate(settings(pairs | {"train__objective": "sft", "data__rejected": ""}))
    assert dpo.memory_mib > sft.memory_mib
    assert (dpo.trained, dpo.bytes_up) == (sft.trained, sft.bytes_up)
