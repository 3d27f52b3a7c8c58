"""Runs that are cut short, nodes that come late or claim what they are not, replies that cannot be read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Error, Message
from safetensors.numpy import load_file, save_file

from fedllm.errors import RunError
from fedllm.federation import server
from fedllm.federation.inprocess import InProcessGrid
from fedllm.federation.records import pack, unpack
from fedllm.federation.run import BASIS_FILE
from fedllm.privacy.ledger import Ledger
from fedllm.runs.folder import RunFolder, locked, open_run

PRIVATE = {"privacy__enabled": True, "privacy__epsilon": 6.0, "privacy__delta": 1e-4}


def kind(message: Message) -> str:
    return message.metadata.message_type


def changed(message: Message, reply: Message, **notes: Any) -> Message:
    """Return a reply with other notes."""
    found, parts = unpack(reply.content)
    return Message(pack(dict(found) | notes, parts), reply_to=message)


def site_of(reply: Message) -> str:
    return str(unpack(reply.content)[0].get("site", ""))


def adapter(folder: RunFolder) -> dict[str, np.ndarray]:
    return load_file(folder.adapter_dir / "adapter_model.safetensors")


def stop_in_round(number: int) -> Any:
    def tamper(message: Message, reply: Message) -> Message:
        if kind(message) == "train" and message.metadata.group_id == str(number):
            raise KeyboardInterrupt
        return reply

    return tamper


@pytest.mark.parametrize("basis", ["public-svd", "gradient"])
def test_a_run_goes_on_with_the_basis_it_had_before_its_first_checkpoint(
    federate: Any, resume: Any, basis: str
) -> None:
    settings = {"adapter__basis": basis, "adapter__allow_private_basis": basis == "gradient"}
    whole = federate(dir="whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        federate(stop_in_round(1), **settings)
    rest = resume(whole.path.with_name("run"))
    one, other = adapter(whole), adapter(rest)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("round", [1, 2])
def test_a_run_that_began_from_an_adapter_resumes_with_that_adapters_basis(
    federate: Any, resume: Any, events: Any, round: int, tmp_path: Path
) -> None:
    private = PRIVATE | {"adapter__basis": "dp-gradient", "adapter__basis_noise": 2.0}
    first = federate(dir="first", adapter__basis_records=6, **private)
    settings = private | {"adapter__init": str(first.adapter_dir), "adapter__basis_records": 6}
    with pytest.raises(KeyboardInterrupt):
        federate(stop_in_round(round), **settings)
    basis = load_file(first.adapter_dir / BASIS_FILE)
    if round == 2:
        # after a round the run's own folder is enough
        shutil.rmtree(first.path)
    folder = resume(tmp_path / "run")
    for name in ("site-0", "site-1", "site-2"):
        entries = Ledger(folder.site_dir(name) / "ledger.sqlite").entries()
        # round 0 is what making a basis costs
        assert 0 not in [entry.round for entry in entries]
    kept = load_file(folder.adapter_dir / BASIS_FILE)
    assert all(np.array_equal(kept[key], value) for key, value in basis.items())


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_an_adapter_without_its_basis_is_refused(federate: Any, damage: str) -> None:
    first = federate(dir="first", adapter__basis="public-svd", federation__rounds=1)
    path = first.adapter_dir / BASIS_FILE
    if damage == "other":
        save_file({key: -value for key, value in load_file(path).items()}, path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.unlink()
    with pytest.raises(RunError, match=f"{BASIS_FILE} .*; restore it"):
        federate(adapter__basis="public-svd", adapter__init=str(first.adapter_dir))


def test_a_run_that_was_stopped_before_it_began_keeps_one_name(
    federate: Any, resume: Any, events: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def never(run: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(server, "announce", never)
        with pytest.raises(KeyboardInterrupt):
            federate()
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path / "run", tamper=stop_in_round(2))
    (named,) = events(open_run(tmp_path / "run"), "run_started")
    folder = resume(tmp_path / "run")
    assert events(folder, "run_started") == [named]
    assert events(folder, "run_finished")


@pytest.mark.parametrize("named", ["relative", "", "moved"])
def test_simulated_sites_find_their_folders_on_resume_wherever_the_run_is(
    federate: Any, resume: Any, events: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str
) -> None:
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    settings = {"adapter__method": "lora", "strategy__name": "fedsa"} | PRIVATE
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            federate(stop_in_round(2), **settings, run__dir=named)
    (begun,) = (tmp_path / "home" / "runs").iterdir() if not named else [tmp_path / named]
    if named == "moved":
        begun = begun.rename(tmp_path / "elsewhere")
    folder = resume(begun)
    entries = Ledger(folder.site_dir("site-0") / "ledger.sqlite").entries()
    # the round that was cut short stays booked
    assert [entry.round for entry in entries] == [1, 2, 2]
    assert all(event["accepted"] for event in events(folder, "site_reply"))
    assert not (tmp_path / "moved").exists()


def test_two_processes_never_work_on_one_run(federate: Any, resume: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        federate(stop_in_round(2))
    folder = open_run(tmp_path / "run")
    before = folder.events_file.read_bytes()
    with locked(folder), pytest.raises(RunError, match="another process works on this run"):
        resume(folder.path)
    assert folder.events_file.read_bytes() == before
    resume(folder.path)


def test_one_site_with_other_weights_does_not_decide_for_all(federate: Any, events: Any) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if kind(message) == "train" and message.metadata.group_id == "1" and site_of(reply) == "site-0":
            return changed(message, reply, weights="f" * 16)
        return reply

    folder = federate(tamper)
    refused = [event for event in events(folder, "site_reply") if not event["accepted"]]
    assert [(event["round"], event["site"]) for event in refused] == [(1, "site-0")]
    assert "its base weights (ffffffffffffffff)" in refused[0]["reason"]


class LateGrid(InProcessGrid):
    """The first node comes alone; the others a moment later."""

    def __init__(self, app: Any, nodes: int) -> None:
        super().__init__(app, nodes=nodes)
        self.asked = 0

    def get_node_ids(self) -> Iterable[int]:
        self.asked += 1
        return list(super().get_node_ids())[: 1 if self.asked == 1 else None]


def test_a_refused_node_that_came_first_does_not_end_the_run(federate: Any, events: Any) -> None:
    greeted: list[int] = []

    def tamper(message: Message, reply: Message) -> Message:
        if message.metadata.dst_node_id == 1:
            greeted.append(1)
            return changed(message, reply, error="over budget")
        return reply

    folder = federate(tamper, carrier=LateGrid, federation__quorum=2)
    # it was asked once, and its seat went to those who came later
    assert greeted == [1]
    assert [event["accepted"] for event in events(folder, "round_finished")] == [3, 3]


@pytest.mark.parametrize("failing", ["once", "always"])
def test_a_node_whose_hello_failed_is_greeted_again_in_the_next_round(
    federate: Any, events: Any, failing: str
) -> None:
    failures: list[int] = []

    def tamper(message: Message, reply: Message) -> Message:
        asked = kind(message) == "query.hello" and message.metadata.dst_node_id == 2
        if asked and (failing == "always" or not failures):
            failures.append(2)
            return Message(error=Error(code=0, reason="x"), reply_to=message)
        return reply

    folder = federate(tamper, federation__rounds=3)
    # once at the start, and once before every later round
    assert len(failures) == (1 if failing == "once" else 3)
    accepted = [event["accepted"] for event in events(folder, "round_finished")]
    assert accepted == ([2, 3, 3] if failing == "once" else [2, 2, 2])
    assert [e["round"] for e in events(folder, "round_finished")] == [1, 2, 3]


def test_a_node_that_only_says_it_is_simulated_is_refused(federate: Any, events: Any) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if kind(message) == "query.hello" and site_of(reply) == "site-2":
            return changed(message, reply, simulated=False)
        return reply

    folder = federate(tamper)
    (warning,) = events(folder, "warning")
    assert "simulated and real sites do not train together" in warning["text"]
    assert [event["accepted"] for event in events(folder, "round_finished")] == [2, 2]


def test_no_site_takes_anothers_name(federate: Any, events: Any) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if kind(message) == "query.hello" and site_of(reply) == "site-2":
            return changed(message, reply, site="site-0")
        return reply

    folder = federate(tamper)
    (warning,) = events(folder, "warning")
    assert "another node joined under this name" in warning["text"]


def test_a_name_that_no_policy_could_have_is_refused(federate: Any, events: Any) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if kind(message) == "query.hello" and site_of(reply) == "site-2":
            return changed(message, reply, site="a[/b]")
        return reply

    folder = federate(tamper, federation__rounds=1)
    assert "cannot name one: use at most 64 letters" in events(folder, "warning")[0]["text"]
    assert [event["site"] for event in events(folder, "site_joined")] == ["site-0", "site-1"]


def test_no_site_speaks_for_anothers_ledger(federate: Any) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if kind(message) == "query.hello":
            return changed(message, reply, ledger_tag="the same")
        return reply

    folder = federate(tamper, **PRIVATE)
    heads = json.loads((folder.path / "ledger_heads.json").read_text())
    assert sorted(heads) == ["site-0/the same", "site-1/the same", "site-2/the same"]
    assert len(set(heads.values())) == 3


@pytest.mark.parametrize(
    ("note", "value"),
    [
        ("projections", ["near", "far"]),
        ("projections", [float("nan")] * 4),
        ("data", 5),
        ("ledger_tag", [1, 2]),
        ("site", 7),
        ("rank", "three"),
    ],
)
def test_a_hello_that_cannot_be_read_sets_its_node_alone_aside(
    federate: Any, events: Any, note: str, value: Any
) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if kind(message) == "query.hello" and site_of(reply) == "site-1":
            return changed(message, reply, **{note: value})
        return reply

    folder = federate(tamper, federation__rounds=1)
    (warning,) = events(folder, "warning")
    assert f"set aside: the note '{note}' is not" in warning["text"]
    assert [event["accepted"] for event in events(folder, "round_finished")] == [2]


@pytest.mark.parametrize("damage", ["payload", "numbers", "ledger"])
def test_a_damaged_basis_is_set_aside_and_the_next_site_makes_one(
    federate: Any, events: Any, damage: str
) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if kind(message) != "query.make_basis" or site_of(reply) != "site-0":
            return reply
        notes, parts = unpack(reply.content)
        payload = parts["basis"]
        if damage == "payload":
            payload = payload[:-9]
        if damage == "numbers":
            payload = payload[:-4] + np.float32(np.inf).tobytes()
        if damage == "ledger":
            notes["ledger"] = 5
        return Message(pack(notes, {"basis": payload}), reply_to=message)

    folder = federate(tamper, federation__rounds=1, adapter__basis="public-svd")
    (warning,) = events(folder, "warning")
    assert warning["text"].startswith("site-0 made no basis: the ")
    assert [event["accepted"] for event in events(folder, "round_finished")] == [3]


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_a_kept_basis_that_is_damaged_is_sent_again(
    federate: Any, events: Any, tmp_path: Path, damage: str
) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if kind(message) == "train" and message.metadata.group_id == "1" and site_of(reply) == "site-1":
            (kept,) = (tmp_path / "run" / "sites" / "site-1" / "basis").iterdir()
            found = kept.read_bytes()
            kept.write_bytes(found[:-9] if damage == "cut" else found[:-4] + np.float32(7).tobytes())
        return reply

    folder = federate(tamper, adapter__basis="public-svd", federation__rounds=3)
    replies = [event for event in events(folder, "site_reply") if event["site"] == "site-1"]
    assert [event["accepted"] for event in replies] == [True, False, True]
    assert "shipped basis" in replies[1]["reason"]


class LosingGrid(InProcessGrid):
    """In the second round two messages are not stored, and have an empty name, as Flower's then have."""

    def lost(self, place: int, message: Message) -> bool:
        return message.metadata.group_id == "2" and place > 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        asked = list(messages)
        lost = [self.lost(place, message) for place, message in enumerate(asked)]
        taken = iter(super().push_messages([m for m, gone in zip(asked, lost, strict=True) if not gone]))
        return ["" if gone else next(taken) for gone in lost]


