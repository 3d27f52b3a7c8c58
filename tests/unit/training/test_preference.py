"""Preferences: the loss, its reference, and gradients that belong to a pair and not to its rows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedllm.adapters import METHODS
from fedllm.adapters.layers import fold, unadapted
from fedllm.adapters.method import write_state
from fedllm.adapters.state import AdapterState
from fedllm.config import Config
from fedllm.data.encode import Encoded
from fedllm.data.sites import simulated_site
from fedllm.models.load import load_base
from fedllm.privacy.clipping import pair_sums
from fedllm.privacy.entropy import SecureGenerator
from fedllm.privacy.plan import PrivacyPlan
from fedllm.training.basis import weight_gradients
from fedllm.training.preference import dpo_losses, margins
from fedllm.training.round import evaluate, train_round
from fedllm.training.session import Session, SiteTokens, open_session, tokenise
from fedllm.training.spec import adapter_spec, basis_from_seed
from fedllm.training.steps import micro_batches, plain_gradients, private_gradients, record_gradients

BETA = 0.3
PRIVATE = [name for name, method in METHODS.items() if method.private]
QUIET = {"privacy.enabled": True, "privacy.noise_multiplier": 0.5}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write pairs of unequal lengths: short answers in capitals are preferred."""
    made = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {
            "prompt": f"question {row} " + "why " * (row % 5),
            "chosen": "YES " * (1 + row % 3) + str(row),
            "rejected": "no, not at all " * (1 + row % 2) + str(row),
        }
        for row in range(60)
    ]
    made.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def make(path: Path, **settings: Any) -> tuple[Config, Session, SiteTokens, AdapterState]:
    values = {
        "model.name": "tiny-llama",
        "model.dtype": "float32",
        "adapter.rank": 3,
        "adapter.heads": 2,
        "data.source": "file",
        "data.path": str(path),
        "data.text": "prompt",
        "data.label": "chosen",
        "data.rejected": "rejected",
        "data.task": "generate",
        "data.heldout": 0.3,
        "train.objective": "dpo",
        "train.dpo_beta": BETA,
        "train.batch_size": 4,
        "train.local_steps": 3,
        "train.micro_batch": 4,
        "train.max_length": 160,
        "federation.sites": 1,
        "federation.rounds": 2,
    }
    config = Config.from_flat(values | {key.replace("__", "."): value for key, value in settings.items()})
    spec = adapter_spec(config)
    basis = basis_from_seed(spec)
    assert basis is not None
    session = open_session(config, spec, basis)
    fold(session.model, {})
    data = simulated_site(config.data, sites=1, seed=config.run.seed, index=0)
    return config, session, tokenise(data, config), session.method.initial_state(spec, seed="00")


def shaken(state: AdapterState) -> AdapterState:
    """Return a state far from the base."""
    draw = np.random.default_rng(3)
    return state.with_tensors(
        {
            key: (value + 0.2 * draw.standard_normal(value.shape)).astype(np.float32)
            for key, value in state.tensors.items()
        }
    )


def by_hand(model: nn.Module, record: Encoded, answer: Sequence[int]) -> Tensor:
    """Return log p(answer | prompt) from the whole model's logits of one unpadded row."""
    ids = torch.tensor([[*record.prompt, *answer]])
    logits = model(input_ids=ids).logits[0].double().log_softmax(-1)
    start = len(record.prompt)
    return torch.stack([logits[start - 1 + i, token] for i, token in enumerate(answer)]).sum()


def loss_by_hand(model: nn.Module, base: PreTrainedModel, record: Encoded) -> Tensor:
    """Return one pair's loss with a second model as the reference, as the paper writes it."""
    with torch.no_grad():
        held = [by_hand(base, record, answer) for answer in (record.answer, record.rejected)]
    chosen, rejected = (by_hand(model, record, answer) for answer in (record.answer, record.rejected))
    return -torch.log(torch.sigmoid(BETA * ((chosen - held[0]) - (rejected - held[1]))))


