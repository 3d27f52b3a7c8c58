"""Accounting against the numbers of dp-accounting, Opacus and published settings."""

from __future__ import annotations

import pytest
from opacus.accountants import PRVAccountant, RDPAccountant

from fedllm.errors import PrivacyError
from fedllm.privacy.accounting import Spend, calibrate, epsilon, require_delta


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "expected"),
    [(1.0, 0.01, 1000, 1.828), (0.7, 0.0256, 120, 4.849), (0.6, 0.1, 30, 12.20)],
)
def test_epsilon_oracles_and_peers(sigma: float, rate: float, steps: int, expected: float) -> None:
    found = epsilon([Spend(noise_multiplier=sigma, sample_rate=rate, steps=steps)], delta=1e-5)
    assert found == pytest.approx(expected, abs=2e-3)
    rdp, prv = RDPAccountant(), PRVAccountant()
    rdp.history = prv.history = [(sigma, rate, steps)]
    # PRV adds its error bound of 0.01; RDP is a looser upper bound
    assert found <= prv.get_epsilon(1e-5) <= found + 0.03
    assert found <= rdp.get_epsilon(1e-5)


@pytest.mark.parametrize(("target", "sigma"), [(0.5, 2.213), (1.0, 1.383), (3.0, 0.838), (8.0, 0.580)])
def test_calibration_oracles(target: float, sigma: float) -> None:
    found = calibrate(target=target, delta=1e-5, sample_rate=0.0256, steps=117)
    assert found == pytest.approx(sigma, rel=3e-3)
    assert epsilon([Spend(noise_multiplier=found, sample_rate=0.0256, steps=117)], delta=1e-5) <= target


def test_fed_sb_oracle_at_a_sound_delta() -> None:
    # n = 183,122 records, batches of 32, 34,338 steps: noise for epsilon 3 at delta = 1/n
    found = calibrate(target=3.0, delta=1 / 183_122, sample_rate=1 / 5723, steps=34_338)
    assert found == pytest.approx(0.485, abs=3e-3)


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
