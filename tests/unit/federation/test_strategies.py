"""Every strategy, adapter, codec and mode in a small federation: results, resume, bytes, refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message
from peft import PeftModel
from safetensors.numpy import load_file

from fedllm.adapters import METHODS
from fedllm.adapters.export import load_state
from fedllm.adapters.state import AdapterState
from fedllm.aggregation import RULES, Outcome
from fedllm.aggregation.lowrank import LowRank, svd
from fedllm.config import Config
from fedllm.errors import ConfigError, MismatchError, RunError, WireError
from fedllm.federation import local
from fedllm.federation.blobs import BlobStore, digest
from fedllm.federation.estimate import estimate
from fedllm.federation.generate import export_adapter
from fedllm.federation.plan import check_recipe
from fedllm.federation.records import pack, unpack
from fedllm.models.load import load_base
from fedllm.privacy.ledger import Ledger
from fedllm.runs.folder import RunFolder
from fedllm.settings import ADAPTERS, SERVER_OPTIMIZERS, STRATEGIES
from fedllm.wire import encode_with_feedback
from strategies import STRATEGIES as CLASSES
from strategies.base import AdapterStrategy

RANK = 3
PRIVATE = {"privacy__enabled": True, "privacy__epsilon": 6.0, "privacy__delta": 1e-4}
DOWN = ("int4", "topk:0.25")
#: Settings under which training changes nothing that a score would show.
STILL = {"train__lr": 1e-12, "evaluation__every": 0}
ADAPTER_OF = {"ffa": "ffa", "fed-sb": "fed-sb", "ravan": "ravan", "average": "hydra"}


def options(name: str) -> dict[str, Any]:
    return {"strategy__name": name, "adapter__method": ADAPTER_OF.get(name, "lora"), "adapter__heads": 2}


def exported(folder: RunFolder) -> dict[str, LowRank]:
    """Return module -> the whole exported update."""
    tensors = load_file(folder.adapter_dir / "adapter_model.safetensors")
    modules = {key.rpartition(".lora_")[0] for key in tensors if ".lora_" in key}
    # exported adapters carry their scale, so PEFT's own is 1
    return {m: LowRank(tensors[f"{m}.lora_B.weight"], tensors[f"{m}.lora_A.weight"]) for m in sorted(modules)}


def interrupted(round: int) -> Any:
    def tamper(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and message.metadata.group_id == str(round):
            raise KeyboardInterrupt
        return reply

    return tamper


def test_names_agree_everywhere() -> None:
    assert tuple(METHODS) == ADAPTERS
    assert tuple(RULES) == STRATEGIES
    assert set(CLASSES) == set(RULES)
    assert all(CLASSES[name].__name__ == rule.__name__ for name, rule in RULES.items())


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_resumes_bit_for_bit(name: str, federate: Any, resume: Any, events: Any) -> None:
    settings = options(name) | {"federation__rounds": 3, "strategy__oversampling": 6}
    whole = federate(dir="whole", **settings)
    assert [event["accepted"] for event in events(whole, "round_finished")] == [3, 3, 3]
    with pytest.raises(KeyboardInterrupt):
        federate(interrupted(3), **settings)
    resumed = resume(whole.path.parent / "run")
    left, right = (load_state(folder.adapter_dir)[0] for folder in (whole, resumed))
    assert all(np.array_equal(left.tensors[key], right.tensors[key]) for key in left.tensors)
    for folder in (whole, resumed):
        final = [e["accuracy"] for e in events(folder, "evaluated") if e["stage"] == "final"]
        assert len(final) == 3
    scores = [
        sorted((e["site"], e["loss"]) for e in events(folder, "evaluated") if e["stage"] == "final")
        for folder in (whole, resumed)
    ]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("name", ["flora", "fedex", "flexlora", "fedask", "fedit", "florist"])
def test_a_round_is_the_weighted_sum_where_the_rule_says_so(name: str, federate: Any) -> None:
    wide = {"strategy__oversampling": 6, "strategy__energy": 1.0}
    folder = federate(federation__rounds=1, evaluation__every=0, **options(name), **wide)
    # the same local training under FLoRA, which adds up everything exactly
    exact = federate(dir="exact", federation__rounds=1, evaluation__every=0, **options("flora"))
    found, sums = exported(folder), exported(exact)
    for module, total in sums.items():
        dense = total.up @ total.down
        ours = found[module].up @ found[module].down
        left, values, right = svd(total)
        best = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
        if name in ("flora", "fedex", "florist"):
            assert np.allclose(ours, dense, atol=1e-6)
        elif name in ("flexlora", "fedask"):
            assert np.allclose(ours, best, atol=1e-6)
        else:
            assert not np.allclose(ours, dense, atol=1e-7)


@pytest.mark.parametrize("name", [n for n, rule in RULES.items() if rule.about.unequal_ranks])
def test_sites_may_have_ranks_of_their_own(name: str, federate: Any, events: Any) -> None:
    folder = federate(**options(name), adapter__site_ranks="3,1,2", adapter__alpha=4.0)
    assert [event["accepted"] for event in events(folder, "round_finished")] == [3, 3]
    up = {e["site"]: e["bytes_up"] for e in events(folder, "site_reply") if e["round"] == 1}
    assert up["site-0"] > up["site-2"] > up["site-1"]
    base = load_base(Config.from_flat({"model.name": "tiny-llama", "model.dtype": "float32"}).model)
    assert PeftModel.from_pretrained(base, folder.adapter_dir)


def test_rolora_sends_half_of_lora_both_ways(federate: Any, events: Any) -> None:
    lora = federate(dir="lora", federation__rounds=5, adapter__rank=16, **options("fedit"))
    half = federate(dir="half", federation__rounds=5, adapter__rank=16, **options("rolora"))

    def later(folder: RunFolder) -> list[tuple[int, int]]:
        return [(e["bytes_up"], e["bytes_down"]) for e in events(folder, "round_finished")][2:4]

    whole, alternating = np.sum(later(lora), axis=0), np.sum(later(half), axis=0)
    assert (alternating < 0.6 * whole).all(), (alternating, whole)


def test_a_site_that_lost_what_it_kept_is_sent_it_again(federate: Any, events: Any, tmp_path: Path) -> None:
    def lose(message: Message, reply: Message) -> Message:
        notes, _ = unpack(reply.content)
        if message.metadata.group_id == "1" and notes["site"] == "site-1":
            for path in (tmp_path / "run" / "sites" / "site-1" / "kept").glob("*/*"):
                path.unlink()
        return reply

    folder = federate(lose, federation__rounds=4, **options("rolora"))
    bad = [e for e in events(folder, "site_reply") if not e["accepted"]]
    assert [(e["site"], e["round"]) for e in bad] == [("site-1", 2)]
    assert "missing here; send it again" in bad[0]["reason"]


def test_runs_at_one_site_keep_their_payloads_apart(tmp_path: Path) -> None:
    one, other = digest(b"one"), digest(b"other")
    for run, name, payload in (("0a", one, b"one"), ("0b", other, b"other")):
        assert BlobStore(tmp_path, run).take([name], {name: payload}) == {name: payload}
    assert BlobStore(tmp_path, "0a").take([one], {}) == {one: b"one"}
    assert BlobStore(tmp_path, "0b").take([other], {}) == {other: b"other"}
    for age, run in enumerate(("0a", "0b")):
        os.utime(tmp_path / run, (age, age))
    # a run that still uses what it keeps outlives those that are over
    BlobStore(tmp_path, "0a").take([one], {})
    for run in ("1a", "1b", "1c"):
        BlobStore(tmp_path, run).take([one], {one: b"one"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0a", "1a", "1b", "1c"]
    with pytest.raises(MismatchError, match="missing here; send it again"):
        BlobStore(tmp_path, "0b").take([other], {})
    with pytest.raises(WireError, match="run's id"):
        BlobStore(tmp_path / "kept", "../0a")


def test_fedsa_keeps_b_at_its_site_and_exports_one_adapter_a_site(federate: Any, events: Any) -> None:
    seen: set[str] = set()

    def watch(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train":
            seen.add(str(sorted(unpack(reply.content)[1])))
        return reply

    folder = federate(watch, **options("fedsa"))
    assert not (folder.adapter_dir / "adapter_model.safetensors").exists()
    tensors = [
        load_file(folder.site_dir(name) / "adapter" / "adapter_model.safetensors")
        for name in ("site-0", "site-1")
    ]
    down = [key for key in tensors[0] if "lora_A" in key]
    up = [key for key in tensors[0] if "lora_B" in key]
    assert all(np.array_equal(tensors[0][key], tensors[1][key]) for key in down)
    assert all(not np.array_equal(tensors[0][key], tensors[1][key]) for key in up)
    with pytest.raises(RunError, match="every site has an adapter of its own; name one with --site"):
        export_adapter(folder.path, folder.path.parent / "out")
    assert export_adapter(folder.path, folder.path.parent / "out", site="site-1").is_dir()


def test_modes_are_baselines_of_the_same_recipe(federate: Any, events: Any) -> None:
    alone = federate(dir="alone", federation__mode="local", **options("fedit"))
    assert all(e["bytes_up"] < 400 for e in events(alone, "site_reply"))
    assert len([e for e in events(alone, "evaluated") if e["stage"] == "final"]) == 3
    central = federate(dir="central", federation__mode="central", **options("fedit"))
    assert [e["accepted"] for e in events(central, "round_finished")] == [1, 1]
    assert len([e for e in events(central, "evaluated") if e["stage"] == "final"]) == 3
    # what a site's commonest label comes to does not depend on how the model was trained
    majorities = [
        {(e["site"], e["majority_accuracy"]) for e in events(folder, "evaluated") if e["stage"] == "final"}
        for folder in (alone, central)
    ]
    assert majorities[0] == majorities[1]
    # a federation of one site is training on its own records
    one = {"federation__sites": 1, "adapter__method": "lora"}
    left = federate(dir="one", strategy__name="fedit", **one)
    right = federate(dir="one-central", federation__mode="central", strategy__name="fedit", **one)
    for module, found in exported(left).items():
        other = exported(right)[module]
        assert np.allclose(found.up @ found.down, other.up @ other.down, atol=1e-6)


def test_pooled_records_train_one_adapter_for_all_sites_even_where_matrices_are_personal(
    federate: Any, events: Any
) -> None:
    settings = {"federation__mode": "central", "adapter__method": "lora"}
    pooled = federate(dir="fedsa", strategy__name="fedsa", **settings)
    plain = federate(dir="average", strategy__name="average", **settings)
    left, right = (load_state(folder.adapter_dir)[0] for folder in (pooled, plain))
    assert all(np.array_equal(left.tensors[key], right.tensors[key]) for key in right.tensors)
    assert all(value.any() for value in left.tensors.values())
    scores = [
        {e["site"]: e["loss"] for e in events(folder, "evaluated") if e["stage"] == "final"}
        for folder in (pooled, plain)
    ]
    assert scores[0] == scores[1]
    assert len(scores[0]) == 3


@pytest.mark.parametrize("codec", ["bfloat16", "int8", "int4", "topk:0.25", "topk:0.25+int8"])
def test_codecs_shrink_updates_and_stay_close(codec: str, federate: Any, events: Any) -> None:
    plain = federate(dir="plain", adapter__rank=16, adapter__layers="")
    short = federate(dir="short", adapter__rank=16, adapter__layers="", wire__codec=codec)

    def up(folder: RunFolder) -> int:
        return int(events(folder, "round_finished")[-1]["bytes_up"])

    assert up(short) < 0.65 * up(plain)
    left, right = (load_state(folder.adapter_dir)[0] for folder in (plain, short))
    size = np.sqrt(sum(float((v**2).sum()) for v in left.tensors.values()))
    gap = np.sqrt(sum(float(((left.tensors[k] - right.tensors[k]) ** 2).sum()) for k in left.tensors))
    assert gap < {"bfloat16": 0.01, "int8": 0.02, "int4": 0.2}.get(codec, 1.0) * size
    assert (short.site_dir("site-0") / "memory").is_dir()


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("rolora", {"feedback-A": [2, 4], "feedback-B": [1, 3]}),
        ("fedit", {"feedback-A+B": [1, 2, 3, 4]}),
        ("flexlora", {}),
    ],
)
def test_what_a_codec_leaves_out_is_remembered_by_what_was_sent(
    name: str, held: dict[str, list[int]], federate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[bool] = []

    def watched(delta: AdapterState, memory: AdapterState | None, *, codec: str) -> Any:
        used.append(memory is not None)
        return encode_with_feedback(delta, memory, codec=codec)

    monkeypatch.setattr(local, "encode_with_feedback", watched)
    folder = federate(federation__rounds=4, wire__codec="int4", **options(name))
    found: dict[str, list[int]] = {}
    for path in sorted((folder.site_dir("site-0") / "memory").glob("*/*.safetensors")):
        kind, _, round = path.stem.rpartition("-")
        found.setdefault(kind, []).append(int(round))
    assert found == held
    # only the first message of each kind starts without a memory
    assert used.count(False) == 3 * len(held)


def test_sparse_downloads_follow_flasc(federate: Any, events: Any) -> None:
    both = {"wire__codec": "topk:0.25", "wire__codec_down": "topk:0.5", "federation__rounds": 3}
    sparse = federate(dir="sparse", adapter__rank=16, **both)
    plain = federate(dir="plain", adapter__rank=16, federation__rounds=3)
    down = [events(folder, "round_finished")[-1]["bytes_down"] for folder in (sparse, plain)]
    assert down[0] < 0.8 * down[1]


@pytest.mark.parametrize("name", ["fedit", "rolora"])
def test_what_a_download_leaves_out_is_not_lost_to_the_federation(name: str, federate: Any) -> None:
    # a learning rate of next to nothing: what differs is what the codec did
    still = {"train__lr": 1e-9, "federation__rounds": 3, **options(name)}
    plain = federate(dir="plain", **still)
    states = [load_state(federate(dir=down, wire__codec_down=down, **still).adapter_dir)[0] for down in DOWN]
    kept = load_state(plain.adapter_dir)[0]
    for state in states:
        assert all(np.allclose(state.tensors[key], kept.tensors[key], atol=1e-6) for key in kept.tensors)


@pytest.mark.parametrize("name", ["fedit", "rolora"])
def test_what_is_scored_at_the_end_is_what_is_exported(name: str, federate: Any, events: Any) -> None:
    settings = {"train__lr": 5e-2, "federation__rounds": 1, **options(name)}
    lossy = federate(dir="lossy", wire__codec_down="int4", **settings)
    exact = settings | {"strategy__name": "fedit"} | STILL
    again = federate(dir="again", adapter__init=str(lossy.adapter_dir), **exact)
    losses = [
        {e["site"]: e["loss"] for e in events(folder, "evaluated") if e["stage"] == "final"}
        for folder in (lossy, again)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    sent = [
        sum(e["bytes_down"] for e in events(folder, "traffic") if e["stage"] == "evaluation")
        for folder in (lossy, again)
    ]
    assert sent[0] == pytest.approx(sent[1], rel=0.05)


def test_a_personal_adapter_has_the_federations_own_matrices(federate: Any) -> None:
    folder = federate(wire__codec_down="int4", **options("fedsa"))
    shared, own = (
        load_state(path)[0] for path in (folder.adapter_dir, folder.site_dir("site-1") / "adapter")
    )
    down = [key for key in shared.tensors if key.endswith(".A")]
    assert all(np.array_equal(shared.tensors[key], own.tensors[key]) for key in down)


@pytest.mark.parametrize("optimizer", SERVER_OPTIMIZERS)
def test_server_optimisers_run_and_resume_with_their_moments(
    optimizer: str, federate: Any, resume: Any
) -> None:
    settings = {"federation__rounds": 4, "strategy__server_optimizer": optimizer}
    whole = federate(dir="whole", **settings)
    plain = federate(dir="plain", federation__rounds=4)
    with pytest.raises(KeyboardInterrupt):
        federate(interrupted(3), **settings)
    resumed = resume(whole.path.parent / "run")
    left, right, other = (load_state(folder.adapter_dir)[0] for folder in (whole, resumed, plain))
    assert all(np.array_equal(left.tensors[key], right.tensors[key]) for key in left.tensors)
    assert any(not np.array_equal(left.tensors[key], other.tensors[key]) for key in left.tensors)


@pytest.mark.parametrize("form", ["cosine", "paper"])
def test_fedhyper_at_the_sites(form: str, federate: Any) -> None:
    plain = load_state(federate(dir="plain").adapter_dir)[0]
    hyper = load_state(federate(train__fedhyper=form).adapter_dir)[0]
    assert any(not np.array_equal(plain.tensors[key], hyper.tensors[key]) for key in plain.tensors)


@pytest.mark.parametrize("basis", ["public-gradient", "gradient", "dp-gradient"])
def test_gradient_bases(basis: str, federate: Any, events: Any, tmp_path: Path) -> None:
    public = tmp_path / "public.csv"
    rows = "\n".join(f"public merchant number {i},{'ab'[i % 2]}" for i in range(30))
    public.write_text(f"text,label\n{rows}\n")
    settings: dict[str, Any] = {"adapter__basis": basis, "adapter__basis_records": 6}
    settings |= {
        "public-gradient": {"adapter__basis_path": str(public)},
        "gradient": {"adapter__allow_private_basis": True},
        "dp-gradient": {**PRIVATE, "adapter__basis_noise": 2.0},
    }[basis]
    folder = federate(**settings)
    shipped = [event for event in events(folder, "traffic") if event["stage"] == "basis"]
    assert sum(e["bytes_down"] for e in shipped) > 2.7 * sum(e["bytes_up"] for e in shipped) > 0
    entries = Ledger(folder.site_dir("site-0") / "ledger.sqlite").entries() if basis == "dp-gradient" else ()
    if entries:
        assert next((e.round, e.steps, e.noise_multiplier) for e in entries) == (0, 1, 2.0)
        last = [e["epsilon"] for e in events(folder, "site_reply") if e["site"] == "site-0"][-1]
        assert 5.0 < last <= 6.0
    base = load_base(Config.from_flat({"model.name": "tiny-llama", "model.dtype": "float32"}).model)
    assert PeftModel.from_pretrained(base, folder.adapter_dir)


@pytest.mark.parametrize("name", ["fedsvd", "fedask", "rolora", "ravan", "fedit"])
def test_private_runs_of_other_strategies(name: str, federate: Any, events: Any) -> None:
    folder = federate(**PRIVATE, **options(name))
    assert all(event["accepted"] for event in events(folder, "site_reply"))
    assert all(5.0 < e["epsilon"] <= 6.0 for e in events(folder, "site_reply") if e["round"] == 2)


def test_a_sketch_without_its_second_stage_is_set_aside(federate: Any, events: Any) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "query.project" and unpack(reply.content)[0]["site"] == "site-2":
            return Message(error=Error(code=0, reason="x"), reply_to=message)
        return reply

    folder = federate(tamper, **options("fedask"))
    assert [event["accepted"] for event in events(folder, "round_finished")] == [2, 2]


@pytest.mark.parametrize("name", ["fed-sb", "fedask"])
@pytest.mark.parametrize("examples", [1e308, 10**13, 0, "many"])
def test_a_site_weighs_no_more_records_than_can_be(
    name: str, examples: Any, federate: Any, events: Any
) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        notes, parts = unpack(reply.content)
        if message.metadata.message_type == "train" and notes["site"] == "site-2":
            return Message(pack(notes | {"examples": examples}, parts), reply_to=message)
        return reply

    folder = federate(tamper, federation__rounds=1, strategy__weighting="examples", **options(name))
    (refused,) = [event for event in events(folder, "site_reply") if not event["accepted"]]
    assert refused["site"] == "site-2"
    assert "the note 'examples' is" in refused["reason"]
    assert [event["accepted"] for event in events(folder, "round_finished")] == [2]


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_a_run_goes_on_from_what_another_folded_into_the_base(
    name: str, federate: Any, resume: Any, events: Any
) -> None:
    first = federate(dir="first", **options(name))
    settings = options("fedex") | {"adapter__init": str(first.adapter_dir)}
    whole = federate(dir="second", **settings)
    before = {e["site"]: e["loss"] for e in events(first, "evaluated") if e["stage"] == "final"}
    start = {
        e["site"]: e["loss"]
        for e in events(federate(dir="same", **settings, **STILL), "evaluated")
        if e["stage"] == "final"
    }
    assert start == pytest.approx(before, rel=1e-6)
    with pytest.raises(KeyboardInterrupt):
        federate(interrupted(2), **settings)
    resumed = resume(whole.path.parent / "run")
    left, right = exported(whole), exported(resumed)
    assert all(np.array_equal(left[m].up @ left[m].down, right[m].up @ right[m].down) for m in left)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy.name": "flora", "adapter.init": "x"}, "ignore it; go on from it with a rule"),
        (
            {"strategy.name": "florist", "adapter.init": "x"},
            "start anew every round with strategy.name=florist",
        ),
        ({"strategy.name": "fedsa", "adapter.init": "x"}, "strategy.name=fedsa keeps B at the sites"),
        ({"federation.mode": "local", "adapter.init": "x"}, "federation.mode=local keeps A, B at the sites"),
        (
            {
                "federation.mode": "local",
                "adapter.method": "fed-sb",
                "strategy.name": "fed-sb",
                "adapter.basis": "gradient",
                "adapter.allow_private_basis": True,
            },
            "adapter.basis=gradient brings a first R",
        ),
    ],
)
def test_a_start_that_sites_would_not_make_is_refused(settings: dict[str, Any], message: str) -> None:
    values = {"model.name": "tiny-llama", "adapter.method": "lora", "strategy.name": "fedit"}
    with pytest.raises(ConfigError, match=message):
        check_recipe(Config.from_flat(values | settings))


@pytest.mark.parametrize("where", ["state", "folded"])
def test_an_outcome_that_is_not_finite_is_never_kept(
    where: str, federate: Any, resume: Any, events: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = AdapterStrategy.aggregate

    def overflow(self: Any, current: Any, updates: Any, *, round: int) -> Outcome:
        outcome = real(self, current, updates, round=round)
        if round == 1:
            return outcome
        if where == "state":
            huge = {key: np.full_like(value, np.inf) for key, value in outcome.state.tensors.items()}
            return Outcome(state=outcome.state.with_tensors(huge))
        assert outcome.folded
        return Outcome(
            state=outcome.state, folded={m: (up * np.nan, down) for m, (up, down) in outcome.folded.items()}
        )

    with monkeypatch.context() as patch:
        patch.setattr(AdapterStrategy, "aggregate", overflow)
        with pytest.raises(RunError, match="round 2: the replies combine to NaN or infinity"):
            federate(**options("fedex"))
    folder = resume(tmp_path / "run")
    assert [event["round"] for event in events(folder, "checkpoint_saved")] == [1, 2]
    assert events(folder, "run_finished")


def test_diagnostics_are_logged_in_factors(federate: Any, events: Any) -> None:
    found = events(federate(**options("fedit")), "diagnosed")
    assert len(found) == 2
    assert 0 < found[1]["aggregation_error"] < 1
    assert 0 < found[1]["rank_energy"] <= 1
    assert -1 <= found[1]["cosine"] <= 1
    assert not events(federate(dir="off", strategy__diagnostics=False, **options("fedit")), "diagnosed")


def test_folded_updates_above_the_cap_are_recompressed_and_said(federate: Any, events: Any) -> None:
    folder = federate(**options("flora"), federation__rounds=3, strategy__residual_cap=10)
    texts = [event["text"] for event in events(folder, "warning")]
    assert any("passed rank 10 and was recompressed" in text for text in texts)
    assert all(term.rank <= 10 + RANK for term in exported(folder).values())


def test_of_what_was_folded_only_what_a_checkpoint_names_stays(
    federate: Any, resume: Any, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        federate(interrupted(5), **options("flora"), federation__rounds=5, strategy__residual_cap=10)
    folder = tmp_path / "run" / "checkpoints"
    # above the cap every round makes its piece anew; three checkpoints stay
    assert len(list(folder.glob("round-*"))) == len(list(folder.glob("folded-*"))) == 3
    # the newest is damaged: what the one before names is still there
    newest = folder / "round-0004.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7] + b"xxxxxxx")
    resume(tmp_path / "run")
    assert len(list(folder.glob("folded-*"))) == 3


@pytest.mark.parametrize(
    ("name", "cap"),
    [
        *((n, 1000) for n in ("fedit", "rolora", "fed-sb", "flora", "fedex", "fedask", "fedsa", "fedsvd")),
        ("flora", 60),
        ("fedex", 10),
    ],
)
def test_estimates_are_within_a_tenth_of_what_is_sent(
    name: str, cap: int, federate: Any, events: Any
) -> None:
    settings = options(name) | {"adapter__rank": 16, "federation__rounds": 3, "strategy__residual_cap": cap}
    folder = federate(**settings)
    values = {
        "model.name": "tiny-llama",
        "adapter.layers": "1",
        "data.source": "mcc",
        "federation.sites": 3,
    } | {key.replace("__", "."): value for key, value in settings.items()}
    guess = estimate(Config.from_flat(values))
    later = events(folder, "round_finished")[1:]
    assert guess.bytes_up == pytest.approx(np.mean([e["bytes_up"] for e in later]) / 3, rel=0.1)
    assert guess.bytes_down == pytest.approx(np.mean([e["bytes_down"] for e in later]) / 3, rel=0.1)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_where_sites_train_alone_there_is_no_adapter_of_all(
    method: str, federate: Any, tmp_path: Path
) -> None:
    rows = [
        {"text": f"text {i}", "label": "ab"[i % 2], "ward": ("St. Anna", "Zürich")[i % 3 == 0]}
        for i in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    folder = federate(
        federation__mode="local",
        federation__sites=2,
        adapter__method=method,
        strategy__name="average",
        data__source="file",
        data__path=str(tmp_path / "rows.jsonl"),
        data__site="ward",
        data__partition="column",
    )
    with pytest.raises(RunError, match="every site has an adapter of its own; name one with --site"):
        export_adapter(folder.path, tmp_path / "none")
    # a name with a dot or an umlaut has one folder, written and read
    for number, site in enumerate(("St. Anna", "Zürich")):
        assert (folder.site_dir(site) / "policy.toml").is_file()
        if method == "lora":
            assert export_adapter(folder.path, tmp_path / str(number), site=site).is_dir()
    assert len(list((folder.path / "sites").iterdir())) == 2