def gradients_by_hand(
    path: Path, method: str, records: int, *, state: AdapterState | None = None
) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Return losses and gradients of the first pairs, one pair at a time, by plain autograd."""
    config, session, site, start = make(path, adapter__method=method)
    write_state(session.method, session.model, shaken(start))
    reference = load_base(config.model)
    losses, found = [], []
    for record in site.train[:records]:
        loss = loss_by_hand(session.model, reference, record)
        loss.backward()
        losses.append(float(loss))
        found.append({key: value.grad.float().clone() for key, value in session.parameters.items()})
        for parameter in session.parameters.values():
            parameter.grad = None
    return losses, found


def all_of(units: int, **changes: Any) -> PrivacyPlan:
    """Return a plan that takes every unit."""
    values = {
        "noise_multiplier": 0.0,
        "clipping_norm": 0.1,
        "units": units,
        "sample_rate": 1.0,
        "expected_batch": 4.0,
        "local_steps": 3,
        "rounds": 2,
        "delta": 1e-5,
        "relation": "add-or-remove-one",
    }
    return PrivacyPlan(**(values | changes))


def released(session: Session, units: Sequence[Sequence[Encoded]], **changes: Any) -> dict[str, Tensor]:
    """Return the sum that a private step without noise releases of some units."""
    plan = all_of(len(units), **changes)
    private_gradients(
        session, session.parameters, units, plan=plan, generator=SecureGenerator(), micro_batch=3
    )
    found = {key: value.grad.clone() * 4.0 for key, value in session.parameters.items()}
    for parameter in session.parameters.values():
        parameter.grad = None
    return found


def norm(gradients: dict[str, Tensor]) -> float:
    return float(sum(value.square().sum() for value in gradients.values()) ** 0.5)


def clipped(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    factor = min(1.0, 0.1 / norm(gradients))
    return {key: value * factor for key, value in gradients.items()}


def total(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([part[key] for part in parts]).sum(0) for key in parts[0]}


def require_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare gradients, in units of the largest entry."""
    assert set(found) == set(expected)
    scale = max(float(value.abs().max()) for value in expected.values())
    for key, value in expected.items():
        assert float((found[key] - value).abs().max()) < 2e-5 * scale, key


@given(margin=st.floats(-3000, 3000), beta=st.floats(0.01, 5))
def test_the_loss_is_the_papers_and_stays_finite(margin: float, beta: float) -> None:
    held = torch.tensor(margin, dtype=torch.float64, requires_grad=True)
    loss = dpo_losses(held, beta=beta)
    loss.backward()
    # -log sigmoid(z) = log(1 + exp(-z)), and its derivative is -sigmoid(-z)
    assert float(loss) == pytest.approx(np.logaddexp(0, -beta * margin), abs=1e-12)
    assert float(held.grad) == pytest.approx(-beta * np.exp(-np.logaddexp(0, beta * margin)), abs=1e-12)


def test_rows_are_added_pair_by_pair() -> None:
    rows = torch.arange(24.0).view(6, 2, 2)
    found = pair_sums({"a": rows})["a"]
    assert torch.equal(found, torch.stack([rows[b] + rows[b + 3] for b in range(3)]))


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_is_the_base_bit_for_bit(method: str, path: Path) -> None:
    config, session, site, state = make(path, adapter__method=method)
    write_state(session.method, session.model, shaken(state))
    if method in ("lora", "ffa", "fed-sb", "ravan"):
        draw = np.random.default_rng(0)
        shapes = session.spec.shapes.items()
        fold(
            session.model,
            {
                module: tuple(draw.standard_normal(s).astype(np.float32) for s in ((out, 2), (2, into)))
                for module, (out, into) in shapes
            },  # type: ignore[misc]
        )
    session.trainable(session.method.matrices(session.spec)[:1])
    ids = torch.tensor([site.train[0].prompt])
    before = session.base(input_ids=ids).logits
    flags = {name: value.requires_grad for name, value in session.model.named_parameters()}
    expected = load_base(config.model).eval()(input_ids=ids).logits
    with unadapted(session.model):
        assert torch.equal(session.base(input_ids=ids).logits, expected)
    assert torch.equal(session.base(input_ids=ids).logits, before)
    assert torch.equal(before, expected) == (method == "prompt")
    assert {name: value.requires_grad for name, value in session.model.named_parameters()} == flags
    with pytest.raises(ZeroDivisionError), unadapted(session.model):
        raise ZeroDivisionError
    assert torch.equal(session.base(input_ids=ids).logits, before)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_quantised_base_is_its_own_reference(kind: str, path: Path) -> None:
    _, session, site, state = make(path, adapter__method="lora", model__quantization=kind)
    records = site.train[:3]
    # as a round without dropout has it; bitsandbytes multiplies 8-bit weights in another way in training mode
    session.model.eval()
    write_state(session.method, session.model, state)
    for training in (False, True):
        session.model.train(training)
        assert torch.equal(margins(session, records), torch.zeros(3))
        assert {module.training for module in session.model.modules()} == {training}
    write_state(session.method, session.model, shaken(state))
    found = margins(session, records)
    assert float(found.detach().abs().min()) > 1e-3
    found.sum().backward()
    for parameter in session.parameters.values():
        assert float(parameter.grad.abs().max()) > 0
        parameter.grad = None


