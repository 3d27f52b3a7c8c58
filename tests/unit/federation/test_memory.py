"""What a site keeps from round to round: which rounds stay, and what is refused when they are gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedllm.adapters import METHODS
from fedllm.adapters.export import load_state
from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.errors import RunError
from fedllm.federation.memory import SiteMemory
from fedllm.federation.records import pack, unpack
from fedllm.runs.folder import load_config
from fedllm.training.spec import adapter_spec
from fedllm.wire import encode

SPEC = AdapterSpec(method="lora", rank=2, scale=1.0, shapes={"layer": (3, 4)}, basis="none", base="x")


def state(value: int) -> AdapterState:
    return AdapterState(SPEC, {"layer.A": np.full((2, 4), value, np.float32)})


def saved(folder: Path, rounds: range) -> SiteMemory:
    memory = SiteMemory(folder, "0a")
    for round in rounds:
        memory.save("personal", round, state(round))
    return memory


def value_before(memory: SiteMemory, round: int) -> float | None:
    kept = memory.require("personal", SPEC, before=round)
    return None if kept is None else float(kept.tensors["layer.A"].max())


def test_a_site_can_go_on_from_every_round_that_the_server_can(tmp_path: Path) -> None:
    memory = saved(tmp_path, range(1, 24))
    # the server keeps its newest three checkpoints, and those of every tenth round
    assert [value_before(memory, kept + 1) for kept in (10, 20, 21, 22, 23)] == [10, 20, 21, 22, 23]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5
    memory.save("personal", 11, state(111))
    assert [value_before(memory, round) for round in (11, 12, 24)] == [10, 111, 111]


def test_a_site_that_was_not_drawn_in_a_tenth_round_goes_on_from_its_last_one(tmp_path: Path) -> None:
    memory = saved(tmp_path, range(2, 40, 7))
    assert [value_before(memory, round) for round in (11, 21, 31)] == [9, 16, 30]


def test_matrices_that_are_damaged_or_gone_are_not_begun_anew_in_silence(tmp_path: Path) -> None:
    memory = saved(tmp_path, range(1, 7))
    (folder,) = tmp_path.iterdir()
    newest = folder / "personal-000006.safetensors"
    newest.write_bytes(b"\0" * 20)
    with pytest.raises(RunError, match=r"personal-000006\.safetensors is damaged.* delete personal-"):
        memory.require("personal", SPEC, before=7)
    assert value_before(memory, 6) == 5
    with pytest.raises(RunError, match=r"those before round 2 are gone.* Restore them from a backup"):
        memory.require("personal", SPEC, before=2)
    # a run that begins again has lost nothing, and neither has a site that repeats its first round
    assert value_before(memory, 1) is None
    assert value_before(saved(tmp_path / "late", range(5, 6)), 5) is None


def test_a_run_goes_back_behind_a_spoilt_round(federate: Any, resume: Any, events: Any) -> None:
    def spoil(message: Message, reply: Message) -> Message:
        notes, parts = unpack(reply.content)
        if message.metadata.message_type != "train" or message.metadata.group_id != "2":
            return reply
        spec = METHODS["lora"].initial_state(adapter_spec(config), seed="00").only(("A",))
        huge = spec.with_tensors({key: np.full_like(value, 1e37) for key, value in spec.tensors.items()})
        payload = encode(huge, codec="float32") if notes["site"] == "site-1" else parts["adapter"]
        return Message(pack(notes, {**parts, "adapter": payload}), reply_to=message)

    settings: dict[str, Any] = {"federation__rounds": 3, "strategy__name": "fedsa", "adapter__method": "lora"}
    whole = federate(dir="whole", **settings)
    config = load_config(whole)
    with pytest.raises(RunError, match="round 3"):
        federate(spoil, **settings)
    broken = whole.path.parent / "run"
    (broken / "checkpoints" / "round-0002.safetensors").unlink()
    resumed = resume(broken)
    for path in (resumed.adapter_dir, resumed.site_dir("site-1") / "adapter"):
        left, right = (
            load_state(folder)[0] for folder in (path, whole.path / path.relative_to(resumed.path))
        )
        assert all(np.array_equal(left.tensors[key], right.tensors[key]) for key in right.tensors)


def test_a_site_without_its_own_matrices_is_set_aside_with_the_reason(
    federate: Any, resume: Any, events: Any
) -> None:
    def stop(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and message.metadata.group_id == "3":
            raise KeyboardInterrupt
        return reply

    settings: dict[str, Any] = {"federation__rounds": 3, "strategy__name": "fedsa", "adapter__method": "lora"}
    with pytest.raises(KeyboardInterrupt):
        federate(stop, **settings, evaluation__every=0)
    whole = federate(dir="whole", **settings, evaluation__every=0)
    broken = whole.path.parent / "run"
    for file in (broken / "sites" / "site-1" / "memory").rglob("personal-*.safetensors"):
        file.write_bytes(b"\0" * 20)
    resumed = resume(broken)
    (refused,) = [event for event in events(resumed, "site_reply") if not event["accepted"]]
    assert (refused["site"], refused["round"]) == ("site-1", 3)
    assert "personal-000002.safetensors is damaged" in refused["reason"]
    # the others went on from theirs
    left, right = (load_state(run.site_dir("site-2") / "adapter")[0] for run in (resumed, whole))
    own = [key for key in left.tensors if key.endswith(".B")]
    assert all(left.tensors[key].any() for key in own)
    assert left.layout == right.layout
