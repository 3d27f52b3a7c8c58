"""The audits: a sound path passes every one, and every known mistake is caught by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedllm.config import Config
from fedllm.data.encode import collate
from fedllm.data.sites import simulated_sites
from fedllm.errors import BudgetError, ConfigError, PrivacyError
from fedllm.federation import audit, canary_run, client, inversion, membership
from fedllm.federation.audit import Subject, static_checks, subject
from fedllm.federation.budget import planned_sites
from fedllm.privacy import plan as plan_module
from fedllm.privacy.audit import Check
from fedllm.privacy.entropy import SecureGenerator
from fedllm.runs.folder import load_config
from fedllm.training import steps
from fedllm.training.canaries import audit_mechanism

VALUES: dict[str, Any] = {
    "model.name": "tiny-llama",
    "model.dtype": "float32",
    "adapter.rank": 4,
    "adapter.layers": "0",
    "data.source": "mcc",
    "train.batch_size": 20,
    "train.local_steps": 3,
    "train.max_length": 160,
    "train.threads": 1,
    "federation.sites": 2,
    "federation.rounds": 3,
    "privacy.enabled": True,
    "privacy.epsilon": 4.0,
    "privacy.delta": 1e-4,
    "privacy.clipping_norm": 0.1,
}


def config(**changes: Any) -> Config:
    return Config.from_flat(VALUES | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture
def found() -> Subject:
    return subject(config())


def failures(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if check.passed is False]


def everything(found: Subject) -> list[str]:
    """Return the names of all failing checks of the static and the mechanism audit."""
    return failures([*static_checks(found), audit_mechanism(found.plan, trials=600).check])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"privacy__relation": "replace-one"},
        {"privacy__relation": "zero-out-one", "privacy__batch_cap": True},
        {"privacy__noise": "discrete-gaussian"},
        {"adapter__method": "lora", "strategy__name": "fedit"},
        {"model__kind": "encoder", "model__name": "tiny-bert", "adapter__method": "lora"},
    ],
)
def test_a_sound_recipe_passes_every_check(changes: dict[str, Any]) -> None:
    found = subject(config(**changes))
    checks = static_checks(found)
    assert failures(checks) == []
    assert len(checks) == 9
    trials = 200 if found.plan.discrete else 600
    assert audit_mechanism(found.plan, trials=trials).check.passed


def weaker(monkeypatch: pytest.MonkeyPatch, divisor: float) -> None:
    real = plan_module.gaussian
    monkeypatch.setattr(
        plan_module,
        "gaussian",
        lambda shape, *, deviation, generator: real(
            shape, deviation=deviation / divisor, generator=generator
        ),
    )


def halved(monkeypatch: pytest.MonkeyPatch) -> None:
    weaker(monkeypatch, 2)


def divided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    weaker(monkeypatch, 20)


def clipped_late(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean_then_clip(gradients: dict[str, Tensor], *, clipping_norm: float) -> dict[str, Tensor]:
        means = {key: value.nan_to_num().mean(dim=0) for key, value in gradients.items()}
        norm = torch.cat([value.flatten() for value in means.values()]).norm()
        rows = len(next(iter(gradients.values())))
        return {key: rows * value * min(1.0, clipping_norm / float(norm)) for key, value in means.items()}

    monkeypatch.setattr(plan_module, "clipped_sum", mean_then_clip)


def not_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        plan_module,
        "clipped_sum",
        lambda gradients, *, clipping_norm: {
            k: v.nan_to_num(0, 0, 0).sum(dim=0) for k, v in gradients.items()
        },
    )


def shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    left: dict[int, list[int]] = {}

    def epochs(count: int, *, rate: float, generator: SecureGenerator) -> list[int]:
        size = round(rate * count)
        if len(left.get(count, [])) < size:
            left[count] = np.argsort(generator.uniform(count)).tolist()
        batch, left[count] = left[count][:size], left[count][size:]
        return batch

    monkeypatch.setattr(plan_module, "poisson_sample", epochs)


def batch_mean_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean_over_tokens(session: Any, records: Any) -> Tensor:
        batch = collate(records, session.pad_id)
        labels = batch.input_ids.masked_fill(~batch.answer_mask, -100)
        loss = session.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels
        ).loss
        return loss.expand(len(records))

    monkeypatch.setattr(steps, "record_losses", mean_over_tokens)


def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        SecureGenerator, "normal", lambda self, shape: torch.randn(shape, dtype=torch.float64).numpy()
    )


def ignoring_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    def passes(gradients: dict[str, Tensor], *, clipping_norm: float) -> dict[str, Tensor]:
        norms = torch.stack([value.flatten(1).square().sum(1) for value in gradients.values()]).sum(0).sqrt()
        factors = (clipping_norm / norms).clamp_max(1.0)
        return {key: torch.einsum("b,b...->...", factors, value) for key, value in gradients.items()}

    monkeypatch.setattr(plan_module, "clipped_sum", passes)


@pytest.mark.parametrize(
    ("mistake", "caught_by"),
    [
        (halved, {"noise", "mechanism"}),
        (divided_again, {"noise", "mechanism"}),
        (clipped_late, {"sensitivity"}),
        (not_clipped, {"sensitivity", "mechanism"}),
        (shuffled, {"sampler"}),
        (batch_mean_loss, {"loss of the record alone"}),
        (seeded, {"source of noise"}),
        (ignoring_nan, {"sensitivity"}),
    ],
)
def test_every_known_mistake_is_caught(
    mistake: Callable[[pytest.MonkeyPatch], None],
    caught_by: set[str],
    found: Subject,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mistake(monkeypatch)
    assert caught_by <= set(everything(found))


def test_delta_of_one_over_batches_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    units = subject(config()).plan.units
    with pytest.raises(PrivacyError, match="is too large for its number of records"):
        subject(config(privacy__delta=20 / units))
    # and by the audit where another site is smaller than the one that is looked at
    monkeypatch.setattr(audit, "require_delta", lambda delta, **options: _refuse())
    assert "delta" in failures(static_checks(subject(config())))


def _refuse() -> None:
    raise PrivacyError("too large")


def test_a_value_that_may_leave_fails_the_audit(found: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def passed(site: object, *reply: object) -> object:
        return reply

    monkeypatch.setattr(client, "_released", passed)
    assert "what leaves" in failures(static_checks(found))


def test_an_adapter_that_does_not_train_fails_the_audit(
    found: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    assert "private path" in failures(static_checks(found))


def test_open_recipes_have_nothing_to_audit() -> None:
    with pytest.raises(ConfigError, match="there is nothing private to audit"):
        subject(config(privacy__enabled=False, privacy__epsilon=0.0))
    with pytest.raises(ConfigError, match="needs a causal model and privacy"):
        inversion.attack_updates(config(privacy__enabled=False, privacy__epsilon=0.0))
    with pytest.raises(ConfigError, match="rules that average"):
        canary_run.audit_one_run(config(adapter__method="lora", strategy__name="fedsvd"))


def test_pooled_records_are_audited_as_they_train() -> None:
    shares, pooled = subject(config()), subject(config(federation__mode="central"))
    assert list(pooled.units) == ["site-0"]
    assert pooled.plan.units == sum(shares.units.values())
    assert pooled.plan.local_steps == 2 * shares.plan.local_steps
    for look in (subject, canary_run.audit_one_run):
        with pytest.raises(ConfigError, match="nothing is trained, so there is nothing to audit"):
            look(config(federation__mode="base"))


def test_one_run_stays_below_the_accountant_and_sees_a_lack_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = config(adapter__layers="", train__batch_size=60, train__micro_batch=60, train__local_steps=6)
    sound = canary_run.audit_one_run(recipe, canaries=300)
    assert [result.subject for result in sound] == ["site-0", "site-1"]
    assert all(result.check.passed and result.theory <= 4.0 for result in sound)
    divided_again(monkeypatch)
    leaky = canary_run.audit_one_run(recipe, canaries=300)
    assert min(result.area for result in leaky) > max(result.area for result in sound)
    assert min(result.bound for result in leaky) > 0.5


def test_matrices_that_train_in_turn_are_audited_with_their_real_records(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = config(adapter__method="lora", strategy__name="rolora", federation__rounds=2)
    found = canary_run.audit_one_run(recipe, canaries=40)
    assert [result.canaries for result in found] == [40, 40]
    assert all(result.check.passed for result in found)
    assert "contributes nothing" not in caplog.text


def test_tokens_are_read_from_a_small_record_and_not_from_its_private_gradient() -> None:
    found = inversion.attack_updates(config(data__max_per_label=5), records=4, candidates=3, rank=8)
    longer = [row for row in found.rows if row.tokens > row.rank]
    assert longer == list(found.rows)
    assert all(check.passed is None for check in found.checks)
    assert (found.matching.found, found.matching.tried) == (3, 3)


def test_membership_is_measured_on_a_finished_run(federate: Any) -> None:
    folder = federate(train__local_steps=6, train__lr=5e-2, data__heldout=0.4)
    found = membership.attack_membership(folder.path, records=60)
    # two rounds of 6 steps of 4 records at each of three sites
    assert found.members == 3 * 48
    assert 0.3 < found.area < 1.0
    assert found.interval[0] <= found.area <= found.interval[1]
    assert found.check.passed is None
    text = found.check.detail
    assert "144 records that trained against" in text


def test_membership_of_a_private_run_says_how_many_were_drawn(federate: Any) -> None:
    private = {"privacy__enabled": True, "privacy__noise_multiplier": 0.6, "privacy__delta": 1e-4}
    folder = federate(**private, federation__sites=2, train__batch_size=40, data__heldout=0.4)
    found = membership.attack_membership(folder.path, records=20)
    assert found.members == 40
    units = [len(site.units) for site in simulated_sites(load_config(folder).data, sites=2, seed=42)]
    assert found.drawn == pytest.approx(sum(1 - (1 - 40 / n) ** 4 for n in units) / 2)
    assert (
        f"40 training records (some {found.drawn:.0%} of them drawn in a step) against" in found.check.detail
    )


def test_a_real_sites_recipe_may_name_columns_and_counts_that_are_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "\n".join(f"record {i},{'ab'[i % 2]}" for i in range(200))
    (tmp_path / "own.csv").write_text(f"text,label\n{rows}\n")
    (tmp_path / "public.csv").write_text("text,label\npublic one,a\npublic two,b\n")
    policy = tmp_path / "site.toml"
    policy.write_text(
        'site = "north"\ndata_path = "own.csv"\nmax_delta = 1e-4\nheldout_path = "public.csv"\n'
    )
    asked = config(
        data__source="file",
        data__labels="a | b",
        data__partition="column",
        data__site="hospital",
        evaluation__noise_multiplier=4.0,
    )
    found = subject(asked, policy)
    assert failures(static_checks(found)) == []
    with policy.open("a") as file:
        file.write("min_noise_multiplier = 90.0\n")
    for look in (subject, planned_sites):
        with pytest.raises(BudgetError, match="is below its policy's least, 90"):
            look(asked, policy)
    # the recipe's noised counts do not go with the policy's public records; each value is tried all the same
    stopped = next(check for check in static_checks(found) if check.name == "what leaves")
    assert "6 values that a site was made to answer with were stopped" in stopped.detail
    monkeypatch.setattr(audit, "reply_with", lambda *_: ({"error": "no such recipe"}, {}))
    assert "what leaves" in failures(static_checks(found))
    unusable = replace(found, tokens=replace(found.tokens, train=(), units=((),) * 200))
    assert "loss of the record alone" in failures(static_checks(unusable))
