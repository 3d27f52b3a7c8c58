"""Rounds in which only some of the sites train."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from safetensors.numpy import load_file

from fedllm.adapters import METHODS
from fedllm.aggregation import make_rule
from fedllm.config import Config
from fedllm.errors import ConfigError
from fedllm.federation.client import _last_change
from fedllm.federation.local import Start
from fedllm.federation.loop import drawn_sites
from fedllm.federation.memory import SiteMemory
from fedllm.training.spec import adapter_spec

NAMES = [f"site-{index}" for index in range(20)]
SOME: dict[str, Any] = {
    "federation__sites": 4,
    "federation__sites_per_round": 2,
    "federation__rounds": 4,
    "evaluation__every": 0,
}


def drawn(round: int, *, seed: int = 1, names: list[str] = NAMES, **settings: Any) -> list[str]:
    values = {"run.seed": seed, "federation.sites": 20, "federation.sites_per_round": 2} | settings
    return drawn_sites(Config.from_flat(values), names, round=round)


def test_a_draw_depends_on_seed_round_and_names_alone() -> None:
    assert drawn(3) == drawn(3, names=NAMES[::-1]) == sorted(drawn(3))
    rounds = [tuple(drawn(round)) for round in range(1, 401)]
    assert {len(set(names)) for names in rounds} == {2}
    asked = Counter(name for names in rounds for name in names)
    # 400 rounds of 2 of 20: 40 each, deviation 6
    assert asked.keys() == set(NAMES)
    assert all(16 < count < 64 for count in asked.values())
    assert rounds[:20] != [tuple(drawn(round, seed=2)) for round in range(1, 21)]


def test_all_sites_train_unless_fewer_are_wanted() -> None:
    assert drawn(1, **{"federation.sites_per_round": 0}) == sorted(NAMES)
    assert drawn(1, **{"federation.sites_per_round": 20}) == sorted(NAMES)
    # fewer joined than are wanted
    assert drawn(1, names=NAMES[:1]) == NAMES[:1]
    assert drawn(1, **{"federation.mode": "central"}) == NAMES[:1]


@pytest.mark.parametrize("strategy", ["fedit", "flora", "fedsvd"])
def test_a_site_that_was_left_out_catches_up(strategy: str, federate: Any, resume: Any, events: Any) -> None:
    """Rules that fold updates into the base send a site what it has missed; a resume asks the same sites."""

    def stop(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and message.metadata.group_id == "3":
            raise KeyboardInterrupt
        return reply

    rule = SOME | {"strategy__name": strategy, "adapter__method": "lora"}
    whole = federate(dir="whole", **rule)
    asked = [event["sites"] for event in events(whole, "round_started")]
    assert [len(sites) for sites in asked] == [2, 2, 2, 2]
    assert len({tuple(sites) for sites in asked}) > 1
    replies = list(events(whole, "site_reply"))
    assert all(reply["accepted"] for reply in replies)
    assert len(replies) == 8
    # all sites score the finished adapter
    assert len({event["site"] for event in events(whole, "evaluated")}) == 4
    with pytest.raises(KeyboardInterrupt):
        federate(stop, dir="broken", **rule)
    resumed = resume(whole.path.parent / "broken", nodes=4)
    left, right = (load_file(run.adapter_dir / "adapter_model.safetensors") for run in (resumed, whole))
    assert left.keys() == right.keys()
    assert all(np.array_equal(left[key], right[key]) for key in left)


def test_a_private_site_never_spends_more_than_its_budget(federate: Any, events: Any) -> None:
    run = federate(privacy__enabled=True, privacy__epsilon=8.0, privacy__delta=1e-4, **SOME)
    spent = {event["site"]: event["epsilon"] for event in events(run, "site_reply")}
    # noise is chosen as if a site were asked every round
    assert spent
    assert all(0 < epsilon <= 8.0 for epsilon in spent.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"federation.sites_per_round": 5}, "5 cannot be drawn from 4 sites"),
        ({"federation.sites_per_round": 2, "federation.quorum": 3}, "3 replies cannot come from 2 sites"),
    ],
)
def test_what_cannot_be_drawn_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_flat({"federation.sites": 4} | settings)


@pytest.mark.parametrize("name", ["fedit", "rolora"])
def test_fedhyper_sees_the_last_change_of_matrices_that_train_in_turn(name: str, tmp_path: Path) -> None:
    values = {"model.name": "tiny-llama", "adapter.method": "lora", "strategy.name": name}
    config = Config.from_flat(values | {"train.fedhyper": "cosine"})
    rule, spec, memory = make_rule(config), adapter_spec(config), SiteMemory(tmp_path, "0a")
    state = METHODS[spec.method].initial_state(spec, seed="0")
    for round in range(1, 6):
        found = _last_change(config, Start(shared=state, state=state, folded={}), memory, round)
        now = state.only(rule.plan(spec, round).train).tensors
        if round > 2:
            assert all(np.allclose(found[key], 1.0) for key in now)
        state = state.with_tensors({k: v + 1.0 if k in now else v for k, v in state.tensors.items()})
