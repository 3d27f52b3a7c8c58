"""The ledger: durable, chained, and keyed by what the site says, not the server."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.config import Config
from fedllm.errors import BudgetError, ConfigError, PrivacyError
from fedllm.privacy.accounting import Spend, epsilon
from fedllm.privacy.ledger import GENESIS, Entry, Ledger
from fedllm.privacy.plan import PrivacyPlan, authorise, make_plan
from fedllm.privacy.policy import SitePolicy, load_policy

MakeEntry = Callable[..., Entry]


def test_entries_survive_reopening_in_order(tmp_path: Path, entry: MakeEntry) -> None:
    path = tmp_path / "deep" / "ledger.sqlite"
    ledger = Ledger(path)
    assert ledger.head == GENESIS
    for round in (1, 2, 3):
        ledger.book(entry(round, "a" if round < 3 else "b"))
    again = Ledger(path)
    assert [item.round for item in again.entries()] == [1, 2, 3]
    assert [item.round for item in again.entries(dataset="a")] == [1, 2]
    assert again.head == ledger.head != GENESIS


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM entries WHERE number = 2",
        "UPDATE entries SET body = replace(body, '0.9', '9.0') WHERE number = 2",
        "UPDATE entries SET number = 9 WHERE number = 3",
    ],
)
def test_tampering_is_noticed(tmp_path: Path, damage: str, entry: MakeEntry) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    for round in (1, 2, 3):
        ledger.book(entry(round))
    with sqlite3.connect(path) as database:
        database.execute(damage)
    with pytest.raises(PrivacyError, match="the privacy ledger is damaged at row"):
        ledger.entries()
    with pytest.raises(PrivacyError, match="damaged"):
        ledger.book(entry(4))


def test_a_rolled_back_or_lost_ledger_is_noticed_by_its_head(tmp_path: Path, entry: MakeEntry) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    ledger.book(entry(1))
    older = path.read_bytes()
    ledger.require_head(GENESIS)
    ledger.book(entry(2))
    seen = ledger.head
    ledger.book(entry(3))
    ledger.require_head(seen)
    path.write_bytes(older)
    with pytest.raises(PrivacyError, match="lost, rolled back or replaced"):
        Ledger(path).require_head(seen)
    path.unlink()
    with pytest.raises(PrivacyError, match="lost, rolled back or replaced"):
        Ledger(path).require_head(seen)


def test_the_head_does_not_tell_what_was_booked(tmp_path: Path, entry: MakeEntry) -> None:
    heads = []
    for name in ("a", "b"):
        ledger = Ledger(tmp_path / name)
        ledger.book(entry(1))
        heads.append(ledger.head)
    assert heads[0] != heads[1]


def test_the_same_records_under_another_name_share_a_budget(tmp_path: Path, entry: MakeEntry) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.book(entry(1, dataset="old", data="same"))
    ledger.book(entry(2, dataset="new", data="other"))
    ledger.book(entry(3, dataset="third", data="third"))
    assert [found.round for found in ledger.entries(dataset="new", data="same")] == [1, 2]


def test_a_file_that_is_no_database_stops_training(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_text("not a database, but long enough to look like one " * 20)
    with pytest.raises(PrivacyError, match="cannot be opened"):
        Ledger(path)


def private(**settings: float) -> Config:
    return Config.from_flat(
        {
            "privacy.enabled": True,
            "privacy.delta": 1e-5,
            "train.batch_size": 32,
            "train.local_steps": 5,
            "federation.rounds": 4,
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
    )


def plan_of(config: Config, **more: object) -> PrivacyPlan:
    return make_plan(config, units=2000, site="x", **more)  # type: ignore[arg-type]


def test_budget_is_projected_booked_and_enforced_over_runs(tmp_path: Path) -> None:
    plan = plan_of(private(privacy__epsilon=3.0))
    policy = SitePolicy(site="x", max_epsilon=3.0, min_noise_multiplier=0.1)
    ledger = Ledger(tmp_path / "l.sqlite")
    spent = [authorise(plan, policy=policy, ledger=ledger, run="a", round=r, data="f") for r in (1, 2, 3, 4)]
    assert spent == sorted(spent)
    assert 2.9 < spent[-1] <= 3.0
    with pytest.raises(BudgetError, match=r"site x: budget exhausted. 3.00 of epsilon 3 is spent"):
        authorise(plan, policy=policy, ledger=ledger, run="b", round=1, data="f")
    assert len(ledger.entries()) == 4


@pytest.mark.parametrize("round", [5, 6, 50])
def test_a_round_after_the_last_is_projected_as_one(tmp_path: Path, round: int) -> None:
    plan = plan_of(private(privacy__epsilon=3.0))
    policy = SitePolicy(site="x", max_epsilon=3.0, min_noise_multiplier=0.1)
    ledger = Ledger(tmp_path / "l.sqlite")
    for done in (1, 2, 3, 4):
        authorise(plan, policy=policy, ledger=ledger, run="a", round=done, data="f")
    with pytest.raises(BudgetError, match="budget exhausted"):
        authorise(plan, policy=policy, ledger=ledger, run="a", round=round, data="f")
    assert len(ledger.entries()) == 4


def test_what_was_spent_is_never_taken_back() -> None:
    with pytest.raises(PrivacyError, match="cannot be negative"):
        Spend(noise_multiplier=1.0, sample_rate=0.1, steps=-1)


def test_two_messages_at_once_do_not_spend_the_same_rest(tmp_path: Path) -> None:
    policy = SitePolicy(site="x", max_epsilon=3.0, min_noise_multiplier=0.1)
    plan = plan_of(private(privacy__epsilon=3.0, federation__rounds=1))
    path = tmp_path / "l.sqlite"
    ready, outcomes = threading.Barrier(4), []

    def ask(run: str) -> None:
        ready.wait()
        try:
            authorise(plan, policy=policy, ledger=Ledger(path), run=run, round=1, data="f")
            outcomes.append("booked")
        except BudgetError:
            outcomes.append("refused")

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["booked", "refused", "refused", "refused"]
    assert len(Ledger(path).entries()) == 1


def test_a_stricter_promise_stays_when_a_later_run_names_a_weaker_relation(tmp_path: Path) -> None:
    policy = SitePolicy(site="x", max_epsilon=6.0, min_noise_multiplier=0.1)
    ledger = Ledger(tmp_path / "l.sqlite")
    strict = plan_of(
        private(privacy__noise_multiplier=0.8, privacy__relation="replace-one", federation__rounds=1)
    )
    weaker = plan_of(private(privacy__noise_multiplier=0.8, federation__rounds=1))
    while True:
        spends = [entry.spend for entry in ledger.entries()] + [strict.spend()]
        if epsilon(spends, delta=1e-5, relation="replace-one") > 6.0:
            break
        authorise(strict, policy=policy, ledger=ledger, run="a", round=1, data="f")
    # by the weaker relation alone there would be room
    assert epsilon(spends, delta=1e-5) < 6.0
    with pytest.raises(BudgetError, match="budget exhausted"):
        authorise(weaker, policy=policy, ledger=ledger, run="b", round=1, data="f")


def test_a_budget_is_not_kept_at_a_delta_that_publishes_a_record(tmp_path: Path) -> None:
    policy = SitePolicy(site="x", max_delta=1e-3, min_noise_multiplier=0.1)
    plan = plan_of(private(privacy__epsilon=3.0))
    with pytest.raises(BudgetError, match="must be below one over its 2000 records") as caught:
        authorise(plan, policy=policy, ledger=Ledger(tmp_path / "l"), run="a", round=1, data="f")
    assert "2000" not in caught.value.public


def test_a_run_that_cannot_finish_is_refused_at_its_start(tmp_path: Path) -> None:
    plan = plan_of(private(privacy__epsilon=3.0))
    policy = SitePolicy(site="x", max_epsilon=2.0, min_noise_multiplier=0.1)
    ledger = Ledger(tmp_path / "l.sqlite")
    with pytest.raises(BudgetError, match="would bring it to"):
        authorise(plan, policy=policy, ledger=ledger, run="a", round=1, data="f")
    assert ledger.entries() == ()


def test_a_crashed_round_raises_the_noise_of_the_rest() -> None:
    config = private(privacy__epsilon=3.0)
    first = plan_of(config)
    lost = plan_of(config, round=2, spent=(first.spend(), first.spend()))
    assert lost.noise_multiplier > first.noise_multiplier
    undisturbed = plan_of(config, round=2, spent=(first.spend(),))
    assert undisturbed.noise_multiplier == first.noise_multiplier


def test_plan_refuses_what_is_not_private() -> None:
    with pytest.raises(PrivacyError, match="privacy.delta=0.001 is too large"):
        plan_of(private(privacy__epsilon=3.0, privacy__delta=1e-3))
    with pytest.raises(PrivacyError, match="sampling cannot be private"):
        plan_of(private(privacy__epsilon=3.0, train__batch_size=2000))
    plan = plan_of(private(privacy__noise_multiplier=0.7, privacy__clipping_norm=0.5))
    assert plan.noise_multiplier == 0.7
    assert plan.sensitivity == 0.5
    assert plan.noise_deviation == pytest.approx(0.35)
    assert plan.expected_batch == 32


def test_policy_file_and_its_limits(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text('site = "north"\ndata_path = "records.csv"\nmax_epsilon = 4\n')
    policy = load_policy(path)
    assert policy.data_path == str(tmp_path / "records.csv")
    assert policy.state_dir == str(tmp_path / "state")
    assert policy.max_epsilon == 4.0
    with pytest.raises(BudgetError, match="requires privacy.enabled=true"):
        policy.require(Config().privacy)
    with pytest.raises(BudgetError, match=r"privacy.epsilon=5 exceeds its policy's 4"):
        policy.require(private(privacy__epsilon=5.0).privacy)
    with pytest.raises(BudgetError, match=r"privacy.delta=0.0001 exceeds"):
        policy.require(private(privacy__epsilon=1.0, privacy__delta=1e-4).privacy)
    with pytest.raises(BudgetError, match="noise multiplier of 0.200 is below"):
        policy.require_noise(0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("site = 3", "site needs a value of type str"),
        ('sit = "x"', "unknown key 'sit'"),
        ('data_path = "x"', "key 'site'"),
        ('site = "federation"', "cannot name a site"),
        ('site = "../x"', "cannot name a site"),
        ("site =", "not a readable site policy"),
        ('site = "x"\nmax_epsilon = nan', "max_epsilon must not be below 0, got nan"),
        ('site = "x"\nmax_epsilon = -1', "max_epsilon must not be below 0, got -1"),
        ('site = "x"\nmax_epsilon = 1' + 400 * "0", "max_epsilon must be a smaller number"),
        ('site = "x"\nmax_delta = 2', "max_delta must lie between 0 and 1, got 2"),
        ('site = "x"\nmin_noise_multiplier = nan', "min_noise_multiplier must not be below 0, got nan"),
        ('site = "x"\nmin_site_noise = nan', "min_site_noise must not be below 0, got nan"),
        ('site = "x"\nmax_rank = -1', "max_rank must not be below 0, got -1"),
    ],
)
def test_bad_policies_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "site.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_policy(path)
    with pytest.raises(ConfigError, match="no such site policy"):
        load_policy(tmp_path / "none.toml")


def test_a_policy_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text('site = "x"\nmax_epsilon = inf\n', encoding="utf-8-sig")
    assert load_policy(path).site == "x"
