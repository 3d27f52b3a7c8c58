"""What is booked, when, and what the coordinator remembers of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message

from fedllm.config import Config
from fedllm.errors import BudgetError, ConfigError, PrivacyError
from fedllm.federation import client as client_module
from fedllm.federation.audit import run_checks
from fedllm.federation.budget import planned_sites
from fedllm.federation.estimate import estimate
from fedllm.federation.records import ADAPTER, pack, unpack
from fedllm.federation.site import real_site
from fedllm.federation.tuning import require_tunable
from fedllm.privacy.accounting import epsilon
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.plan import basis_plan, make_plan, whole_run
from fedllm.privacy.policy import load_policy
from fedllm.privacy.release import bucketed
from fedllm.runs.events import read_events
from fedllm.runs.folder import RunFolder, load_config
from fedllm.runs.sites import site_summaries

PRIVATE: dict[str, Any] = {
    "privacy.enabled": True,
    "privacy.noise_multiplier": 0.7,
    "privacy.delta": 1e-4,
    "model.name": "tiny-llama",
    "model.dtype": "float32",
    "adapter.method": "fed-sb",
    "adapter.layers": "1",
    "adapter.rank": 3,
    "strategy.name": "fed-sb",
    "train.batch_size": 20,
    "train.local_steps": 2,
    "federation.rounds": 3,
}
BASIS = {"adapter.basis": "dp-gradient", "adapter.basis_records": 20, "adapter.basis_noise": 0.7}


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """Write a site's policy and 400 records, and return the policy's path."""
    rows = [f"record {i},{'ab'[i % 2]}" for i in range(400)]
    (tmp_path / "own.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    path = tmp_path / "site.toml"
    path.write_text('site = "north"\ndata_path = "own.csv"\nmax_epsilon = 8.0\nmax_delta = 1e-4\n')
    return path


def private(**settings: Any) -> Config:
    return Config.from_flat(PRIVATE | {key.replace("__", "."): value for key, value in settings.items()})


def asked(policy: Path, **settings: Any) -> client_module.Site:
    return real_site(
        policy, private(**{key.replace(".", "__"): value for key, value in BASIS.items()}, **settings)
    )


@pytest.mark.parametrize("target", [{"privacy__noise_multiplier": 1.0}, {"privacy__epsilon": 3.0}])
def test_nothing_but_the_draw_follows_from_the_true_number_where_another_is_public(
    target: dict[str, float],
) -> None:
    config = private(**({"privacy__noise_multiplier": 0.0} | target))
    plans = [make_plan(config, units=n, site="x", public_units=300) for n in (2, 299, 300, 3000)]
    assert len({replace(plan, units=300) for plan in plans}) == 1
    assert plans[0] == replace(make_plan(config, units=300, site="x"), units=2, public_units=300)
    bases = [basis_plan(config, units=n, site="x", public_units=300) for n in (2, 3000)]
    assert len({replace(plan, units=300) for plan in bases}) == 1


@pytest.mark.parametrize(("batch", "refused"), [(299, False), (300, True), (399, True)])
def test_hello_tells_the_public_number_alone(policy: Path, batch: int, refused: bool) -> None:
    policy.write_text(policy.read_text() + "public_units = 300\n")
    config = private(train__batch_size=batch, privacy__noise_multiplier=5.0)
    site = real_site(policy, config)
    notes = {"basis": "seeded:" + "0" * 16}
    if refused:
        with pytest.raises(PrivacyError, match="batch"):
            client_module._hello(site, notes, {})
    else:
        assert "rank" in client_module._hello(site, notes, {})[0]


def test_a_public_number_is_a_count_and_goes_with_no_cap(policy: Path) -> None:
    whole = policy.read_text()
    policy.write_text(whole + "public_units = -1\n")
    with pytest.raises(ConfigError, match="public_units must not be below 0"):
        load_policy(policy)
    policy.write_text(whole + "public_units = 300\n")
    with pytest.raises(BudgetError, match="batch_cap is accounted for with the true number"):
        real_site(policy, private(privacy__batch_cap=True, privacy__relation="zero-out-one"))


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_a_basis_is_paid_for_in_every_round_also_after_one_that_was_missed(finished: int) -> None:
    config = private(
        privacy__noise_multiplier=0.0,
        privacy__epsilon=3.0,
        **{k.replace(".", "__"): v for k, v in BASIS.items()},
    )
    first, (basis, _) = whole_run(config, units=400, site="x", makes_basis=True)
    done = (first.spend(),) * finished
    third = make_plan(config, units=400, site="x", round=3, spent=done, before=(basis,))
    assert third == first
    assert epsilon([basis, *done, third.spend()], delta=1e-4) <= 3.0


def test_pooled_records_are_planned_for_as_they_train(federate: Any) -> None:
    settings = {"data__source": "mcc", "federation__sites": 3}
    config = private(**settings, federation__mode="central")
    (guess,), (planned,) = estimate(config).sites, planned_sites(config, None)
    recipe = {key.replace(".", "__"): value for key, value in PRIVATE.items()}
    folder = federate(**recipe, **settings, federation__mode="central")
    entries = Ledger(folder.site_dir("site-0") / "ledger.sqlite").entries()
    spent = epsilon([entry.spend for entry in entries], delta=1e-4)
    assert (guess.name, planned.policy.site) == ("site-0", "site-0")
    assert guess.epsilon == planned.epsilon == pytest.approx(spent)
    base = private(**settings, federation__mode="base")
    assert (estimate(base).sites, planned_sites(base, None)) == ((), [])


def test_no_basis_is_made_on_a_ledger_that_was_rolled_back(policy: Path) -> None:
    site = asked(policy)
    with pytest.raises(PrivacyError, match="lost, rolled back or replaced"):
        client_module._make_basis(site, {"basis": "shipped:", "run": "0a", "ledger": "1" * 64}, {})
    assert site.ledger().entries() == ()


def test_a_basis_is_booked_only_if_the_rounds_after_it_fit(policy: Path) -> None:
    _, (basis, rounds) = whole_run(asked(policy).config, units=400, site="north", makes_basis=True)
    one, whole = epsilon([basis], delta=1e-4), epsilon([basis, rounds], delta=1e-4)
    assert one < whole - 0.02
    policy.write_text(policy.read_text().replace("8.0", f"{(one + whole) / 2:.5f}"))
    site = asked(policy)
    with pytest.raises(BudgetError, match="budget exhausted"):
        client_module._make_basis(site, {"basis": "shipped:", "run": "0a"}, {})
    assert site.ledger().entries() == ()


def test_plans_and_estimates_count_what_the_basis_costs(policy: Path) -> None:
    site = asked(policy)
    _, spends = whole_run(site.config, units=400, site="north", makes_basis=True)
    (planned,) = planned_sites(asked(policy).config, policy)
    assert planned.epsilon == pytest.approx(epsilon(spends, delta=1e-4))
    assert planned.held == spends[:1]
    assert planned.epsilon > epsilon(spends[1:], delta=1e-4) + 0.05
    config = private(data__source="mcc", **{key.replace(".", "__"): value for key, value in BASIS.items()})
    first, *others = (found.epsilon for found in estimate(config).sites)
    # one site makes it, the first
    assert first > max(others) + 0.01
    with pytest.raises(ConfigError, match="does not account for adapter.basis=dp-gradient"):
        require_tunable([config.replace(data__heldout_public=True)])


def booked(folder: RunFolder) -> dict[str, float]:
    """Return what the simulated sites' ledgers come to, as a reply says it."""
    ledgers = {path.parent.name: Ledger(path) for path in folder.path.glob("sites/*/ledger.sqlite")}
    return {
        site: bucketed(epsilon([entry.spend for entry in ledger.entries()], delta=1e-4))
        for site, ledger in ledgers.items()
    }


