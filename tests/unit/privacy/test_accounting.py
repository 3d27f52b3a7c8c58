"""Accounting against the numbers of dp-accounting, Opacus and published settings."""

from __future__ import annotations

import pytest
from dp_accounting import get_epsilon_gaussian
from opacus.accountants import RDPAccountant
from scipy.stats import binom

from fedllm.config import Config
from fedllm.errors import ConfigError, PrivacyError
from fedllm.privacy.accounting import (
    ADD_OR_REMOVE,
    RELATIONS,
    REPLACE,
    ZERO_OUT,
    Spend,
    batch_cap,
    calibrate,
    cross_check,
    epsilon,
    require_delta,
    within,
)
from fedllm.privacy.plan import make_plan
from fedllm.resources import recipes_dir

# published, or found with these accountants by hand: noise, rate, steps, delta, then epsilon by each of them
TIGHTNESS = [
    (1.0, 0.01, 1000, 1e-5, {"PLD": 1.828, "PRV": 1.838, "RDP": 2.101}, 2.101),
    (0.7, 0.0256, 120, 1e-5, {"PLD": 4.849, "PRV": 4.860, "RDP": 5.807}, 5.805),
    (0.6, 0.1, 30, 1e-5, {"PLD": 12.20, "PRV": 12.21, "RDP": 14.12}, 14.11),
    (1.2, 0.05, 2000, 1e-6, {"PLD": 13.03, "PRV": 13.04, "RDP": 13.94}, 13.94),
    (0.8, 0.001, 20_000, 1e-5, {"PLD": 1.100, "PRV": 1.110, "RDP": 1.568}, 1.568),
]


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta", "expected", "opacus"), TIGHTNESS)
def test_epsilon_oracles_and_peers(
    sigma: float, rate: float, steps: int, delta: float, expected: dict[str, float], opacus: float
) -> None:
    spend = [Spend(noise_multiplier=sigma, sample_rate=rate, steps=steps)]
    found = epsilon(spend, delta=delta)
    assert found == pytest.approx(expected["PLD"], rel=2e-3)
    peers = cross_check(spend, delta=delta)
    assert peers == pytest.approx(expected, rel=0.01)
    other = RDPAccountant()
    other.history = [(sigma, rate, steps)]
    assert other.get_epsilon(delta) == pytest.approx(opacus, rel=0.01)
    # PRV adds its error bound of 0.01; RDP is a looser upper bound
    assert found <= peers["PRV"] <= found + 0.03
    assert found <= peers["RDP"]


# 117 steps at rate 0.0256, delta 1e-5: epsilon, then the noise that reaches it by PLD, PRV and RDP
NOISES = [
    (0.5, 2.213, 2.266, 2.422),
    (1.0, 1.383, 1.397, 1.504),
    (3.0, 0.838, 0.839, 0.903),
    (8.0, 0.580, 0.580, 0.619),
]


@pytest.mark.parametrize(("target", "sigma"), [row[:2] for row in NOISES])
def test_calibration_oracles(target: float, sigma: float) -> None:
    found = calibrate(target=target, delta=1e-5, sample_rate=0.0256, steps=117)
    assert found == pytest.approx(sigma, rel=3e-3)
    assert epsilon([Spend(noise_multiplier=found, sample_rate=0.0256, steps=117)], delta=1e-5) <= target


@pytest.mark.parametrize(
    ("name", "target", "sigma"),
    [(name, row[0], row[place]) for place, name in ((2, "PRV"), (3, "RDP")) for row in NOISES],
)
def test_other_accountants_ask_for_the_noise_they_should(name: str, target: float, sigma: float) -> None:
    # the noise that reaches the target lies within 1 % of the oracle
    less, more = (
        cross_check([Spend(noise_multiplier=sigma * near, sample_rate=0.0256, steps=117)], delta=1e-5)[name]
        for near in (0.99, 1.01)
    )
    assert less > target > more


@pytest.mark.parametrize(
    ("target", "of_the_code", "its_epsilon", "sound"),
    [
        (1.0, 0.522, 2.07, 0.588),
        (3.0, 0.436, 4.80, 0.485),
        (5.0, 0.393, 7.38, 0.431),
        (7.5, 0.360, 10.7, 0.391),
        (10.0, 0.338, 13.9, 0.365),
    ],
)
def test_fed_sb_oracles(target: float, of_the_code: float, its_epsilon: float, sound: float) -> None:
    # the paper's private setting; its public code takes delta = 1 / batches, and sound is 1 / records
    rate, steps, batches, records = 1 / 5723, 34_338, 5723, 183_122
    taken = calibrate(target=target, delta=1 / batches, sample_rate=rate, steps=steps)
    assert taken == pytest.approx(of_the_code, rel=0.01)
    spend = Spend(noise_multiplier=of_the_code, sample_rate=rate, steps=steps)
    assert epsilon([spend], delta=1 / records) == pytest.approx(its_epsilon, rel=0.01)
    needed = calibrate(target=target, delta=1 / records, sample_rate=rate, steps=steps)
    assert needed == pytest.approx(sound, rel=0.01)