def test_dropout_leaves_the_reference_alone(path: Path) -> None:
    _, session, site, state = make(path, adapter__method="lora", adapter__dropout=0.5)
    write_state(session.method, session.model, state)
    session.model.train()
    # B is zero: whatever the dropout does, the model is its own reference
    assert torch.equal(margins(session, site.train[:4]), torch.zeros(4))
    assert session.model.training


@pytest.mark.parametrize("method", [name for name in METHODS if name != "prompt"])
def test_losses_and_gradients_are_those_of_one_pair_at_a_time(method: str, path: Path) -> None:
    losses, singles = gradients_by_hand(path, method, 5)
    _, session, site, _ = make(path, adapter__method=method)
    for size in (1, 2, 5):
        found = plain_gradients(session, site.train[:5], micro_batch=size)
        assert found == pytest.approx(sum(losses) / 5, rel=1e-5)
        mean = {key: value / 5 for key, value in total(singles).items()}
        require_close({key: value.grad.clone() for key, value in session.parameters.items()}, mean)
        for parameter in session.parameters.values():
            parameter.grad = None


def test_virtual_tokens_stand_before_the_model_and_not_before_its_reference(path: Path) -> None:
    config, session, site, state = make(path, adapter__method="prompt")
    write_state(session.method, session.model, shaken(state))
    reference, record = load_base(config.model), site.train[3]
    prefix = session.parameters["prompt.P"].detach()
    sums = []
    for answer in (record.answer, record.rejected):
        ids = torch.tensor([[*record.prompt, *answer]])
        embedded = torch.cat([prefix[None], reference.get_input_embeddings()(ids)], dim=1)
        with torch.no_grad():
            logits = reference(inputs_embeds=embedded).logits[0].log_softmax(-1)
            held = by_hand(reference, record, answer)
        start = len(prefix) + len(record.prompt) - 1
        sums.append(float(sum(logits[start + i, token] for i, token in enumerate(answer))) - float(held))
    found = margins(session, site.train[:5])
    assert float(found[3]) == pytest.approx(sums[0] - sums[1], abs=1e-4)
    assert abs(float(found[3])) > 1e-2


@pytest.mark.parametrize("engine", ["own", "opacus"])
@pytest.mark.parametrize("method", PRIVATE)
def test_private_gradients_are_those_of_one_pair_at_a_time(method: str, engine: str, path: Path) -> None:
    _, singles = gradients_by_hand(path, method, 5)
    _, session, site, state = make(path, adapter__method=method, privacy__engine=engine, **QUIET)
    write_state(session.method, session.model, shaken(state))
    records = site.train[:5]
    together = record_gradients(session, session.parameters, records)
    for row, single in enumerate(singles):
        require_close({key: value[row] for key, value in together.items()}, single)
    # what is clipped is the pair
    units = [[record] for record in records]
    require_close(released(session, units), total([clipped(single) for single in singles]))
    # a unit of several pairs contributes their mean
    owned = released(session, [units[0] + units[1], units[2]])
    mean = {key: value / 2 for key, value in total(singles[:2]).items()}
    require_close(owned, total([clipped(mean), clipped(singles[2])]))


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("method", ["lora", "fed-sb"])
def test_a_pair_moves_the_release_by_at_most_the_clipping_norm(
    method: str, discrete: bool, path: Path
) -> None:
    _, session, site, state = make(path, adapter__method=method, **QUIET)
    write_state(session.method, session.model, shaken(state))
    ordered = next(iter(micro_batches(site.train, 100)))
    base = ordered[:4]
    twin = replace(base[0], answer=base[0].rejected, rejected=base[0].answer)
    noise = {"discrete": True, "noise_multiplier": 1e-4} if discrete else {}
    for extra in (ordered[-1], base[0], twin):
        more = released(session, [[record] for record in [*base, extra]], **noise)
        less = released(session, [[record] for record in base], **noise)
        moved = norm({key: more[key] - less[key] for key in more})
        # all of C is used: the gradient of a row alone would be clipped to another length
        assert 0.099 < moved <= 0.1 * (1 + (1e-2 if discrete else 1e-4))


