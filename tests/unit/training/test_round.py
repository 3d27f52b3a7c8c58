"""A site's round: equal to central training, resumable, private only when it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedllm.adapters import METHODS
from fedllm.adapters.state import AdapterState
from fedllm.config import Config
from fedllm.data.encode import Encoded, PromptEncoder
from fedllm.data.sites import simulated_site
from fedllm.errors import DataError, PrivacyError
from fedllm.privacy.entropy import SecureGenerator
from fedllm.privacy.plan import PrivacyPlan
from fedllm.training import round as round_module
from fedllm.training import steps
from fedllm.training.dirac import DiracCanaries
from fedllm.training.forward import record_losses
from fedllm.training.round import RoundResult, evaluate, train_round
from fedllm.training.session import Session, SiteTokens, open_session, tokenise
from fedllm.training.spec import adapter_spec, basis_from_seed
from fedllm.training.steps import learning_rate, private_gradients

SETTINGS = {
    "model.name": "tiny-llama",
    "model.dtype": "float32",
    "adapter.rank": 4,
    "data.source": "mcc",
    "train.batch_size": 6,
    "train.local_steps": 3,
    "train.micro_batch": 4,
    "train.max_length": 160,
    "train.threads": 1,
    "federation.sites": 2,
    "federation.rounds": 3,
}


def make(**settings: object) -> tuple[Config, Session, SiteTokens, AdapterState]:
    config = Config.from_flat(SETTINGS | {k.replace("__", "."): v for k, v in settings.items()})  # type: ignore[operator]
    spec = adapter_spec(config)
    basis = basis_from_seed(spec)
    assert basis is not None
    session = open_session(config, spec, basis)
    data = simulated_site(config.data, sites=2, seed=config.run.seed, index=0)
    state = session.method.initial_state(spec, seed="00")
    return config, session, tokenise(data, config), state


def go(
    session: Session,
    site: SiteTokens,
    config: Config,
    state: AdapterState,
    *,
    round: int,
    plan: PrivacyPlan | None,
    **options: object,
) -> RoundResult:
    """Train one round, all matrices of the method unless told otherwise."""
    settings = {"train": session.method.matrices(session.spec)} | options
    return train_round(session, site, config=config, state=state, round=round, plan=plan, **settings)  # type: ignore[arg-type]


def plan(**changes: object) -> PrivacyPlan:
    values = {
        "noise_multiplier": 0.5,
        "clipping_norm": 0.1,
        "units": 200,
        "sample_rate": 0.03,
        "expected_batch": 6.0,
        "local_steps": 3,
        "rounds": 3,
        "delta": 1e-5,
        "relation": "add-or-remove-one",
    }
    return PrivacyPlan(**(values | changes))  # type: ignore[arg-type]


def all_of(units: int, **changes: object) -> PrivacyPlan:
    """Return a plan that takes every unit."""
    return plan(units=units, sample_rate=1.0, **changes)


def alone(records: Sequence[Encoded]) -> list[list[Encoded]]:
    """Return units of one record."""
    return [[record] for record in records]


def released(session: Session, units: Sequence[Sequence[Encoded]], the_plan: PrivacyPlan) -> Tensor:
    """Return what a private step releases of some units, all matrices in one vector."""
    whole = replace(the_plan, units=len(units), sample_rate=1.0)
    private_gradients(
        session, session.parameters, units, plan=whole, generator=SecureGenerator(), micro_batch=4
    )
    found = torch.cat([value.grad.flatten() for value in session.parameters.values()])
    for parameter in session.parameters.values():
        parameter.grad = None
    return found


@pytest.mark.parametrize("method", METHODS)
def test_training_is_reproducible_and_lowers_the_loss(method: str) -> None:
    config, session, site, state = make(
        adapter__method=method, adapter__heads=2, train__local_steps=8, train__lr=0.05
    )
    before = evaluate(session, site, config=config, state=state, records=8)
    one = go(session, site, config, state, round=1, plan=None)
    two = go(session, site, config, state, round=1, plan=None)
    for key in state.tensors:
        assert np.array_equal(one.state.tensors[key], two.state.tensors[key])
    after = evaluate(session, site, config=config, state=one.state, records=8)
    assert before is not None
    assert after is not None
    assert after.loss < before.loss
    other = go(session, site, config, state, round=2, plan=None)
    assert any(not np.array_equal(one.state.tensors[k], other.state.tensors[k]) for k in state.tensors)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_keeps_less_and_changes_nothing(dropout: float) -> None:
    kept, results = [], []
    for checkpointing in (False, True):
        config, session, site, state = make(
            train__gradient_checkpointing=checkpointing, adapter__dropout=dropout
        )
        sizes: list[int] = []

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            record_losses(session, site.train[:4])
        kept.append(sum(sizes))
        results.append(go(session, site, config, state, round=1, plan=None))
    assert kept[1] < kept[0] / 2
    plain, again = results
    for key, value in plain.state.tensors.items():
        np.testing.assert_array_equal(again.state.tensors[key], value)


def test_equal_to_a_plain_peft_loop() -> None:
    config, session, site, state = make(adapter__method="lora")
    found = go(session, site, config, state, round=1, plan=None).state
    from fedllm.adapters.method import write_state
    from fedllm.data.order import batch_indices

    write_state(session.method, session.model, state)
    optimizer = torch.optim.AdamW(list(session.parameters.values()), lr=config.train.lr, weight_decay=0.0)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = learning_rate(config.train, step=step, total=9)
        chosen = batch_indices(len(site.train), batch_size=6, step=step, seed=42, site=site.name)
        losses = []
        for index in chosen:
            record = site.train[index]
            ids = torch.tensor([record.prompt + record.answer])
            labels = torch.tensor([[-100] * len(record.prompt) + list(record.answer)])
            losses.append(session.model(input_ids=ids, labels=labels).loss)
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    for key, parameter in session.parameters.items():
        assert torch.allclose(parameter, torch.tensor(found.tensors[key]), atol=2e-5), key


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.private])
def test_private_gradient_without_noise_is_the_clipped_sum(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, session, site, _ = make(
        adapter__method=method,
        privacy__enabled=True,
        privacy__noise_multiplier=0.5,
        adapter__rank=3,
        adapter__heads=2,
    )
    with torch.no_grad():
        for parameter in session.parameters.values():
            parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(SecureGenerator, "normal", lambda self, shape: np.zeros(shape))
    records = site.train[:5]
    private_gradients(
        session,
        session.parameters,
        alone(records),
        plan=all_of(5),
        generator=SecureGenerator(),
        micro_batch=2,
    )
    found = {key: value.grad.clone() for key, value in session.parameters.items()}
    expected = {key: torch.zeros_like(value) for key, value in session.parameters.items()}
    for record in records:
        for parameter in session.parameters.values():
            parameter.grad = None
        record_losses(session, [record]).sum().backward()
        assert session.recorder is not None
        single = {key: value[0] for key, value in session.recorder.take().items()}
        norm = sum(value.square().sum() for value in single.values()).sqrt()
        for key, value in single.items():
            expected[key] += value * min(1.0, 0.1 / float(norm)) / 6.0
    for key, value in expected.items():
        assert torch.allclose(found[key], value, atol=1e-7), key
    for parameter in session.parameters.values():
        parameter.grad = None


def test_an_empty_batch_is_noise_alone_and_takes_no_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    _, session, _, _ = make(privacy__enabled=True, privacy__noise_multiplier=0.5)
    monkeypatch.setattr("fedllm.training.steps.record_losses", lambda *a: pytest.fail("a forward pass"))
    private_gradients(
        session, session.parameters, [], plan=all_of(0), generator=SecureGenerator(), micro_batch=2
    )
    values = torch.cat([p.grad.flatten() for p in session.parameters.values()])
    # deviation of the noise on the mean gradient: sigma C / expected batch
    assert values.std() == pytest.approx(0.5 * 0.1 / 6.0, rel=0.2)
    for parameter in session.parameters.values():
        parameter.grad = None


def test_a_record_moves_the_release_by_at_most_the_clipping_norm() -> None:
    # unequal lengths: a loss over the batch's tokens would break this bound
    _, session, site, _ = make(privacy__enabled=True, privacy__noise_multiplier=0.5)
    ordered = sorted(site.train, key=lambda record: len(record.prompt))
    records = [*ordered[:6], ordered[-1]]
    sums = []
    for chosen in (records, records[:-1]):
        private_gradients(
            session,
            session.parameters,
            alone(chosen),
            plan=all_of(len(chosen), noise_multiplier=0.0),
            generator=SecureGenerator(),
            micro_batch=3,
        )
        sums.append({key: value.grad.clone() * 6.0 for key, value in session.parameters.items()})
        for parameter in session.parameters.values():
            parameter.grad = None
    moved = sum((sums[0][key] - sums[1][key]).square().sum() for key in sums[0]).sqrt()
    assert 0 < float(moved) <= 0.1 * (1 + 1e-4)


@pytest.mark.parametrize("neighbour", ["long", "duplicate", "alone", "not finite"])
@pytest.mark.parametrize("method", ["lora", "fed-sb"])
def test_adversarial_neighbours_move_the_release_by_at_most_the_clipping_norm(
    method: str, neighbour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, session, site, _ = make(adapter__method=method, privacy__enabled=True, privacy__noise_multiplier=0.5)
    with torch.no_grad():
        for parameter in session.parameters.values():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1
            )
    ordered = sorted(site.train, key=lambda record: len(record.prompt))
    base = [] if neighbour == "alone" else ordered[:6]
    extra = ordered[0] if neighbour == "duplicate" else ordered[-1]
    if neighbour == "not finite":
        real = steps.record_gradients

        def broken(*given: Any) -> dict[str, Tensor]:
            found = real(*given)
            for row, record in enumerate(given[-1]):
                if record is extra:
                    next(iter(found.values()))[row] = torch.nan
            return found

        monkeypatch.setattr(steps, "record_gradients", broken)
    quiet = plan(noise_multiplier=0.0)
    moved = released(session, alone([*base, extra]), quiet) - released(session, alone(base), quiet)
    assert float(moved.norm()) * 6.0 <= 0.1 * (1 + 1e-4)
    assert (float(moved.norm()) > 1e-6) == (neighbour != "not finite")


@pytest.mark.parametrize("discrete", [False, True])
def test_a_unit_of_many_records_moves_the_release_by_at_most_the_clipping_norm(discrete: bool) -> None:
    _, session, site, _ = make(privacy__enabled=True, privacy__noise_multiplier=0.5)
    # the grid follows the noise: with next to none it is fine enough to compare with the plain sum
    quiet = plan(noise_multiplier=1e-6 if discrete else 0.0, discrete=discrete)
    units = [site.train[:3], site.train[3:4], site.train[4:20]]
    whole, without = released(session, units, quiet), released(session, units[:2], quiet)
    moved = float((whole - without).norm()) * 6.0
    assert 0 < moved <= 0.1 * (1 + 1e-3)
    if discrete:
        plain = released(session, units[:2], plan(noise_multiplier=0.0))
        assert torch.allclose(without, plain, atol=1e-5)


def test_the_guesser_of_the_one_run_audit_knows_all_but_the_canaries() -> None:
    _, session, site, _ = make(privacy__enabled=True, privacy__noise_multiplier=1.0)
    real = [site.train[:3], site.train[3:4], site.train[4:6]]
    shapes = {key: tuple(value.shape) for key, value in session.parameters.items()}
    canaries = DiracCanaries(shapes, count=20, clipping_norm=0.1, expected_batch=1.0)
    units = [*real, *canaries.units]
    gradients = steps.of_units(partial(steps.record_gradients, session, session.parameters))
    found = steps.private_release(
        shapes,
        units,
        gradients_of=canaries.among(gradients, shapes),
        plan=all_of(len(units), noise_multiplier=0.0, expected_batch=1.0, clipping_norm=0.1),
        generator=SecureGenerator(),
        micro_batch=16,
    )
    canaries.observe(found)
    np.testing.assert_allclose(canaries.scores, 0.1 * canaries.included, atol=1e-6)


def test_a_units_gradient_is_the_mean_of_its_records() -> None:
    _, session, site, _ = make(privacy__enabled=True, privacy__noise_multiplier=0.5)
    wide = plan(noise_multiplier=0.0, clipping_norm=1e9)
    together = released(session, [site.train[:3], site.train[3:5]], wide)
    single = [released(session, [[record]], wide) for record in site.train[:5]]
    expected = sum(single[:3], torch.zeros(())) / 3 + sum(single[3:], torch.zeros(())) / 2
    assert torch.allclose(together, expected, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "fed-sb"])
def test_opacus_engine_gives_the_same_gradient(method: str) -> None:
    quiet, found = plan(noise_multiplier=0.0), []
    for engine in ("own", "opacus"):
        _, session, site, state = make(
            adapter__method=method,
            privacy__enabled=True,
            privacy__noise_multiplier=0.5,
            privacy__engine=engine,
        )
        with torch.no_grad():
            for parameter in session.parameters.values():
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
        session.trainable(session.method.matrices(session.spec))
        found.append(released(session, alone(site.train[:5]), quiet))
        assert state.spec.method == method
    assert torch.allclose(*found, atol=1e-6)
    assert float(found[0].norm()) > 0


def test_private_rounds_are_not_reproducible_and_withhold_the_loss() -> None:
    config, session, site, state = make(privacy__enabled=True, privacy__noise_multiplier=0.5)
    one = go(session, site, config, state, round=1, plan=plan())
    two = go(session, site, config, state, round=1, plan=plan())
    assert one.loss is None
    assert all(not np.array_equal(one.state.tensors[k], two.state.tensors[k]) for k in state.tensors)


def test_the_self_check_stops_a_path_that_does_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    config, session, site, state = make(privacy__enabled=True, privacy__noise_multiplier=0.5)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    with pytest.raises(PrivacyError, match="did not move in the first private step"):
        go(session, site, config, state, round=1, plan=plan())
    monkeypatch.undo()
    real = torch.optim.AdamW.step

    def moves_the_base(self: torch.optim.AdamW) -> None:
        real(self)
        with torch.no_grad():
            next(iter(session.base.get_input_embeddings().parameters())).add_(1e-3)

    monkeypatch.setattr(torch.optim.AdamW, "step", moves_the_base)
    with pytest.raises(PrivacyError, match="a frozen weight moved"):
        go(session, site, config, state, round=1, plan=plan())
    monkeypatch.undo()
    with torch.no_grad():
        next(iter(session.base.get_input_embeddings().parameters())).sub_(1e-3)


def test_a_session_without_private_path_refuses_to_train_privately() -> None:
    config, session, site, state = make()
    with pytest.raises(PrivacyError, match="not opened for private training"):
        go(session, site, config, state, round=1, plan=plan())


def test_a_missing_per_example_gradient_stops_training(monkeypatch: pytest.MonkeyPatch) -> None:
    config, session, site, state = make(privacy__enabled=True, privacy__noise_multiplier=0.5)
    assert session.recorder is not None
    real = session.recorder.take
    monkeypatch.setattr(session.recorder, "take", lambda: dict(list(real().items())[1:]))
    with pytest.raises(PrivacyError, match="has no per-example gradient; the private path is not active"):
        go(session, site, config, state, round=1, plan=plan())


def test_what_fails_for_every_record_fails_before_any_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    config, session, site, state = make(privacy__enabled=True, privacy__noise_multiplier=0.5)

    def drawn(*_: object, **__: object) -> None:
        pytest.fail("a record was drawn")

    monkeypatch.setattr(PrivacyPlan, "draw", drawn)
    # a grid too coarse for the norm
    coarse = plan(discrete=True, noise_multiplier=1e8)
    with pytest.raises(PrivacyError, match="no private step can be taken .* the grid is too coarse"):
        go(session, site, config, state, round=1, plan=coarse)


def test_the_largest_pass_is_taken_before_any_record_is_drawn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, session, site, state = make(privacy__enabled=True, privacy__noise_multiplier=1.0)
    passes: list[list[int]] = []
    ordinary = steps.record_gradients

    def watched(session: Session, trained: Any, records: Sequence[Encoded]) -> dict[str, Tensor]:
        passes.append([record.length for record in records])
        if records[0].length == config.train.max_length:
            raise RuntimeError("out of memory")
        return ordinary(session, trained, records)

    monkeypatch.setattr(steps, "record_gradients", watched)
    go(session, site, config, state, round=1, plan=plan(), rehearsed=True)
    assert passes[1] == [160] * 4
    assert (
        "train.micro_batch=4 records of train.max_length=160 tokens fails here (RuntimeError)" in caplog.text
    )
    passes.clear()
    go(session, site, config, state, round=1, plan=plan())
    assert [160] * 4 not in passes


def test_frozen_fingerprint_ignores_the_adapter_only() -> None:
    _, session, _, _ = make()
    before = round_module.frozen_fingerprint(session, session.parameters)
    with torch.no_grad():
        next(iter(session.parameters.values())).add_(1.0)
    assert round_module.frozen_fingerprint(session, session.parameters) == before


def test_a_matrix_that_rests_stays_and_has_no_private_gradient() -> None:
    for private in (False, True):
        options = {"privacy__enabled": True, "privacy__noise_multiplier": 0.5} if private else {}
        config, session, site, state = make(adapter__method="lora", **options)
        found = go(session, site, config, state, round=1, plan=plan() if private else None, train=("B",))
        for key, value in found.state.tensors.items():
            assert np.array_equal(value, state.tensors[key]) == key.endswith(".A"), key


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_an_encoder_learns_its_head_and_adapter_and_has_a_private_path(pooling: str) -> None:
    labels = {"model.kind": "encoder", "model.name": "tiny-bert", "train.lr": 3e-3, "train.local_steps": 20}
    options = {"adapter.method": "lora", "model.pooling": pooling}
    config = Config.from_flat(SETTINGS | labels | options)  # type: ignore[operator]
    spec, basis = adapter_spec(config), basis_from_seed(adapter_spec(config))
    assert basis is not None
    session = open_session(config, spec, basis)
    site = tokenise(simulated_site(config.data, sites=2, seed=42, index=0), config)
    state = session.method.initial_state(spec, seed="00")
    names = (*session.method.matrices(spec), "weight", "bias")
    before = evaluate(session, site, config=config, state=state, records=16)
    found = go(session, site, config, state, round=1, plan=None, train=names)
    after = evaluate(session, site, config=config, state=found.state, records=16)
    assert before is not None
    assert after is not None
    assert after.loss < before.loss
    private = config.replace(privacy__enabled=True, privacy__noise_multiplier=0.5)
    session = open_session(private, spec, basis)
    found = go(session, site, private, state, round=1, plan=plan(), train=names)
    assert all(not np.array_equal(v, state.tensors[k]) for k, v in found.state.tensors.items())


def test_records_that_cannot_be_used_stay_units_and_contribute_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, session, _, _ = make(privacy__enabled=True, privacy__noise_multiplier=1.0)
    data = simulated_site(config.data, sites=2, seed=config.run.seed, index=0)
    short, odd, long = data.train[0], data.train[1], data.train[2]
    records = (short, replace(odd, usable=False), replace(long, label="secret " * 200))
    site = replace(data, train=records, units=((0,), (1, 2), (2,)), heldout=records[2:])
    with pytest.raises(
        DataError, match="1 of 3 records cannot be used; the first: .* train.max_length=160"
    ) as told:
        tokenise(site, config)
    assert "secret" not in str(told.value)
    tokens = tokenise(replace(site, lenient=True), config)
    assert tokens.units == ((0,), (), ())
    assert (len(tokens.train), tokens.own_labels, tokens.heldout) == (1, (short.label,), ())
    assert "1 of 3 records do not train" in caplog.text
    assert "secret" not in caplog.text

    with monkeypatch.context() as patched:
        # as a chat template would that fails on some texts
        patched.setattr(PromptEncoder, "encode", lambda self, example: [][0])
        assert tokenise(replace(site, lenient=True, name="other"), config).units == ((), (), ())
        with pytest.raises(IndexError):
            tokenise(replace(site, name="strict", train=records[:1], heldout=()), config)
    one, none = noiseless(session, tokens.units_of_records), noiseless(session, [[], [], []])
    assert any(value.any() for value in one.values())
    assert not any(value.any() for value in none.values())


def noiseless(
    session: Session, units: Sequence[Sequence[Encoded]], *, fails: Encoded | None = None
) -> dict[str, Tensor]:
    """Return a step's sum of clipped gradients of all units; of a record that ``fails`` none can be had."""

    def gradients(records: Sequence[Encoded]) -> dict[str, Tensor]:
        found = steps.record_gradients(session, session.parameters, records)
        if fails in records:
            raise RuntimeError("out of memory")
        return found

    return steps.private_release(
        {key: value.shape for key, value in session.parameters.items()},
        units,
        gradients_of=steps.of_units(gradients),
        plan=all_of(len(units), noise_multiplier=0.0, expected_batch=1.0),
        generator=SecureGenerator(),
        micro_batch=16,
    )