def test_rounds_compose_like_one_run_and_spent_stays_spent() -> None:
    def spend(steps: int) -> Spend:
        return Spend(noise_multiplier=0.8, sample_rate=0.02, steps=steps)

    whole = epsilon([spend(60)], delta=1e-5)
    assert epsilon([spend(20), spend(20), spend(20)], delta=1e-5) == pytest.approx(whole, abs=1e-9)
    assert epsilon([], delta=1e-5) == 0.0
    prior = (spend(30),)
    more = calibrate(target=whole, delta=1e-5, sample_rate=0.02, steps=60, prior=prior)
    assert more > 0.8
    rest = Spend(noise_multiplier=more, sample_rate=0.02, steps=60)
    assert epsilon([*prior, rest], delta=1e-5) <= whole


def test_full_batches_have_no_amplification() -> None:
    full = epsilon([Spend(noise_multiplier=2.0, sample_rate=1.0, steps=1)], delta=1e-5)
    assert full == pytest.approx(1.99, abs=0.02)


def test_delta_and_unreachable_targets_are_refused() -> None:
    require_delta(1e-5, records=99_999, site="x")
    with pytest.raises(PrivacyError, match="site x: privacy.delta=1e-05 is too large"):
        require_delta(1e-5, records=100_000, site="x")
    spent = (Spend(noise_multiplier=0.5, sample_rate=0.1, steps=100),)
    with pytest.raises(PrivacyError, match="no noise multiplier reaches epsilon 0.1"):
        calibrate(target=0.1, delta=1e-5, sample_rate=0.1, steps=10, prior=spent)


def test_relations_oracles() -> None:
    spend = [Spend(noise_multiplier=0.7, sample_rate=0.0256, steps=120)]
    found = {relation: epsilon(spend, delta=1e-5, relation=relation) for relation in RELATIONS}
    assert found[ADD_OR_REMOVE] == pytest.approx(4.849, rel=2e-3)
    assert found[ZERO_OUT] == pytest.approx(4.849, rel=2e-3)
    assert found[REPLACE] == pytest.approx(5.561, rel=2e-3)


@pytest.mark.parametrize(
    ("cap", "expected"), [(256, 25.0), (280, 14.6), (300, 9.2), (320, 5.19), (384, 4.849)]
)
def test_capped_batches_oracles(cap: int, expected: float) -> None:
    # 10,000 records at rate 0.0256: 256 expected
    spend = Spend(noise_multiplier=0.7, sample_rate=0.0256, steps=120, cap=cap, records=10_000)
    assert epsilon([spend], delta=1e-5, relation=ZERO_OUT) == pytest.approx(expected, rel=0.01)
    with pytest.raises(PrivacyError, match="zero-out-one alone"):
        epsilon([spend], delta=1e-5)


def test_the_cap_is_rarely_reached_and_costs_nothing() -> None:
    cap = batch_cap(records=5000, rate=0.0256, delta=1e-5)
    assert binom.sf(cap, 5000, 0.0256) <= 1e-8 < binom.sf(cap - 2, 5000, 0.0256)
    capped = Spend(noise_multiplier=0.7, sample_rate=0.0256, steps=120, cap=cap, records=5000)
    assert epsilon([capped], delta=1e-5, relation=ZERO_OUT) == pytest.approx(4.849, rel=2e-3)
    assert batch_cap(records=10, rate=0.9, delta=1e-5) == 10


def test_nothing_spent_is_nothing_by_every_accountant() -> None:
    assert cross_check([], delta=1e-5) == {"PLD": 0.0, "PRV": 0.0, "RDP": 0.0}


@pytest.mark.parametrize(
    ("task", "records", "sigmas"),
    [
        ("MNLI", 392_702, (0.541, 0.441)),
        ("SST-2", 67_349, (0.773, 0.614)),
        ("QNLI", 104_743, (0.685, 0.553)),
        ("QQP", 363_846, (0.547, 0.446)),
    ],
)
def test_fedsvd_setting_oracles(task: str, records: int, sigmas: tuple[float, float]) -> None:
    # batch 128, 500 steps, delta 1e-5, six equal clients
    for target, sigma in zip((3.0, 6.0), sigmas, strict=True):
        found = calibrate(target=target, delta=1e-5, sample_rate=128 / (records / 6), steps=500)
        assert found == pytest.approx(sigma, rel=0.01), (task, target)


