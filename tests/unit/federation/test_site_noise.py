"""Whole sites that hide themselves: every site clips its update and adds its share of the noise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from dp_accounting.dp_event import GaussianDpEvent
from flwr.app import Message

from fedllm.adapters.export import load_state
from fedllm.adapters.state import Matrix
from fedllm.config import Config
from fedllm.errors import ConfigError, DivergedError, FedllmError, RunError
from fedllm.federation import client, loop, site_privacy
from fedllm.federation.plan import check_recipe
from fedllm.federation.records import pack, unpack
from fedllm.federation.site_privacy import planned_whole_sites
from fedllm.runs.events import read_events
from fedllm.runs.folder import open_run

NORM = 0.05
SITES: dict[str, Any] = {
    "site_privacy__enabled": True,
    "site_privacy__noise_at": "sites",
    "site_privacy__noise_multiplier": 3.0,
    "site_privacy__clipping_norm": NORM,
    "federation__quorum": 2,
    "data__heldout_public": True,
}
PRIVATE: dict[str, Any] = {
    "privacy__enabled": True,
    "privacy__epsilon": 8.0,
    "privacy__delta": 1e-4,
    "federation__rounds": 1,
}


def oracle(noise_multiplier: float, rounds: int, delta: float = 1e-5) -> float:
    """Return dp-accounting's epsilon of some Gaussian releases, one of a change replaced by nothing."""
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(GaussianDpEvent(noise_multiplier), rounds)
    return float(accountant.get_epsilon(delta))