def test_rows_clipped_apart_would_be_something_else(path: Path) -> None:
    # what this guards against: a row's gradient is no record's, and two of them may add up to 2 C
    _, session, site, state = make(path, adapter__method="lora", **QUIET)
    write_state(session.method, session.model, shaken(state))
    record = site.train[0]
    assert session.recorder is not None
    dpo_losses(margins(session, [record]), beta=BETA).sum().backward()
    apart = session.recorder.take()
    rows = [{key: value[row] for key, value in apart.items()} for row in (0, 1)]
    wrong = total([clipped(row) for row in rows])
    right = released(session, [[record]])
    assert norm(right) == pytest.approx(0.1, rel=1e-4)
    assert norm({key: wrong[key] - right[key] for key in right}) > 0.01


def test_equal_answers_teach_nothing(path: Path) -> None:
    _, session, site, state = make(path, adapter__method="fed-sb", **QUIET)
    write_state(session.method, session.model, shaken(state))
    tied = replace(site.train[0], rejected=site.train[0].answer)
    found = record_gradients(session, session.parameters, [tied])
    assert norm(found) < 1e-6


def test_an_empty_batch_is_noise_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, session, _, _ = make(path, **QUIET)
    monkeypatch.setattr("fedllm.training.steps.record_losses", lambda *a: pytest.fail("a forward pass"))
    found = released(session, [], noise_multiplier=0.5)
    values = torch.cat([value.flatten() for value in found.values()])
    assert values.std() == pytest.approx(0.5 * 0.1, rel=0.3)


@pytest.mark.parametrize("method", METHODS)
def test_training_prefers_what_is_preferred_and_repeats_itself(method: str, path: Path) -> None:
    config, session, site, state = make(path, adapter__method=method, train__local_steps=8, train__lr=0.03)
    base = evaluate(session, site, config=config, state=None, records=0)
    assert base is not None
    assert base.loss == pytest.approx(math.log(2))
    assert (base.accuracy, base.macro_f1) == (0.5, None)
    settings: dict[str, Any] = {"train": session.method.matrices(session.spec), "round": 1, "plan": None}
    one = train_round(session, site, config=config, state=state, **settings)
    two = train_round(session, site, config=config, state=state, **settings)
    for key, value in one.state.tensors.items():
        assert np.array_equal(value, two.state.tensors[key])
    after = evaluate(session, site, config=config, state=one.state, records=0)
    assert after is not None
    assert after.accuracy is not None
    assert after.loss < base.loss
    assert after.accuracy > 0.9
    assert after.macro_f1 is None


def test_a_private_round_with_dpo_moves_the_adapter_alone(path: Path) -> None:
    config, session, site, state = make(path, adapter__method="fed-sb", **QUIET)
    plan = all_of(len(site.train), noise_multiplier=0.5, sample_rate=0.1)
    found = train_round(session, site, config=config, state=state, round=1, plan=plan, train=("R",))
    assert found.loss is None
    assert all(np.abs(value).max() > 0 for value in found.state.tensors.values())


def test_a_gradient_basis_comes_from_the_pairs_own_loss(path: Path) -> None:
    config, _, site, _ = make(path, adapter__method="fed-sb")
    spec = adapter_spec(config)
    found = weight_gradients(config, spec, [[record] for record in site.train[:2]], plan=None)
    base = load_base(config.model)
    module = next(iter(spec.shapes))
    weight = base.get_submodule(module).get_parameter("weight").requires_grad_(True)
    for record in site.train[:2]:
        # at the base the derivative of -log sigmoid(beta m) by m is -beta / 2
        (by_hand(base, record, record.answer) - by_hand(base, record, record.rejected)).backward()
    assert weight.grad is not None
    expected = -BETA / 2 * weight.grad.numpy() / 2
    assert np.abs(found[module] - expected).max() < 1e-5 * np.abs(expected).max()


def test_what_fails_for_every_record_of_a_private_basis_fails_with_none_drawn(path: Path) -> None:
    config, _, _, _ = make(path, adapter__method="fed-sb")
    spec = adapter_spec(config)
    found = weight_gradients(config, spec, [], plan=all_of(40, noise_multiplier=1.0, discrete=True))
    assert {module: value.shape for module, value in found.items()} == dict(spec.shapes)
    coarse = all_of(40, noise_multiplier=1e6, discrete=True)
    with pytest.raises(ValueError, match="grid is too coarse"):
        weight_gradients(config, spec, [], plan=coarse)