@pytest.mark.parametrize(("sigma", "printed"), [(1.0, "54"), (2.0, "20.7"), (5.0, "6.6"), (10.0, "2.9")])
def test_fifty_rounds_of_client_level_noise_oracles(sigma: float, printed: str) -> None:
    found = epsilon([Spend(noise_multiplier=sigma, sample_rate=1.0, steps=50)], delta=1e-5)
    # without sampling there is a closed form; "2.9" itself is 1.5 % below its 2.943
    assert found == pytest.approx(get_epsilon_gaussian(sigma / 50**0.5, 1e-5), rel=1e-4)
    digits = len(printed.partition(".")[2])
    assert f"{found:.{digits}f}" == printed


@pytest.mark.parametrize(("sigma", "expected"), [(1.0, 0.071), (0.6, 0.94)])
def test_what_a_noised_gradient_basis_costs(sigma: float, expected: float) -> None:
    # 50 records expected of 20,000, once
    found = epsilon([Spend(noise_multiplier=sigma, sample_rate=50 / 20_000, steps=1)], delta=1e-6)
    assert found == pytest.approx(expected, rel=0.01)


def test_one_step_on_all_records_costs_what_the_mechanism_does() -> None:
    found = epsilon([Spend(noise_multiplier=1.0, sample_rate=1.0, steps=1)], delta=1e-5)
    assert found == pytest.approx(4.377, rel=1e-3)


@pytest.mark.parametrize(
    ("records", "per_record", "per_batch"),
    [(10_000, "0.014", "0.168"), (52_000, "0.002", "0.018"), (260_000, "0.0004", "0.002")],
)
def test_what_the_published_dp_lora_settings_come_to(records: int, per_record: str, per_batch: str) -> None:
    # sigma = 2 for A and B apart is 2 / sqrt(2) jointly; clipping a batch bounds a record by 2C only
    for multiplier, expected in ((2 / 2**0.5, per_record), (1 / 2**0.5, per_batch)):
        spend = Spend(noise_multiplier=multiplier, sample_rate=8 / records, steps=50)
        # one digit is all that was published of some
        digits = len(expected.partition(".")[2])
        assert f"{epsilon([spend], delta=1e-5):.{digits}f}" == expected
    without = Spend(noise_multiplier=2 / 2**0.5, sample_rate=1.0, steps=50)
    assert epsilon([without], delta=1e-5) == pytest.approx(33.1, abs=0.05)


def test_the_literal_dp_lora_recipe_has_the_papers_noise_and_comes_to_what_its_header_says() -> None:
    recipe = Config.from_toml(recipes_dir() / "finance" / "tweets-dp-lora-literal.toml")
    plan = make_plan(recipe, units=10_000, site="a")
    assert plan.noise_deviation == pytest.approx(2 * 10)
    assert plan.clipping_norm == pytest.approx(10 * 2**0.5)
    spend = plan.spend(rounds=plan.rounds)
    assert (spend.steps, spend.sample_rate) == (50, 8 / 10_000)
    assert epsilon([spend], delta=plan.delta) == pytest.approx(0.014, abs=0.0006)


def test_next_to_no_noise_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(
        PrivacyError, match=r"a noise multiplier of 1e-06 .* protects nothing.* give 0.02 or more"
    ):
        epsilon([Spend(noise_multiplier=1e-6, sample_rate=0.1, steps=1)], delta=1e-5)


def test_accounting_is_bounded_before_any_of_it() -> None:
    base = {"privacy.enabled": True, "privacy.epsilon": 8.0}
    for values in (
        base | {"federation.rounds": 1_000_000},
        base | {"federation.rounds": 10_000, "train.local_steps": 11},
        base | {"federation.mode": "central", "federation.rounds": 10_000, "train.local_steps": 5},
        base | {"privacy.epsilon": 1e300},
        {"site_privacy.enabled": True, "site_privacy.epsilon": 1e300},
        {"site_privacy.enabled": True, "site_privacy.epsilon": 8.0, "federation.rounds": 1_000_000},
    ):
        with pytest.raises(ConfigError, match="at most|between 0 and 100"):
            Config.from_flat(values)
    Config.from_flat(base | {"federation.rounds": 10_000, "train.local_steps": 10})


def test_losses_too_wide_for_memory_are_refused_and_none_are_met_on_the_way_to_a_target() -> None:
    wide = Spend(noise_multiplier=0.1, sample_rate=0.5, steps=100_000)
    with pytest.raises(PrivacyError, match=r"0.1 over 100000 steps protects nothing"):
        within([wide], delta=1e-5, limit=8.0)
    # the fine grid would not fit, and the coarse one is an upper bound too
    rough = Spend(noise_multiplier=0.5, sample_rate=0.5, steps=10_000)
    assert not within([rough], delta=1e-5, limit=8.0)
    assert epsilon([rough], delta=1e-5) > 1000
    sigma = calibrate(target=100.0, delta=1e-5, sample_rate=0.9, steps=8_000)
    assert 1 < sigma < 20