class Rounds:
    """What went into the rounds of a run and what came out, as changes of the adapter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[list[dict[str, Matrix]]] = []
        self.came: list[dict[str, Matrix]] = []
        original = site_privacy.private_outcome

        def watched(config: Any, folder: Any, current: Any, updates: Any, **options: Any) -> Any:
            outcome, norm = original(config, folder, current, updates, **options)
            self.sent.append(list(site_privacy.changes_of(current, updates)))
            before = current.tensors
            self.came.append({key: value - before[key] for key, value in outcome.state.tensors.items()})
            return outcome, norm

        monkeypatch.setattr(loop, "private_outcome", watched)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Rounds:
    return Rounds(monkeypatch)


def norm_of(change: dict[str, Matrix]) -> float:
    return math.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in change.values()))


def is_train(message: Message) -> bool:
    return message.metadata.message_type == "train"


def test_a_run_with_noise_in_shares(federate: Any, events: Any, rounds: Rounds) -> None:
    notes: list[dict[str, Any]] = []

    def watch(message: Message, reply: Message) -> Message:
        notes.append(dict(unpack(reply.content)[0]))
        return reply

    folder = federate(watch, **SITES)
    booked = events(folder, "site_noise")
    assert [event["noise_multiplier"] for event in booked] == [3.0, 3.0]
    # two shares make the noise: outsiders face both, another site one, the coordinator one
    for name, multiplier in (
        ("epsilon", 3.0),
        ("epsilon_sites", 3.0 * math.sqrt(1 / 2)),
        ("epsilon_coordinator", 3.0 / math.sqrt(2)),
    ):
        expected = [oracle(multiplier, count) for count in (1, 2)]
        assert [event[name] for event in booked] == pytest.approx(expected, rel=1e-3)
    order = [
        e["event"] for e in read_events(folder) if e["event"] in ("round_started", "site_noise", "site_reply")
    ]
    assert order == ["round_started", "site_noise", *["site_reply"] * 3] * 2
    # nothing measured on a site's own records leaves it; metrics on public ones do
    assert not any({"train_loss", "examples"} & note.keys() for note in notes)
    assert all(event["loss"] is not None for event in events(folder, "site_reply"))
    # the coordinator neither clips nor noises: it divides the sum by the number of sites
    for sent, came in zip(rounds.sent, rounds.came, strict=True):
        assert len(sent) == 3
        for key, value in came.items():
            assert np.allclose(value, sum(change[key] for change in sent) / 3, atol=1e-6)
    # 6 updates of 63 numbers, each of deviation 3 S / sqrt(2), beside which a change of norm S is little
    numbers = np.concatenate([value.ravel() for sent in rounds.sent for c in sent for value in c.values()])
    assert numbers.std() == pytest.approx(3 * NORM / math.sqrt(2), rel=6 / math.sqrt(2 * numbers.size))
    report = " ".join(folder.report_file.read_text().split())
    card = (folder.adapter_dir / "README.md").read_text()
    for page in (report, card):
        assert "They are hidden with their whole site" in page
        assert f"epsilon {booked[-1]['epsilon_coordinator']:.2f}" in page
        assert "That a site takes part, and when, is not hidden" in page
        assert "Single records are not protected" not in page
    assert f"Towards whoever gets the adapter alone: epsilon {booked[-1]['epsilon']:.2f}" in report


def test_the_noise_is_no_other_partys_to_repeat(federate: Any, rounds: Rounds) -> None:
    for name in ("first", "second"):
        federate(dir=name, federation__rounds=1, **SITES)
    first, second = rounds.sent
    for one, two in zip(first, second, strict=True):
        gap = {key: one[key] - two[key] for key in one}
        # same seed, same records, same training: all of the gap is noise
        assert norm_of(gap) > NORM
    # and sites do not draw the same noise either
    assert norm_of({key: first[0][key] - first[1][key] for key in first[0]}) > 2 * NORM


def test_sites_clip_what_they_send_and_send_no_metrics_of_private_records(
    federate: Any, events: Any, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, long = site_privacy.noised_change, []

    def quiet(change: Any, **options: Any) -> Any:
        long.append(norm_of(change))
        return original(change, **(options | {"noise_multiplier": 0.0}))

    monkeypatch.setattr(site_privacy, "noised_change", quiet)
    settings = SITES | {"data__heldout_public": False, "train__lr": 1.0, "federation__rounds": 1}
    folder = federate(**settings)
    assert min(long) > 2 * NORM
    assert [norm_of(change) for change in rounds.sent[0]] == pytest.approx([NORM] * 3, rel=1e-4)
    assert all(event["loss"] is None for event in events(folder, "site_reply"))
    assert "their results stay at the sites" in folder.report_file.read_text()


def test_a_site_that_diverged_sends_noise_alone(
    federate: Any, events: Any, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = client.train_round

    def diverging(session: Any, tokens: Any, **options: Any) -> Any:
        if tokens.name == "site-1":
            raise DivergedError("site site-1: training diverged.")
        return original(session, tokens, **options)

    monkeypatch.setattr(client, "train_round", diverging)
    folder = federate(federation__rounds=1, **SITES)
    assert [event["accepted"] for event in events(folder, "site_reply")] == [True] * 3
    assert norm_of(rounds.sent[0][1]) > NORM
    at_coordinator = SITES | {"site_privacy__noise_at": "coordinator"}
    folder = federate(dir="other", federation__rounds=1, **at_coordinator)
    assert [event["accepted"] for event in events(folder, "site_reply")] == [True, False, True]


def test_a_site_takes_no_less_noise_than_the_recipe_comes_to(
    federate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, original = [], site_privacy.hidden_update

    def watched(*words: Any, noise_multiplier: float) -> Any:
        asked.append(noise_multiplier)
        return original(*words, noise_multiplier=noise_multiplier)

    monkeypatch.setattr(client, "hidden_update", watched)
    monkeypatch.setattr(loop, "book_release", lambda *_, round, clipping_norm: [0.5, 7.0][round - 1])
    federate(**SITES)
    assert asked == [3.0] * 3 + [7.0] * 3


def test_a_failed_round_is_booked_and_the_rest_gets_more_noise(
    federate: Any, resume: Any, events: Any, tmp_path: Path
) -> None:
    def one_answers(message: Message, reply: Message) -> Message:
        if is_train(message) and message.metadata.group_id == "2" and message.metadata.dst_node_id > 1:
            raise KeyboardInterrupt
        return reply

    settings = SITES | {"site_privacy__noise_multiplier": 0.0, "site_privacy__epsilon": 5.0, **PRIVATE}
    with pytest.raises(KeyboardInterrupt):
        federate(one_answers, **(settings | {"federation__rounds": 2}))
    folder = resume(tmp_path / "run")
    booked = events(folder, "site_noise")
    assert [event["round"] for event in booked] == [1, 2, 2]
    assert booked[0]["noise_multiplier"] == booked[1]["noise_multiplier"] < booked[2]["noise_multiplier"]
    assert 4.9 < booked[-1]["epsilon"] <= 5.0 < booked[-1]["epsilon_sites"]
    # both promises stand in one statement
    page = " ".join(folder.report_file.read_text().split())
    assert all(event["epsilon"] for event in events(folder, "site_reply"))
    assert "Unit of privacy" in page
    assert f"epsilon {booked[-1]['epsilon_coordinator']:.2f}" in page
    assert load_state(folder.adapter_dir)[0].tensors


def test_too_few_shares_are_never_released(federate: Any, rounds: Rounds, tmp_path: Path) -> None:
    def broken(message: Message, reply: Message) -> Message:
        if is_train(message) and message.metadata.dst_node_id > 1:
            return Message(pack({"error": "the disk is full"}), reply_to=message)
        return reply

    with pytest.raises(RunError, match="2 are needed"):
        federate(broken, **SITES)
    assert not rounds.came
    # the coordinator saw one share all the same
    assert [e["round"] for e in read_events(open_run(tmp_path / "run")) if e["event"] == "site_noise"] == [1]


@pytest.mark.parametrize("multiplier", [1.0, 5.0])
@pytest.mark.parametrize("quorum", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 10])
def test_planned_epsilons_are_dp_accountings(multiplier: float, quorum: int, count: int) -> None:
    config = Config.from_flat({key.replace("__", "."): value for key, value in SITES.items()}).replace(
        federation__sites=8,
        federation__quorum=quorum,
        federation__rounds=count,
        site_privacy__noise_multiplier=multiplier,
    )
    found = planned_whole_sites(config)
    left = math.sqrt((quorum - 1) / quorum) if quorum > 1 else 1.0
    assert found.noise_multiplier == multiplier
    assert found.spent.outsiders == pytest.approx(oracle(multiplier, count), rel=1e-3)
    assert found.spent.sites == pytest.approx(oracle(multiplier * left, count), rel=1e-3)
    assert found.spent.coordinator == pytest.approx(oracle(multiplier / math.sqrt(quorum), count), rel=1e-3)
    at_coordinator = planned_whole_sites(config.replace(site_privacy__noise_at="coordinator")).spent
    assert at_coordinator.outsiders == at_coordinator.sites == found.spent.outsiders
    assert at_coordinator.coordinator is None


def test_a_budget_is_that_towards_outsiders() -> None:
    values = SITES | {"site_privacy__noise_multiplier": 0.0, "site_privacy__epsilon": 3.0}
    values["federation__quorum"] = 3
    found = planned_whole_sites(Config().replace(**values))
    assert 2.95 < found.spent.outsiders <= 3.0
    assert found.spent.coordinator is not None
    assert found.spent.coordinator > found.spent.sites >= found.spent.outsiders


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"site_privacy__quantile": 0.5}, "set it to 0"),
        ({"wire__codec": "float16"}, "use float32"),
        ({"wire__codec": "int8"}, "use float32"),
        ({"wire__codec": "topk:0.1"}, "use float32"),
        ({"strategy__weighting": "examples"}, "use uniform"),
        ({"federation__mode": "local"}, "needs a federation"),
        ({"adapter__basis": "gradient", "adapter__allow_private_basis": True}, "does not cover"),
        ({"adapter__basis": "dp-gradient", **PRIVATE}, "does not cover"),
        ({"site_privacy__noise_at": "nowhere"}, "not one of coordinator, sites"),
        ({"adapter__method": "lora", "strategy__name": "fedsa"}, "shares all it trains"),
        ({"adapter__method": "lora", "strategy__name": "flora"}, "more than average"),
    ],
)
def test_what_cannot_be_promised_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_recipe(Config().replace(model__name="tiny-llama", **(SITES | settings)))


@pytest.mark.parametrize("basis", ["gradient", "dp-gradient"])
def test_a_basis_from_one_sites_records_is_refused_wherever_the_noise_is(basis: str) -> None:
    settings = SITES | PRIVATE | {"site_privacy__noise_at": "coordinator", "adapter__basis": basis}
    with pytest.raises(FedllmError, match="site_privacy does not cover"):
        Config().replace(**settings)


def test_what_goes_down_may_be_compressed() -> None:
    check_recipe(Config().replace(model__name="tiny-llama", wire__codec_down="int8", **SITES))


def test_a_sites_change_is_its_own_and_not_what_went_down_compressed(federate: Any, rounds: Rounds) -> None:
    at_coordinator = SITES | {"site_privacy__noise_at": "coordinator"}
    federate(train__lr=1e-9, wire__codec_down="int4", **at_coordinator)
    # the second round starts from noise, which the codec rounds
    assert norm_of(rounds.came[0]) > 0.1 * NORM
    assert all(norm_of(change) < 1e-3 * NORM for change in rounds.sent[1])