class MovingGrid(LosingGrid):
    """The third node goes after the first round; a fourth one comes at once, or a round earlier."""

    early = False

    def __init__(self, app: Any, nodes: int) -> None:
        super().__init__(app, nodes=nodes + 1)
        self.trained = False

    def get_node_ids(self) -> Iterable[int]:
        if self.trained:
            return [1, 2, 4]
        return [1, 2, 3, 4] if self.early else [1, 2, 3]

    def lost(self, place: int, message: Message) -> bool:
        return message.metadata.dst_node_id not in self.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        asked = list(messages)
        names = super().push_messages(asked)
        self.trained = self.trained or any(kind(message) == "train" for message in asked)
        return names


class EarlyGrid(MovingGrid):
    early = True


@pytest.mark.parametrize("grid", [MovingGrid, EarlyGrid])
def test_a_site_comes_back_from_another_node(federate: Any, events: Any, grid: type[InProcessGrid]) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if grid is EarlyGrid and kind(message) == "query.hello" and message.metadata.dst_node_id == 4:
            return changed(message, reply, site="site-2")
        return reply

    # a matrix that rests is kept at the sites, and was sent to the node that has gone
    kept = {"adapter__method": "lora", "strategy__name": "rolora"}
    sites = 4 if grid is EarlyGrid else 3
    folder = federate(tamper, carrier=grid, federation__rounds=3, federation__sites=sites, **PRIVATE, **kept)
    assert [e["node"] for e in events(folder, "site_joined") if e["site"] == "site-2"] == [3, 4]
    replies = [e for e in events(folder, "site_reply") if e["site"] == "site-2"]
    assert [event["accepted"] for event in replies] == [True, True, True]


