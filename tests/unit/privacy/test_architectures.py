"""Per-example gradients where a pass is not plain: under gradient checkpointing and under autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedllm.privacy.per_example import GradientSink, record_gradients

ROWS, TOKENS, WORDS = 4, 9, 50
SMALL = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def adapted() -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return a model with LoRA on every linear map, B off zero, and its trained parameters."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=2))
    model = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear"))
    parameters = {}
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in key)
        if "lora_" in key:
            parameters[key] = parameter
            with torch.no_grad():
                parameter.normal_(0, 0.1)
    return model.eval(), parameters


def losses(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    """Return each record's own loss; records are padded on the right to one length."""
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(3, WORDS, (ROWS, TOKENS), generator=source)[rows]
    lengths = torch.tensor([9, 4, 7, 5])[rows]
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    token = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return (token * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)


def one_at_a_time(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {key: [] for key in parameters}
    for row in range(ROWS):
        model.zero_grad()
        losses(model, slice(row, row + 1)).sum().backward()
        for key, parameter in parameters.items():
            assert parameter.grad is not None
            found[key].append(parameter.grad.clone())
    model.zero_grad()
    return {key: torch.stack(rows) for key, rows in found.items()}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference, in units of the largest entry."""
    assert set(found) == set(expected)
    scale = max(float(value.abs().max()) for value in expected.values())
    return max(float((found[key] - value).abs().max()) for key, value in expected.items()) / scale


def recorded(model: nn.Module, sink: GradientSink) -> dict[str, Tensor]:
    losses(model).sum().backward()
    return sink.take()


@pytest.mark.parametrize("reentrant", [False, True])
def test_right_under_both_kinds_of_gradient_checkpointing(reentrant: bool) -> None:
    model, parameters = adapted()
    expected = one_at_a_time(model, parameters)
    base: Any = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    sink = record_gradients(model, parameters)
    found = recorded(model.train(), sink)
    assert error(found, expected) < 1e-6


def test_right_to_its_own_precision_under_autocast() -> None:
    model, parameters = adapted()
    expected = one_at_a_time(model, parameters)
    sink = record_gradients(model, parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = recorded(model, sink)
    assert all(value.dtype == torch.float32 for value in found.values())
    assert error(found, expected) < 0.05
