"""Private choice among settings: the random number of runs, its price, and what cannot be chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedllm.config import Config
from fedllm.errors import ConfigError
from fedllm.federation.budget import planned_sites
from fedllm.federation.tuning import draw_runs, require_tunable, tuning_cost
from fedllm.privacy.accounting import Spend, cross_check, epsilon, selected_epsilon

VALUES: dict[str, Any] = {
    "model.name": "tiny-llama",
    "data.source": "mcc",
    "data.heldout_public": True,
    "federation.sites": 2,
    "federation.rounds": 2,
    "train.batch_size": 8,
    "privacy.enabled": True,
    "privacy.epsilon": 2.0,
    "privacy.delta": 1e-4,
}


def config(**changes: Any) -> Config:
    return Config.from_flat(VALUES | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.mark.parametrize(
    "changes",
    [{"privacy__relation": "replace-one"}, {"privacy__relation": "zero-out-one", "privacy__batch_cap": True}],
)
def test_a_choice_is_accounted_under_one_relation(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="privacy.relation=add-or-remove-one without privacy.batch_cap"):
        require_tunable([config(**changes)])


def test_a_choice_by_accuracy_needs_labels() -> None:
    with pytest.raises(ConfigError, match="data.task=generate has none"):
        require_tunable([config(data__task="generate")])


def test_the_number_of_runs_is_geometric_and_every_candidate_is_as_likely() -> None:
    drawn = [draw_runs(candidates=3, mean=4.0) for _ in range(4000)]
    counts = np.array([len(runs) for runs in drawn])
    assert counts.min() == 1
    assert counts.mean() == pytest.approx(4.0, rel=0.08)
    assert (counts == 1).mean() == pytest.approx(0.25, abs=0.03)
    shares = np.bincount(np.concatenate(drawn), minlength=3) / counts.sum()
    assert shares == pytest.approx([1 / 3] * 3, abs=0.03)


@pytest.mark.parametrize("mean", [float("nan"), float("inf")])
def test_the_mean_is_a_finite_number(mean: float) -> None:
    with pytest.raises(ConfigError, match="--mean: .* give a finite number"):
        draw_runs(candidates=2, mean=mean)


def test_a_choice_costs_more_than_a_run_and_less_than_all_of_them() -> None:
    spend = Spend(noise_multiplier=1.0, sample_rate=0.01, steps=100)
    one = cross_check([spend], delta=1e-5)["RDP"]
    many = cross_check([Spend(noise_multiplier=1.0, sample_rate=0.01, steps=5000)], delta=1e-5)["RDP"]
    assert one < selected_epsilon(spend, mean=50.0, delta=1e-5) < many
    assert selected_epsilon(spend, mean=3.0, delta=1e-5) < selected_epsilon(spend, mean=50.0, delta=1e-5)


def test_costs_of_every_site() -> None:
    costs = tuning_cost(config(), mean=3.0, runs=4)
    assert [cost.site for cost in costs] == ["site-0", "site-1"]
    for cost in costs:
        assert 1.9 < cost.one <= 2.0
        assert cost.composed > cost.one
        assert cost.selected > cost.one


def test_pooled_records_cost_what_one_site_with_all_of_them_spends() -> None:
    noise = {"privacy__noise_multiplier": 1.0, "privacy__epsilon": 0.0}
    pooled = config(federation__mode="central", **noise)
    (cost,) = tuning_cost(pooled, mean=3.0, runs=4)
    units = sum(plan.plan.units for plan in planned_sites(config(**noise), None))
    steps = 2 * 2 * pooled.train.local_steps
    spend = Spend(noise_multiplier=1.0, sample_rate=8 / units, steps=steps)
    assert cost.site == "site-0"
    assert cost.one == pytest.approx(epsilon([spend], delta=1e-4), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__heldout_public": False}, "needs privacy.enabled=true and data.heldout_public=true"),
        ({"train__batch_size": 16}, "candidates differ in train.batch_size"),
        ({"federation__mode": "central"}, "candidates differ in federation.mode"),
        ({"privacy__epsilon": 3.0}, "candidates differ in privacy.epsilon"),
        ({"data__heldout": 0.3}, "candidates differ in their data"),
    ],
)
def test_what_changes_the_price_cannot_be_chosen(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_tunable([config(), config(**changes)])
    require_tunable([config(), config(train__lr=0.1, privacy__clipping_norm=0.3, adapter__rank=8)])
