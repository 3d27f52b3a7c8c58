"""Label scoring in one pass equals scoring every prompt and label by itself."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fedllm.evaluation.metrics import accuracy, macro_f1, majority
from fedllm.evaluation.scoring import label_log_likelihoods


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
        attn_implementation="sdpa",
    )
    return AutoModelForCausalLM.from_config(config).eval()


def naive(model: PreTrainedModel, prompt: list[int], label: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + label])).logits[0]
    logs = torch.log_softmax(logits.float(), -1)
    return float(sum(logs[len(prompt) - 1 + index, token] for index, token in enumerate(label)))


def test_equal_to_naive_scoring_with_unequal_lengths(model: PreTrainedModel) -> None:
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]
    labels = [[20, 2], [20, 21, 22, 2], [30, 31, 2], [2]]
    found = label_log_likelihoods(model, prompts, labels, pad_id=0)
    expected = torch.tensor([[naive(model, prompt, label) for label in labels] for prompt in prompts])
    assert found.shape == (3, 4)
    assert torch.allclose(found, expected, atol=1e-4)


def test_metrics_equal_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = [str(int(x)) for x in torch.randint(0, 4, (200,), generator=generator)]
    guess = [str(int(x)) for x in torch.randint(0, 5, (200,), generator=generator)]
    assert accuracy(truth, guess) == pytest.approx(accuracy_score(truth, guess))
    assert macro_f1(truth, guess) == pytest.approx(f1_score(truth, guess, average="macro"))
    assert majority(["b", "b", "a"], ["a", "b", "b", "b"]) == (0.75, pytest.approx(0.75 * 2 / 1.75 / 2))