def test_another_ledger_does_not_come_back_under_a_sites_name(federate: Any, events: Any) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if kind(message) == "query.hello" and message.metadata.dst_node_id == 4:
            return changed(message, reply, ledger_tag="another")
        return reply

    folder = federate(tamper, carrier=MovingGrid, **PRIVATE)
    first, *_ = events(folder, "warning")
    assert "site-2: it came back with another privacy ledger" in first["text"]
    assert [event["accepted"] for event in events(folder, "round_finished")] == [3, 2]


class FirstLosingGrid(LosingGrid):
    def lost(self, place: int, message: Message) -> bool:
        return message.metadata.group_id == "2" and place == 0


def test_who_made_a_private_basis_and_missed_a_round_pays_for_it(federate: Any) -> None:
    basis = {"adapter__basis": "dp-gradient", "adapter__basis_noise": 1.0, "adapter__basis_records": 6}
    folder = federate(carrier=FirstLosingGrid, federation__rounds=3, **PRIVATE, **basis)
    made, *rounds = Ledger(folder.site_dir("site-0") / "ledger.sqlite").entries()
    assert [made.round, *(entry.round for entry in rounds)] == [0, 1, 3]
    assert rounds[0].noise_multiplier == rounds[1].noise_multiplier


class RefusingGrid(LosingGrid):
    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = list(super().push_messages(messages))
        return [] if "" in names else names


