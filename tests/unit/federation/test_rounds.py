"""The round loop in one process: bad replies, quorum, resume, privacy, bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import transformers
from dp_accounting import get_epsilon_gaussian
from flwr.app import Error, Message
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.numpy import load_file
from threadpoolctl import threadpool_info

from fedllm.adapters.export import save_peft_adapter
from fedllm.config import Config
from fedllm.errors import FedllmError, MismatchError, RunError
from fedllm.federation import client as client_module
from fedllm.federation import noised
from fedllm.federation.records import pack, unpack, wire_size
from fedllm.federation.run import start_run
from fedllm.models.load import load_base, resolve
from fedllm.privacy.ledger import Ledger
from fedllm.runs.checkpoints import latest_checkpoint
from fedllm.runs.folder import create_run, load_config, open_run
from fedllm.settings import ModelSettings


def is_train(message: Message) -> bool:
    return message.metadata.message_type == "train"


def site_of(reply: Message) -> str:
    return str(unpack(reply.content)[0]["site"])


def tensors(folder: Any) -> dict[str, np.ndarray]:
    return load_file(folder.adapter_dir / "adapter_model.safetensors")


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("method", ["lora", "ffa", "fed-sb"])
def test_a_run_leaves_a_complete_folder_and_repeats_itself(federate: Any, method: str) -> None:
    one = federate(dir="one", adapter__method=method)
    for path in (one.config_file, one.events_file, one.metrics_file, one.manifest_file, one.report_file):
        assert path.stat().st_size > 0
    two = federate(dir="two", adapter__method=method)
    assert same(tensors(one), tensors(two))
    other = federate(dir="three", adapter__method=method, run__seed=43)
    assert not same(tensors(one), tensors(other))
    base = load_base(Config.from_flat({"model.name": "tiny-llama", "model.dtype": "float32"}).model)
    assert PeftModel.from_pretrained(base, one.adapter_dir)


def test_the_server_calls_blas_with_one_thread(federate: Any) -> None:
    # with several, a QR waits for ever when another thread forks, as Ray's start does
    seen: set[int] = set()

    def look(message: Message, reply: Message) -> Message:
        seen.update(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return reply

    federate(look, federation__rounds=1)
    assert seen == {1}


def test_one_site_equals_the_mean_of_identical_updates(federate: Any, events: Any) -> None:
    folder = federate(federation__sites=1)
    assert [event["accepted"] for event in events(folder, "round_finished")] == [1, 1]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("error", "the site's process failed"),
        ("nan", "NaN or infinity in the adapter"),
        ("cut", "bytes of numbers, expected"),
        ("big", "oversized payload"),
        ("shape", "not those agreed on"),
        ("none", "carries no adapter"),
        ("name", "carries another site's name"),
        ("weights", "its base weights"),
        ("loss", "not a finite number"),
        ("notes", "carries no notes"),
    ],
)
def test_a_bad_reply_is_set_aside_and_the_round_goes_on(
    federate: Any, events: Any, kind: str, reason: str
) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if not is_train(message) or message.metadata.group_id != "2" or site_of(reply) != "site-1":
            return reply
        notes, parts = unpack(reply.content)
        payload = parts["adapter"]
        if kind == "error":
            return Message(error=Error(code=0, reason="x"), reply_to=message)
        if kind == "notes":
            content = pack({}, parts)
            del content["notes"]
            return Message(content, reply_to=message)
        if kind == "nan":
            payload = payload[:-4] + np.float32(np.nan).tobytes()
        if kind == "cut":
            payload = payload[: len(payload) // 2]
        if kind == "big":
            payload += bytes(1_000_000)
        if kind == "shape":
            start = payload.index(b'"layout":"') + len(b'"layout":"')
            payload = payload[:start] + b"g" + payload[start + 1 :]
        if kind == "name":
            notes["site"] = "site-0"
        if kind == "weights":
            notes["weights"] = "f" * 16
        if kind == "loss":
            notes["loss"] = float("inf")
        return Message(pack(notes, {} if kind == "none" else {"adapter": payload}), reply_to=message)

    folder = federate(tamper)
    bad = [event for event in events(folder, "site_reply") if not event["accepted"]]
    assert [(event["site"], event["round"]) for event in bad] == [("site-1", 2)]
    assert reason in bad[0]["reason"]
    assert [event["accepted"] for event in events(folder, "round_finished")] == [3, 2]
    assert events(folder, "run_finished")


def test_below_the_quorum_the_run_fails_resumable(federate: Any, resume: Any, events: Any) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if is_train(message) and message.metadata.group_id == "2" and site_of(reply) != "site-2":
            return Message(error=Error(code=0, reason="x"), reply_to=message)
        return reply

    with pytest.raises(
        RunError, match=r"round 2: 1 of 3 replies were valid, 2 are needed: the site's process"
    ):
        federate(tamper)
    undisturbed = federate(dir="whole")
    broken = undisturbed.path.parent / "run"
    (failed,) = events(open_run(broken), "run_failed")
    assert f"run.resume={broken}" in failed["reason"]
    resumed = resume(broken)
    assert same(tensors(resumed), tensors(undisturbed))
    assert [event["round"] for event in events(resumed, "run_resumed")] == [2]
    with pytest.raises(RunError, match="this run is finished"):
        resume(broken)
    assert len(events(resumed, "run_failed")) == 1


def test_a_run_killed_after_its_last_round_is_evaluated_and_exported(
    federate: Any, resume: Any, events: Any
) -> None:
    def stop(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "evaluate":
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        federate(stop)
    undisturbed = federate(dir="whole")
    resumed = resume(undisturbed.path.parent / "run")
    assert same(tensors(resumed), tensors(undisturbed))
    assert len(events(resumed, "round_finished")) == len(events(undisturbed, "round_finished"))
    assert len(events(resumed, "evaluated")) == len(events(undisturbed, "evaluated"))


def test_resume_skips_a_damaged_checkpoint_and_says_so(federate: Any, resume: Any, events: Any) -> None:
    def stop(message: Message, reply: Message) -> Message:
        if is_train(message) and message.metadata.group_id == "3":
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        federate(stop, federation__rounds=3)
    whole = federate(dir="whole", federation__rounds=3)
    broken = whole.path.parent / "run"
    newest = broken / "checkpoints" / "round-0002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7] + b"xxxxxxx")
    resumed = resume(broken)
    assert same(tensors(resumed), tensors(whole))
    assert any("round-0002" in event["text"] for event in events(resumed, "warning"))
    assert [event["reason"][:11] for event in events(resumed, "run_failed")] == ["interrupted"]


def test_an_existing_folder_is_refused(federate: Any) -> None:
    federate()
    with pytest.raises(RunError, match=r"run\.resume"):
        federate()


PRIVATE = {
    "privacy__enabled": True,
    "privacy__epsilon": 6.0,
    "privacy__delta": 1e-4,
    "privacy__clipping_norm": 0.5,
}


def test_a_private_run_books_its_spend_and_shows_no_private_metric(federate: Any, events: Any) -> None:
    folder = federate(**PRIVATE)
    replies = events(folder, "site_reply")
    assert all(event["accepted"] for event in replies), replies
    assert all(event["loss"] is None and event["accuracy"] is None for event in replies)
    assert all(event["accuracy"] is None for event in events(folder, "evaluated"))
    final = [event["epsilon"] for event in replies if event["round"] == 2]
    assert all(5.5 < value <= 6.0 for value in final)
    for site in ("site-0", "site-1", "site-2"):
        entries = Ledger(folder.site_dir(site) / "ledger.sqlite").entries()
        assert [(entry.round, entry.steps) for entry in entries] == [(1, 2), (2, 2)]
    assert "withheld" in folder.metrics_file.read_text()
    assert "withheld" in folder.report_file.read_text()
    assert "their metrics stayed at the sites" in (folder.adapter_dir / "README.md").read_text()


def test_only_the_agreed_notes_leave_a_private_site(federate: Any) -> None:
    seen: list[set[str]] = []

    def watch(message: Message, reply: Message) -> Message:
        seen.append(set(unpack(reply.content)[0]))
        return reply

    federate(watch, **PRIVATE)
    # "data" is a hash that only simulated sites, and sites without privacy, tell
    allowed = {
        "site",
        "simulated",
        "fedllm",
        "rank",
        "data",
        "projections",
        "has_basis",
        "weights",
        "epsilon",
        "ledger",
        "ledger_tag",
    }
    assert set().union(*seen) <= allowed


def test_public_heldout_metrics_may_show(federate: Any, events: Any) -> None:
    folder = federate(**PRIVATE, data__heldout_public=True)
    assert all(event["accuracy"] is not None for event in events(folder, "site_reply"))
    assert {event["stage"] for event in events(folder, "evaluated")} == {"base", "final"}
    card = ModelCard.load(folder.adapter_dir / "README.md")
    assert card.data.base_model == "tiny-llama"
    assert "differential-privacy" in card.data.tags
    assert "| site-2 | 4 |" in card.text
    assert "one unit is added or removed" in card.text


def test_a_base_that_is_a_folder_is_called_as_its_folder(federate: Any, tmp_path: Path) -> None:
    model = shutil.copytree(resolve(ModelSettings(name="tiny-llama")), tmp_path / "private" / "ward-model")
    folder = federate(
        model__name=ModelSettings().name, model__path=str(model), adapter__method="lora", federation__rounds=1
    )
    card = ModelCard.load(folder.adapter_dir / "README.md")
    assert card.data.base_model == "ward-model"
    assert json.loads(folder.manifest_file.read_text())["model"]["name"] == "ward-model"
    adapter = json.loads((folder.adapter_dir / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "ward-model"
    for page in (folder.report_file.read_text(), str(card)):
        assert "ward-model" in page
        assert "smollm2" not in page
    for file in (*folder.adapter_dir.iterdir(), folder.manifest_file):
        assert str(model.parent).encode() not in file.read_bytes(), file


def test_a_named_base_keeps_its_name_wherever_it_lies() -> None:
    assert ModelSettings(name="ward/notes-7b", path="/srv/models/x").called == "ward/notes-7b"
    assert ModelSettings(path="/srv/models/x/").called == "x"
    assert ModelSettings().called == ModelSettings().name


def test_a_crash_after_booking_stays_spent_and_the_run_ends_within_budget(
    federate: Any, resume: Any, events: Any
) -> None:
    def stop(message: Message, reply: Message) -> Message:
        if is_train(message) and message.metadata.group_id == "2" and site_of(reply) == "site-2":
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        federate(stop, **PRIVATE)
    folder = resume(Path(federate(dir="spare").path.parent) / "run")
    entries = Ledger(folder.site_dir("site-0") / "ledger.sqlite").entries()
    assert [entry.round for entry in entries] == [1, 2, 2]
    assert entries[2].noise_multiplier > entries[1].noise_multiplier == entries[0].noise_multiplier
    final = [event["epsilon"] for event in events(folder, "site_reply") if event["round"] == 2]
    assert all(value <= 6.0 for value in final)


def test_what_was_booked_before_a_failure_is_seen(
    federate: Any, events: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, one_by_one = client_module.train_round, noised._one_by_one

    def fail(session: Any, tokens: Any, **rest: Any) -> Any:
        if tokens.name == "site-1":
            raise RuntimeError("no memory")
        return train(session, tokens, **rest)

    def fail_at_the_end(tokens: Any) -> Any:
        if tokens.name == "site-2":
            raise RuntimeError("no memory")
        return one_by_one(tokens)

    monkeypatch.setattr(client_module, "train_round", fail)
    monkeypatch.setattr(noised, "_one_by_one", fail_at_the_end)
    folder = federate(**PRIVATE, evaluation__noise_multiplier=4.0)
    heads = json.loads((folder.path / "ledger_heads.json").read_text())
    for site in ("site-1", "site-2"):
        assert Ledger(folder.site_dir(site) / "ledger.sqlite").head in heads.values(), site
    failed = [event for event in events(folder, "site_reply") if not event["accepted"]]
    assert [event["site"] for event in failed] == ["site-1", "site-1"]
    assert 0 < failed[0]["epsilon"] < failed[1]["epsilon"] <= 6.0


def test_an_older_copy_of_a_ledger_is_not_taken_for_the_newest(federate: Any) -> None:
    copy: dict[str, bytes] = {}
    folder: list[Path] = []

    def put_back(message: Message, reply: Message) -> Message:
        notes = unpack(reply.content)[0]
        if is_train(message) and notes.get("site") == "site-1":
            config = Config.from_flat(json.loads(str(unpack(message.content)[0]["config"])))
            file = Path(config.run.dir) / "sites" / "site-1" / "ledger.sqlite"
            folder[:] = [Path(config.run.dir)]
            copy.setdefault("", file.read_bytes())
            if message.metadata.group_id == "2":
                copy["newest"] = Ledger(file).head.encode()
                file.write_bytes(copy[""])
        return reply

    federate(put_back, **PRIVATE)
    heads = json.loads((folder[0] / "ledger_heads.json").read_text())
    assert copy["newest"].decode() in heads.values()
    assert Ledger(folder[0] / "sites" / "site-1" / "ledger.sqlite").head not in heads.values()


def test_a_delta_above_one_over_n_is_refused_before_any_round(federate: Any) -> None:
    with pytest.raises(RunError, match=r"0 of 3 sites joined.*privacy\.delta=0\.01 is too large"):
        federate(**(PRIVATE | {"privacy__delta": 0.01}))


def test_a_private_run_protects_units_as_a_whole(federate: Any, tmp_path: Path) -> None:
    rows = ["text,label,patient", *[f"note {i},{'ab'[i % 2]},p{i // 4}" for i in range(240)]]
    path = tmp_path / "records.csv"
    path.write_text("\n".join(rows))
    file = {"data__source": "file", "data__path": str(path), "data__unit": "patient"}
    single = {"data__source": "file", "data__path": str(path)}
    entries = []
    for name, data in (("units", file), ("records", single)):
        folder = federate(dir=name, **PRIVATE, **data, federation__sites=1)
        entries.append(Ledger(folder.site_dir("site-0") / "ledger.sqlite").entries()[0])
    # the sample rate is that of units, of which there are about a quarter as many
    assert entries[0].sample_rate > 3 * entries[1].sample_rate


def test_a_ledger_that_was_rolled_back_is_refused(federate: Any, resume: Any, events: Any) -> None:
    def lose(message: Message, reply: Message) -> Message:
        if is_train(message) and message.metadata.group_id == "1":
            name = site_of(reply)
            if name == "site-1":
                (folder_of[0] / "sites" / name / "ledger.sqlite").unlink()
        return reply

    folder_of = [Path(federate(dir="spare").path.parent) / "run"]
    folder = federate(lose, **PRIVATE)
    refused = [event for event in events(folder, "site_reply") if not event["accepted"]]
    assert [(event["site"], event["round"]) for event in refused] == [("site-1", 2)]
    assert "lost, rolled back or replaced" in refused[0]["reason"]


def test_a_value_outside_the_list_does_not_leave(federate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = client_module.require_released

    def forgetful(names: Any, **options: Any) -> None:
        real([*names, "gradient_norm"], **options)

    monkeypatch.setattr(client_module, "require_released", forgetful)
    with pytest.raises(RunError, match="'gradient_norm' may not leave a site in a private run"):
        federate(**PRIVATE)


@pytest.mark.parametrize(
    "settings",
    [
        {"privacy__relation": "replace-one"},
        {"privacy__relation": "zero-out-one", "privacy__batch_cap": True},
        {"privacy__noise": "discrete-gaussian"},
        {"train__optimizer": "adam-bc"},
        {"train__optimizer": "sgd"},
        {"privacy__engine": "opacus"},
    ],
)
def test_private_variants_run_within_their_epsilon(settings: Any, federate: Any, events: Any) -> None:
    folder = federate(**PRIVATE, **settings)
    replies = events(folder, "site_reply")
    assert all(event["accepted"] for event in replies), replies
    assert all(5.4 < event["epsilon"] <= 6.0 for event in replies if event["round"] == 2)


def test_public_svd_is_made_at_a_site_shipped_once_and_counted(
    federate: Any, resume: Any, events: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = federate(adapter__basis="public-svd")
    shipped = [event for event in events(folder, "traffic") if event["stage"] == "basis"]
    numbers = 4 * 3 * (4 * 32 + 2 * (32 + 16) + 3 * (32 + 64))
    assert numbers < sum(event["bytes_up"] for event in shipped) < 1.2 * numbers + 4096
    assert 3 * numbers < sum(event["bytes_down"] for event in shipped)
    checkpoint, _ = latest_checkpoint(folder)
    assert checkpoint is not None
    assert checkpoint.state.spec.basis.startswith("shipped:")
    again = federate(dir="again", adapter__basis="public-svd", adapter__init=str(folder.adapter_dir))
    assert again.report_file.is_file()


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_quantised_base_gives_a_basis_too(federate: Any, kind: str) -> None:
    one = {"federation__sites": 1, "federation__rounds": 1}
    folder = federate(adapter__basis="public-svd", model__quantization=kind, **one)
    assert PeftModel.from_pretrained(load_base(load_config(folder).model), folder.adapter_dir)


def test_going_on_from_an_adapter_and_refusing_another_form(federate: Any, events: Any) -> None:
    first = federate()
    second = federate(dir="second", run__seed=7, adapter__init=str(first.adapter_dir))
    assert not same(tensors(first), tensors(second))
    base_first = events(first, "site_reply")[0]["loss"]
    assert base_first is not None
    with pytest.raises(MismatchError, match=r"adapter.init: that adapter's rank is 3, the recipe's is 4"):
        federate(dir="third", adapter__rank=4, adapter__init=str(first.adapter_dir))
    with pytest.raises(RunError, match="holds no fedllm_state"):
        federate(dir="fourth", adapter__init=str(first.path))


def test_bytes_are_those_of_the_serialised_messages(federate: Any, events: Any) -> None:
    sizes: dict[tuple[str, str], tuple[int, int]] = {}

    def watch(message: Message, reply: Message) -> Message:
        if is_train(message):
            key = (message.metadata.group_id, site_of(reply))
            sizes[key] = (wire_size(message.content), wire_size(reply.content))
        return reply

    folder = federate(watch)
    for event in events(folder, "site_reply"):
        down, up = sizes[str(event["round"]), event["site"]]
        assert (event["bytes_down"], event["bytes_up"]) == (down, up)
    finished = events(folder, "round_finished")[0]
    assert finished["bytes_up"] == sum(up for (group, _), (_, up) in sizes.items() if group == "1")


def test_the_server_never_loads_base_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def forbidden(*arguments: object, **options: object) -> None:
        pytest.fail("the server loaded base weights")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", forbidden)
    monkeypatch.setattr(safetensors.torch, "load_file", forbidden)
    for method in ("lora", "ffa", "fed-sb"):
        values = {"model.name": "tiny-llama", "adapter.method": method, "run.dir": str(tmp_path / method)}
        config = Config.from_flat(values)
        run = start_run(config, create_run(config))
        assert run.basis is not None
        save_peft_adapter(run.state, run.basis, tmp_path / f"{method}-out", base_model="x")
        assert (tmp_path / f"{method}-out" / "adapter_model.safetensors").is_file()


SITES = {
    "site_privacy__enabled": True,
    "site_privacy__noise_multiplier": 1.0,
    "site_privacy__clipping_norm": 0.05,
}


def test_whole_sites_are_noised_booked_and_stated(federate: Any, events: Any) -> None:
    plain, noised = federate(dir="plain"), federate(dir="noised", **SITES)
    assert not same(tensors(plain), tensors(noised))
    spent = [event["epsilon"] for event in events(noised, "site_noise")]
    expected = [get_epsilon_gaussian(1 / rounds**0.5, 1e-5) for rounds in (1, 2)]
    assert spent == pytest.approx(expected, rel=1e-3)
    assert not events(noised, "diagnosed")
    assert "Whole sites, a promise of its own" in noised.report_file.read_text()
    assert "Single records are not protected" in noised.report_file.read_text()


def test_whole_sites_calibrate_adapt_and_resume_within_their_budget(
    federate: Any, resume: Any, events: Any
) -> None:
    def stop(message: Message, reply: Message) -> Message:
        if is_train(message) and message.metadata.group_id == "2":
            raise KeyboardInterrupt
        return reply

    settings = {
        "site_privacy__enabled": True,
        "site_privacy__epsilon": 5.0,
        "site_privacy__quantile": 0.5,
        "federation__rounds": 3,
        **PRIVATE,
    }
    with pytest.raises(KeyboardInterrupt):
        federate(stop, **settings)
    folder = resume(Path(federate(dir="spare").path.parent) / "run")
    noised = events(folder, "site_noise")
    assert [event["round"] for event in noised] == [1, 2, 3]
    assert 4.9 < noised[-1]["epsilon"] <= 5.0
    norms = [event["clipping_norm"] for event in noised]
    # a step up may undo a step down
    assert norms[0] != norms[1] != norms[2]
    assert all(event["accepted"] for event in events(folder, "site_reply"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SITES | {"adapter__method": "lora", "strategy__name": "fedex"}, "more than average what sites send"),
        (SITES | {"site_privacy__epsilon": 3.0}, "give exactly one of them"),
        (SITES | {"site_privacy__clipping_norm": 0.0}, "clipping_norm: must be between"),
        (SITES | {"site_privacy__delta": 0.0}, "delta above 0"),
        (SITES | {"federation__mode": "local"}, "needs a federation"),
    ],
)
def test_site_privacy_refuses_what_it_cannot_promise(settings: Any, message: str, federate: Any) -> None:
    with pytest.raises(FedllmError, match=message):
        federate(**settings)
