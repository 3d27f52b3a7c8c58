"""Accuracy on private held-out records: what leaves, what it costs, and that one record changes little."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.config import Config
from fedllm.errors import ConfigError
from fedllm.evaluation.noised import noised_accuracy
from fedllm.federation import noised as noised_module
from fedllm.federation.audit import run_checks
from fedllm.federation.counts import noised_accuracies
from fedllm.federation.local import Start
from fedllm.federation.noised import noised_counts
from fedllm.federation.site import Site, real_site, simulated_policy
from fedllm.privacy.accounting import epsilon
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.plan import counts_plan
from fedllm.privacy.policy import load_policy
from fedllm.privacy.release import bucketed
from fedllm.runs.folder import load_config
from fedllm.runs.metrics import as_told
from fedllm.training.round import evaluate
from fedllm.training.session import open_session, tokenise
from fedllm.training.spec import adapter_spec, basis_from_seed

PRIVATE: dict[str, Any] = {
    "privacy__enabled": True,
    "privacy__epsilon": 6.0,
    "privacy__delta": 1e-4,
    "evaluation__noise_multiplier": 1.0,
}


def test_counts_leave_with_noise_and_are_booked_apart(federate: Any, events: Any) -> None:
    folder = federate(**PRIVATE, data__heldout=0.3)
    found = [event for event in events(folder, "evaluated") if event["stage"] == "final"]
    assert len(found) == 3
    plan = counts_plan(Config.from_flat({k.replace("__", "."): v for k, v in PRIVATE.items()}), counts=3)
    cost = bucketed(epsilon([plan.spend()], delta=1e-4))
    for event in found:
        assert event["heldout_epsilon"] == cost
        assert event["loss"] is None
        assert event["macro_f1"] is None
        assert event["majority_accuracy"] is None
        assert 0 <= event["interval_low"] <= event["accuracy"] <= event["interval_high"] <= 1
        entries = Ledger(folder.site_dir(event["site"]) / "ledger.sqlite").entries()
        assert [entry.dataset for entry in entries] == ["records", "records", "records, held out"]
        assert (entries[-1].noise_multiplier, entries[-1].sample_rate) == (1.0, 1.0)
    assert all(event["accuracy"] is None for event in events(folder, "site_reply"))
    checks = run_checks(folder, load_config(folder))
    assert [check.passed for check in checks] == [True] * 3
    assert all(f"epsilon held out {cost:.2f}"[:-1] in check.detail for check in checks)
    text = folder.report_file.read_text()
    assert "counts with Gaussian noise (multiplier 1)" in text
    assert f"{cost:.2f} at delta 0.0001" in text
    assert "declares public" not in text


def test_what_one_record_adds_is_within_the_clipping_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = counts_plan(Config.from_flat({}), counts=3)
    assert exact.noise_deviation == 0
    monkeypatch.setattr(noised_module, "counts_plan", lambda config, counts: exact)
    site, session, tokens = held_out_of(9)
    all_of = counted(site, session, tokens)
    truth = [
        evaluate(session, tokens, config=site.config, state=None, records=0),
    ]
    assert all_of[0] == pytest.approx(9)
    assert truth[0] is not None
    assert all_of[2] == pytest.approx(sum(truth[0].correct), abs=1e-5)
    for left_out in range(9):
        fewer = replace(
            tokens,
            heldout=tokens.heldout[:left_out] + tokens.heldout[left_out + 1 :],
            heldout_labels=tokens.heldout_labels[:left_out] + tokens.heldout_labels[left_out + 1 :],
        )
        change = [a - b for a, b in zip(all_of, counted(site, session, fewer), strict=True)]
        assert sum(value**2 for value in change) <= exact.clipping_norm**2 + 1e-6


def test_a_record_that_cannot_be_scored_adds_nothing_but_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = counts_plan(Config.from_flat({}), counts=3)
    monkeypatch.setattr(noised_module, "counts_plan", lambda config, counts: exact)
    site, session, tokens = held_out_of(5)
    before = counted(site, session, tokens)
    label = tokens.heldout_labels[0]
    foreign = replace(tokens, heldout_labels=("no label of the recipe", *tokens.heldout_labels[1:]))
    after = counted(site, session, foreign)
    assert label != "no label of the recipe"
    assert after[0] == pytest.approx(before[0])
    assert all(b - 1 - 1e-5 <= a <= b + 1e-5 for a, b in zip(after[1:], before[1:], strict=True))
    none = replace(tokens, heldout=(), heldout_labels=())
    assert counted(site, session, none) == [0.0, 0.0, 0.0]


def held_out_of(records: int) -> tuple[Site, Any, Any]:
    config = Config.from_flat(
        {
            "model.name": "tiny-llama",
            "model.dtype": "float32",
            "adapter.rank": 3,
            "adapter.layers": "1",
            "data.source": "mcc",
            "train.max_length": 160,
            "run.dir": "unused",
            **{key.replace("__", "."): value for key, value in PRIVATE.items()},
        }
    )
    site = Site(
        name="site-0",
        simulated=True,
        policy=simulated_policy("site-0", config),
        config=config,
        folder=Path("unused"),
        index=0,
    )
    spec = adapter_spec(config)
    basis = basis_from_seed(spec)
    assert basis is not None
    tokens = tokenise(site.data(), config)
    some = replace(tokens, heldout=tokens.heldout[:records], heldout_labels=tokens.heldout_labels[:records])
    return site, open_session(config, spec, basis), some


def counted(site: Site, session: Any, tokens: Any) -> list[float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noised_module, "book", lambda *a, **k: {"epsilon": 0.0, "ledger": ""})
        state = session.method.initial_state(session.spec, seed="0")
        start = Start(shared=state, state=state, folded={})
        found = noised_counts(site, {"run": "0a"}, session, tokens, start)
    return [float(str(found[f"noised_{name}"])) for name in ("records", "right", "base_right")]


def test_a_real_site_counts_its_own_private_file_and_only_for_records(tmp_path: Path) -> None:
    rows = "\n".join(f"record {i},{'ab'[i % 2]}" for i in range(300))
    (tmp_path / "own.csv").write_text(f"text,label\n{rows}\n")
    # an empty cell, a foreign label and a text that also trains neither fail nor change what trains
    (tmp_path / "apart.csv").write_text("text,label\n,a\nnew one,elsewhere\nrecord 3,b\nnew two,a\n")
    policy = tmp_path / "site.toml"
    lines = 'site = "north"\ndata_path = "own.csv"\nmax_delta = 1e-4\n'
    policy.write_text(lines + 'private_heldout_path = "apart.csv"\n')
    config = Config.from_flat({k.replace("__", "."): v for k, v in PRIVATE.items()})
    config = config.replace(data__labels="a | b")
    site = real_site(policy, config)
    assert not site.metrics_may_leave
    found = site.data()
    assert len(found.train) == 300
    assert all(example.usable for example in found.train)
    policy.write_text(lines)
    assert real_site(policy, config).data().fingerprint == found.fingerprint
    policy.write_text(lines + 'private_heldout_path = "apart.csv"\nheldout_path = "apart.csv"\n')
    with pytest.raises(ConfigError, match="exclude each other"):
        load_policy(policy)


def test_labels_of_private_held_out_records_count_in_an_open_run(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("text,label\none,a\ntwo,b\nthree,a\n")
    (tmp_path / "apart.csv").write_text("text,label\nfour,c\nfive,a\n")
    policy = tmp_path / "site.toml"
    policy.write_text(
        'site = "north"\ndata_path = "own.csv"\nrequire_privacy = false\nprivate_heldout_path = "apart.csv"\n'
    )
    site = real_site(policy, Config.from_flat({"data.source": "file", "data.partition": "iid"}))
    assert site.data().labels == ("a", "b", "c")


def test_where_no_label_is_there_to_be_scored_nothing_is_booked(caplog: pytest.LogCaptureFixture) -> None:
    site, session, tokens = held_out_of(3)
    state = session.method.initial_state(session.spec, seed="0")
    start = Start(shared=state, state=state, folded={})
    assert noised_counts(site, {"run": "0a"}, session, replace(tokens, labels=()), start) == {}
    assert "data.labels is empty" in caplog.text


def test_a_real_site_knows_the_letters_of_options_without_its_records(tmp_path: Path) -> None:
    rows = "\n".join(f"question {i},a|b|c,{'AB'[i % 2]}" for i in range(40))
    (tmp_path / "own.csv").write_text(f"text,options,label\n{rows}\n")
    (tmp_path / "apart.csv").write_text("text,options,label\nanother one,a|b|c,C\n")
    policy = tmp_path / "site.toml"
    policy.write_text(
        'site = "north"\ndata_path = "own.csv"\nmax_delta = 1e-4\noptions = "options"\n'
        'private_heldout_path = "apart.csv"\n'
    )
    config = Config.from_flat({k.replace("__", "."): v for k, v in PRIVATE.items()})
    site = real_site(
        policy, config.replace(data__task="choose", data__options="options", data__source="file")
    )
    assert site.data().labels[:4] == ("A", "B", "C", "D")


@pytest.mark.parametrize(
    "settings",
    [
        {"privacy.enabled": False},
        {"data.heldout_public": True},
        {"data.task": "generate"},
    ],
)
def test_noise_on_counts_needs_private_records_with_labels(settings: dict[str, Any]) -> None:
    values = {key.replace("__", "."): value for key, value in PRIVATE.items()}
    with pytest.raises(ConfigError, match="evaluation.noise_multiplier: counts of right labels"):
        Config.from_flat(values | settings)


@given(
    st.floats(-100, 1000),
    st.floats(-100, 1000),
    st.floats(0, 50),
)
def test_an_accuracy_from_counts_is_a_share_within_its_interval(
    records: float, right: float, deviation: float
) -> None:
    found = noised_accuracy(records, right, deviation=deviation)
    if records < max(1, 2 * deviation):
        assert found is None
    else:
        assert found is not None
        middle, low, high = found
        assert 0 <= low <= middle <= high <= 1


def test_the_interval_has_the_noise_and_the_sampling() -> None:
    plain, noised = (noised_accuracy(400, 300, deviation=value) for value in (0.0, 10.0))
    assert plain is not None
    assert noised is not None
    assert plain[2] - plain[0] == pytest.approx(1.96 * (0.75 * 0.25 / 400) ** 0.5)
    assert noised[2] - noised[0] > 1.5 * (plain[2] - plain[0])
    assert noised_accuracies({"noised_records": 3.0}, noise_multiplier=1.0) == {}


def test_metrics_that_no_noise_was_accounted_for_are_of_public_records() -> None:
    config = Config.from_flat({k.replace("__", "."): v for k, v in PRIVATE.items()})
    event = {"event": "evaluated", "accuracy": 0.5, "heldout_epsilon": 1.0}
    assert as_told(config, [event]) is config
    told = as_told(config, [event | {"heldout_epsilon": None}])
    assert told.data.heldout_public
    assert told.evaluation.noise_multiplier == 0