@pytest.mark.parametrize(("grid", "lost"), [(LosingGrid, 2), (RefusingGrid, 3)])
def test_what_is_not_delivered_is_not_waited_for(
    federate: Any, events: Any, tmp_path: Path, grid: type[InProcessGrid], lost: int
) -> None:
    with pytest.raises(RunError, match=f"round 2: {3 - lost} of 3 .*could not be delivered"):
        federate(carrier=grid, federation__deadline=600.0)
    folder = open_run(tmp_path / "run")
    (failed,) = [e for e in events(folder, "site_reply") if e["round"] == 2 and e["site"] == "site-2"]
    assert (failed["bytes_down"], failed["seconds"]) == (0, 0.0)


class PickyGrid(InProcessGrid):
    """Pulling raises on one certain reply, as Flower's does on a bad one; all asked for are gone."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        pulled = list(super().pull_messages(message_ids))
        if any(m.metadata.src_node_id == 2 and m.metadata.group_id == "2" for m in pulled):
            raise ValueError("cannot be inflated")
        return pulled


def test_a_reply_that_flower_cannot_read_is_set_aside(federate: Any, events: Any) -> None:
    folder = federate(carrier=PickyGrid)
    refused = [event for event in events(folder, "site_reply") if not event["accepted"]]
    assert [(event["round"], event["reason"]) for event in refused] == [(2, "unreadable reply")]
    assert events(folder, "run_finished")


def test_a_sites_seconds_are_its_own(federate: Any, events: Any) -> None:
    folder = federate()
    for finished in events(folder, "round_finished"):
        replies = [e for e in events(folder, "site_reply") if e["round"] == finished["round"]]
        assert 0 < sum(event["seconds"] for event in replies) <= finished["seconds"]


class BusyGrid(InProcessGrid):
    """The first poll for each reply fails at the server, and the reply stays there."""

    def __init__(self, app: Any, nodes: int) -> None:
        super().__init__(app, nodes=nodes)
        self.polled: set[str] = set()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = set(message_ids)
        if asked - self.polled:
            self.polled |= asked
            request = httpx.Request("POST", "http://superlink")
            raise httpx.HTTPStatusError("500", request=request, response=httpx.Response(500, request=request))
        return super().pull_messages(asked)


def test_a_poll_that_fails_is_repeated(federate: Any, events: Any) -> None:
    folder = federate(carrier=BusyGrid)
    assert all(event["accepted"] for event in events(folder, "site_reply"))
    assert events(folder, "run_finished")


def test_a_run_is_not_finished_without_its_final_evaluation(
    federate: Any, resume: Any, events: Any, tmp_path: Path
) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if kind(message) == "evaluate" and site_of(reply) != "site-1":
            return Message(error=Error(code=0, reason="x"), reply_to=message)
        return reply

    with pytest.raises(RunError, match="1 of 3 sites answered, 2 are needed"):
        federate(tamper)
    folder = resume(tmp_path / "run")
    assert events(folder, "run_finished")
    assert {e["site"] for e in events(folder, "evaluated")} == {"site-0", "site-1", "site-2"}


class EagerGrid(InProcessGrid):
    """A server that asks for a round which no projection has counted."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        asked = []
        for message in messages:
            notes, parts = unpack(message.content)
            if kind(message) == "train" and message.metadata.group_id == "2":
                message = Message(
                    pack(dict(notes) | {"round": 3}, parts),
                    dst_node_id=message.metadata.dst_node_id,
                    message_type="train",
                    group_id="2",
                )
            asked.append(message)
        return super().push_messages(asked)


def test_a_round_beyond_the_recipes_is_refused_and_books_nothing(federate: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="round 3 is not one of the recipe's 2"):
        federate(carrier=EagerGrid, **PRIVATE)
    ledger = Ledger(tmp_path / "run" / "sites" / "site-0" / "ledger.sqlite")
    assert [entry.round for entry in ledger.entries()] == [1]