def test_a_record_that_fails_contributes_zero_and_disturbs_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, session, site, _ = make(privacy__enabled=True, privacy__noise_multiplier=1.0)
    records = site.train[:6]
    without = noiseless(session, alone(records[1:]))
    found = noiseless(session, alone(records), fails=records[0])
    assert "are taken one at a time: together they failed (RuntimeError)" in caplog.text
    assert caplog.text.count("a unit contributes nothing") == 1
    for key, value in without.items():
        assert torch.allclose(found[key], value, atol=1e-7), key


@pytest.mark.parametrize("engine", ["own", "opacus"])
def test_a_pass_that_fails_leaves_nothing_to_the_next(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, session, site, _ = make(privacy__enabled=True, privacy__noise_multiplier=1.0, privacy__engine=engine)
    few, others = site.train[:2], site.train[2:4]
    expected = steps.record_gradients(session, session.parameters, few)

    def breaks(_: Tensor) -> None:
        raise RuntimeError("out of memory")

    def half_a_pass(session: Session, records: Sequence[Encoded]) -> Tensor:
        # the backward pass reaches the upper layers and breaks in the lowest one's input
        layer = session.base.get_decoder().layers[0]
        handle = layer.register_forward_hook(lambda *found: hook(found[-1]))
        losses = record_losses(session, records)
        handle.remove()
        return losses

    def hook(output: object) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        assert isinstance(hidden, Tensor)
        hidden.register_hook(breaks)

    with monkeypatch.context() as patched:
        patched.setattr(steps, "record_losses", half_a_pass)
        with pytest.raises(RuntimeError, match="out of memory"):
            steps.record_gradients(session, session.parameters, others)
    found = steps.record_gradients(session, session.parameters, few)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_the_length_of_a_record_changes_nothing_for_the_others() -> None:
    _, session, _, _ = make(privacy__enabled=True, privacy__noise_multiplier=1.0)
    short, long = (Encoded(tuple(range(40, 38 + size)), (5, 6), truncated=False) for size in (24, 72))
    assert session.pad_id not in (*short.prompt, *long.prompt, 5, 6)

    def poison(_: torch.nn.Module, ids: tuple[Tensor, ...], found: Tensor) -> Tensor:
        # weights that turn every padded record into NaN, and so to zero
        return found.masked_fill((ids[0] == session.pad_id)[..., None], torch.inf)

    handle = session.base.get_input_embeddings().register_forward_hook(poison)
    one = noiseless(session, [[short]])
    both = noiseless(session, [[short], [long]])
    other = noiseless(session, [[long]])
    handle.remove()
    assert any(value.any() for value in one.values())
    for key, value in both.items():
        assert torch.allclose(value, one[key] + other[key], atol=1e-7), key
