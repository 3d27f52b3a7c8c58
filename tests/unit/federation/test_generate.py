"""What `fedllm generate` writes is the answer that a run's evaluation scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedModel

from fedllm.adapters.export import load_state
from fedllm.adapters.method import write_state
from fedllm.data.records import Example
from fedllm.data.sites import simulated_site
from fedllm.federation import generate
from fedllm.models.load import load_base, load_tokenizer
from fedllm.runs.folder import load_config
from fedllm.training.forward import greedy_answers
from fedllm.training.session import open_session, tokenise
from fedllm.training.spec import basis_from_seed

TEXT, LENGTH = "A text.", 8


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_the_answer_is_the_one_that_is_scored(
    federate: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    folder = federate(
        federation__rounds=1,
        federation__sites=1,
        train__lr=0.3,
        strategy__name="average",
        adapter__method=method,
        data__task="generate",
    )
    config = load_config(folder)
    # a base that punishes repetition, and names another end than its tokenizer does
    own = GenerationConfig(repetition_penalty=1.9, num_beams=3, eos_token_id=[3])

    def stubborn(*args: Any, **kwargs: Any) -> PreTrainedModel:
        base = load_base(*args, **kwargs)
        base.generation_config = own
        return base

    monkeypatch.setattr(generate, "load_base", stubborn)
    state, _ = load_state(folder.adapter_dir)
    basis = basis_from_seed(state.spec)
    assert basis is not None
    session = open_session(config, state.spec, basis)
    monkeypatch.setattr(session.base, "generation_config", own)
    write_state(session.method, session.model, state)
    site = simulated_site(config.data, sites=1, seed=config.run.seed, index=0)
    record = Example(text=TEXT, label=site.heldout[0].label, unit="")
    (tuned,), _ = greedy_answers(
        session,
        tokenise(replace(site, heldout=(record,)), config).heldout,
        tokenizer=load_tokenizer(config.model),
        max_new_tokens=LENGTH,
        size=1,
    )
    assert generate.answer(folder.path, TEXT, max_new_tokens=LENGTH)[1] == tuned