def test_the_coordinator_remembers_the_ledger_of_a_reply_it_sets_aside(federate: Any, events: Any) -> None:
    def damage(message: Message, reply: Message) -> Message:
        notes, parts = unpack(reply.content)
        if message.metadata.message_type == "train" and notes["site"] == "site-1":
            return Message(pack(notes, {ADAPTER: parts[ADAPTER][:-9]}), reply_to=message)
        return reply

    flat = {key.replace(".", "__"): value for key, value in (PRIVATE | BASIS).items()}
    folder = federate(damage, **flat, federation__quorum=2)
    assert {e["site"] for e in events(folder, "site_reply") if not e["accepted"]} == {"site-1"}
    heads = json.loads((folder.path / "ledger_heads.json").read_text())
    for name in ("site-0", "site-1", "site-2"):
        ledger = Ledger(folder.site_dir(name) / "ledger.sqlite")
        # the first site made the basis
        assert len(ledger.entries()) == (4 if name == "site-0" else 3)
        assert [head for tag, head in heads.items() if tag.startswith(name)] == [ledger.head]
    # what it sent was seen, so that its epsilon counts
    assert {site.name: site.epsilon for site in site_summaries(read_events(folder))} == booked(folder)


def test_what_was_booked_for_a_lost_reply_is_told_at_the_end(federate: Any, events: Any) -> None:
    def lose(message: Message, reply: Message) -> Message:
        late = message.metadata.message_type == "train" and message.metadata.group_id == "3"
        if late and unpack(reply.content)[0]["site"] == "site-1":
            return Message(error=Error(code=0, reason="x"), reply_to=message)
        return reply

    folder = federate(
        lose, **{key.replace(".", "__"): value for key, value in PRIVATE.items()}, federation__quorum=2
    )
    told = {event["site"]: event["epsilon"] for event in events(folder, "site_reply") if event["epsilon"]}
    spent = booked(folder)
    assert told["site-1"] < spent["site-1"] - 0.05
    assert {site.name: site.epsilon for site in site_summaries(read_events(folder))} == spent
    heads = json.loads((folder.path / "ledger_heads.json").read_text())
    assert {Ledger(path).head for path in folder.path.glob("sites/*/ledger.sqlite")} == set(heads.values())
    assert all(check.passed for check in run_checks(folder, load_config(folder)))


def test_the_coordinator_remembers_the_ledger_of_who_made_the_basis(federate: Any) -> None:
    flat = {key.replace(".", "__"): value for key, value in (PRIVATE | BASIS).items()}
    seen: list[str] = []

    def lose(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "query.make_basis":
            seen.append(str(unpack(reply.content)[0]["ledger"]))
        if message.metadata.message_type == "train" and message.metadata.group_id == "1":
            seen.append(str(unpack(message.content)[0]["ledger"]))
        return reply

    federate(lose, **flat)
    assert seen[0] in seen[1:]
