"""Real sites: SuperLink and SuperNodes with TLS, node keys, their own data and policies."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w
from safetensors.numpy import load_file

from fedllm.privacy.ledger import Ledger

WORDS = ("fever", "cough", "rash", "pain", "fracture", "anaemia", "asthma", "migraine")


def write_site(folder: Path, name: str, *, rows: int = 150, max_epsilon: float = 8.0) -> Path:
    """Write a site's records, its public held-out file and its policy."""
    lines = ["note,code"]
    lines += [f"{name} visit {i} with {WORDS[i % 8]},{'AB'[i % 2]}{i % 4}" for i in range(rows)]
    # a private site goes without such records and does not say that it has them
    lines += [f"{name} visit without a code,", f"{name} visit of a code that no recipe lists,C9"]
    (folder / f"{name}.csv").write_text("\n".join(lines), encoding="utf-8")
    public = ["note,code", *[f"public visit {i} with {WORDS[i % 8]},{'AB'[i % 2]}{i % 4}" for i in range(8)]]
    (folder / "public.csv").write_text("\n".join(public), encoding="utf-8")
    policy = folder / f"{name}.toml"
    policy.write_text(
        tomli_w.dumps(
            {
                "site": name,
                "data_path": f"{name}.csv",
                "heldout_path": "public.csv",
                "text": "note",
                "label": "code",
                "max_epsilon": max_epsilon,
                "max_delta": 1e-3,
                "state_dir": f"{name}-state",
                # the coordinator remembers ledgers by site and data set, over runs
                "dataset": folder.name,
            }
        ),
        encoding="utf-8",
    )
    return policy


def write_settings(folder: Path, **changes: Any) -> Path:
    """Write a private run's settings for the server."""
    values = {
        "run.dir": str(folder / "run"),
        "model.name": "tiny-llama",
        "model.dtype": "float32",
        "adapter.rank": 4,
        "data.source": "file",
        "federation.sites": 3,
        "federation.quorum": 2,
        "federation.rounds": 2,
        "federation.deadline": 150.0,
        "train.batch_size": 8,
        "train.local_steps": 2,
        "train.max_length": 128,
        "train.threads": 1,
        "privacy.enabled": True,
        "privacy.epsilon": 6.0,
        "privacy.delta": 1e-3,
        "privacy.clipping_norm": 0.5,
    }
    values |= changes
    path = folder / "settings.toml"
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    return path


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / "run" / "events.jsonl"
    if not path.is_file():
        return []
    return [e for e in map(json.loads, path.read_text().splitlines()) if e["event"] == name]


def ended(folder: Path) -> bool:
    return bool(read(folder, "run_finished") or read(folder, "run_failed"))


def test_three_sites_train_privately_and_a_dead_one_does_not_stop_them(
    federation: Any, tmp_path: Path, until: Any
) -> None:
    for name in ("north", "south", "west"):
        federation.start_supernode(name, write_site(tmp_path, name))
    federation.run(write_settings(tmp_path, **{"federation.rounds": 3}))
    until(lambda: read(tmp_path, "round_finished") or ended(tmp_path), 240, "no round finished")
    assert not read(tmp_path, "run_failed"), read(tmp_path, "run_failed")
    # the second round is under way: take one site away as a power cut would
    federation.kill("west")
    until(lambda: ended(tmp_path), 400, "the run did not end")
    assert not read(tmp_path, "run_failed"), read(tmp_path, "run_failed")
    accepted = [event["accepted"] for event in read(tmp_path, "round_finished")]
    assert accepted[0] == 3
    assert accepted[-1] == 2
    bad = [event for event in read(tmp_path, "site_reply") if not event["accepted"]]
    assert {event["site"] for event in bad} == {"west"}
    until((tmp_path / "run" / "report.html").is_file, 30, "no report")
    for name in ("config.toml", "metrics.csv", "manifest.json", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    for name in ("north", "south"):
        rounds = [entry.round for entry in Ledger(tmp_path / f"{name}-state" / "ledger.sqlite").entries()]
        assert rounds == [1, 2, 3]
    replies = [event for event in read(tmp_path, "site_reply") if event["accepted"]]
    assert all(0 < event["epsilon"] <= 6.0 for event in replies)
    assert all(event["accuracy"] is not None for event in replies)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["simulated"] is False


#: An encoder with a trained head in the place of the language model.
ENCODER = {"model.name": "tiny-bert", "model.kind": "encoder", "data.labels": "A0 | B1 | A2 | B3"}


def test_a_killed_server_of_an_encoder_run_is_resumed_and_refusals_are_named(
    federation: Any, tmp_path: Path, until: Any
) -> None:
    for name in ("north", "south"):
        federation.start_supernode(name, write_site(tmp_path, name, max_epsilon=6.1))
    settings = write_settings(tmp_path, **ENCODER, **{"federation.sites": 2, "federation.rounds": 3})
    federation.run(settings)
    until(lambda: read(tmp_path, "checkpoint_saved") or ended(tmp_path), 240, "no checkpoint")
    assert not read(tmp_path, "run_failed"), read(tmp_path, "run_failed")
    federation.kill("superlink")
    federation.start_superlink()
    settings.write_text(tomli_w.dumps({"run.resume": str(tmp_path / "run")}), encoding="utf-8")
    federation.run(settings)
    until(lambda: read(tmp_path, "run_finished"), 400, "the resumed run did not end")
    (resumed,) = read(tmp_path, "run_resumed")
    assert resumed["round"] >= 2
    assert read(tmp_path, "round_finished")[-1]["round"] == 3
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.classifier.weight"].shape[0] == 4
    # the same sites now refuse a run that would overspend, and one that sends a path
    for number, (changes, reason) in enumerate(
        (({}, "budget exhausted"), ({"data.path": "/etc/passwd"}, "the server sent a file path"))
    ):
        folder = tmp_path / f"refused-{number}"
        folder.mkdir()
        federation.run(write_settings(folder, **{"federation.sites": 2, "federation.rounds": 3, **changes}))
        until(partial(ended, folder), 200, "no refusal")
        assert reason in str(read(folder, "run_failed"))
