"""Held-out scores of a prepared model: calibration, and written answers however they are batched."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fedllm.config import Config
from fedllm.data.sites import simulated_site
from fedllm.evaluation.answers import rouge_l, token_f1
from fedllm.evaluation.calibration import brier_score
from fedllm.evaluation.metrics import Scores
from fedllm.models.load import load_tokenizer
from fedllm.runs.events import QUALITY
from fedllm.training.forward import greedy_answers, label_scores
from fedllm.training.round import evaluate
from fedllm.training.session import Session, SiteTokens, open_session, tokenise
from fedllm.training.spec import adapter_spec, basis_from_seed

SETTINGS = {
    "model.name": "tiny-llama",
    "model.dtype": "float32",
    "adapter.method": "lora",
    "adapter.rank": 4,
    "data.source": "mcc",
    "data.heldout": 0.4,
    "federation.sites": 1,
    "train.max_length": 160,
}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "sums.jsonl"
    rows = [
        {"text": f"What is {i} and {i % 7}?" * (1 + i % 3), "label": f"#### {i + i % 7}"} for i in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make(**changes: object) -> tuple[Config, Session, SiteTokens]:
    config = Config.from_flat(SETTINGS | {k.replace("__", "."): v for k, v in changes.items()})  # type: ignore[operator]
    spec = adapter_spec(config)
    basis = basis_from_seed(spec)
    assert basis is not None
    site = tokenise(simulated_site(config.data, sites=1, seed=1, index=0), config)
    return config, open_session(config, spec, basis), site


def text_settings(file: str, **changes: object) -> dict[str, object]:
    values: dict[str, object] = {
        "data__source": "file",
        "data__path": file,
        "data__task": "generate",
        "evaluation__generate": True,
        "evaluation__max_new_tokens": 6,
        "evaluation__batch_size": 3,
    }
    return values | changes


def moved(session: Session) -> None:
    """Give the adapter weights that change what is written."""
    generator = torch.Generator().manual_seed(6)
    for parameter in session.parameters.values():
        parameter.data += torch.randn(parameter.shape, generator=generator)


def test_scores_hold_every_metric_that_travels() -> None:
    assert set(QUALITY) | {"records", "calibration", "correct", "token_f1s"} == set(
        vars(Scores(records=1, loss=0.0))
    )


def test_labels_are_scored_with_their_calibration() -> None:
    config, session, site = make()
    found = evaluate(session, site, config=config, state=None, records=5)
    assert found is not None
    logs = label_scores(session, site.heldout[:5], site.label_tokens)
    columns = [site.labels.index(label) for label in site.heldout_labels[:5]]
    assert found.brier == pytest.approx(brier_score(torch.softmax(logs.double(), 1).numpy(), columns))
    assert found.ece is not None
    assert 0 <= found.ece <= 1
    assert sum(found.correct) / 5 == found.accuracy
    assert found.exact_match is None
    assert found.perplexity is None


@pytest.mark.parametrize("method", ["lora", "fed-sb", "dora"])
def test_answers_do_not_depend_on_the_batch(file: str, method: str) -> None:
    config, session, site = make(**text_settings(file, adapter__method=method))
    moved(session)
    session.model.eval()
    tokenizer = load_tokenizer(config.model)

    def answers(size: int) -> tuple[list[str], float]:
        return greedy_answers(session, site.heldout, tokenizer=tokenizer, max_new_tokens=6, size=size)

    assert len({len(record.prompt) for record in site.heldout}) > 1
    alone = answers(1)
    assert len(set(alone[0])) > 1
    assert answers(4) == alone
    assert answers(64) == alone


def test_virtual_tokens_stand_before_a_tuned_models_prompts_only(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, session, site = make(**text_settings(file, adapter__method="prompt"))
    seen: list[object] = []

    def answers(model: object, prompts: list[object], **options: object) -> list[list[int]]:
        seen.append(options["prefix"])
        return [[65, 2]] * len(prompts)

    monkeypatch.setattr("fedllm.training.forward.greedy_tokens", answers)
    state = session.method.initial_state(session.spec, seed="0")
    for adapter in (state, None):
        evaluate(session, site, config=config, state=adapter, records=3)
    assert seen == [session.prefix, None]


def test_written_answers_are_scored(file: str) -> None:
    config, session, site = make(**text_settings(file))
    found = evaluate(session, site, config=config, state=None, records=5)
    assert found is not None
    zero = session.method.initial_state(session.spec, seed="0")
    assert evaluate(session, site, config=config, state=zero, records=5) == found
    texts, unended = greedy_answers(
        session, site.heldout[:5], tokenizer=load_tokenizer(config.model), max_new_tokens=6, size=5
    )
    truth = site.heldout_labels[:5]
    assert found.records == 5
    assert found.unended == unended
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.token_f1 == pytest.approx(sum(map(token_f1, truth, texts)) / 5)
    assert found.rouge_l == pytest.approx(sum(map(rouge_l, truth, texts)) / 5)
    assert found.exact_match == sum(found.correct) / 5
    assert found.token_f1s == tuple(map(token_f1, truth, texts))
    assert found.accuracy is None


def test_the_number_alone_may_have_to_match(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(session: Session, records: object, **options: object) -> tuple[list[str], float]:
        wanted = [label.removeprefix("#### ") for label in site.heldout_labels[:4]]
        return [f"I have 1, so it is {number}." for number in wanted[:3]] + ["no idea"], 0.25

    monkeypatch.setattr("fedllm.training.scores.greedy_answers", answers)
    for extract, expected in (("none", 0.0), ("number", 0.75)):
        config, session, site = make(**text_settings(file, evaluation__extract=extract))
        found = evaluate(session, site, config=config, state=None, records=4)
        assert found is not None
        assert (found.exact_match, found.unended) == (expected, 0.25)
        assert bool(found.token_f1s) == (extract == "none")


def test_without_written_answers_only_the_loss_is_measured(file: str) -> None:
    config, session, site = make(**text_settings(file, evaluation__generate=False))
    found = evaluate(session, site, config=config, state=None, records=3)
    assert found is not None
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert (found.exact_match, found.correct) == (None, ())
