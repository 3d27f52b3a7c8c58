"""Greedy answers of a batch equal those of a loop over single prompts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedllm.evaluation.generation import greedy_tokens
from fedllm.models.load import load_base
from fedllm.settings import ModelSettings

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [40], [12, 13, 14], [5, 6, 7, 90, 91]]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_base(ModelSettings(name="tiny-llama", dtype="float32"))


def naive(
    model: PreTrainedModel, prompt: list[int], *, most: int, stop: set[int], prefix: Tensor | None
) -> list[int]:
    """Append the likeliest token by a whole forward pass each, without a cache."""
    found: list[int] = []
    while len(found) < most and not (found and found[-1] in stop):
        embedded = model.get_input_embeddings()(torch.tensor(prompt + found))
        if prefix is not None:
            embedded = torch.cat([prefix, embedded])
        with torch.no_grad():
            found.append(int(model(inputs_embeds=embedded[None]).logits[0, -1].argmax()))
    return found


@pytest.mark.parametrize("virtual", [0, 3])
def test_a_batch_equals_one_prompt_at_a_time(model: PreTrainedModel, virtual: int) -> None:
    width = model.config.hidden_size
    prefix = torch.randn(virtual, width, generator=torch.Generator().manual_seed(1)) if virtual else None
    alone = [naive(model, prompt, most=12, stop=set(), prefix=prefix) for prompt in PROMPTS]
    options = {"max_new_tokens": 12, "pad_id": 0, "prefix": prefix}
    assert greedy_tokens(model, PROMPTS, stop=[], **options) == alone
    # a token that occurs in the middle of some answers
    stop = {alone[0][4]}
    assert greedy_tokens(model, PROMPTS, stop=stop, **options) == [
        naive(model, prompt, most=12, stop=stop, prefix=prefix) for prompt in PROMPTS
    ]


def test_what_the_model_says_of_sampling_and_penalties_is_left_aside(model: PreTrainedModel) -> None:
    expected = greedy_tokens(model, PROMPTS, max_new_tokens=6, pad_id=0, stop=[2])
    before = model.generation_config.to_dict()
    try:
        model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=1.9)
        assert greedy_tokens(model, PROMPTS, max_new_tokens=6, pad_id=0, stop=[2]) == expected
    finally:
        model.generation_config.update(**before)
