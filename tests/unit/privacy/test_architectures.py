"""Per-example gradients in real architectures, against one record at a time and against Opacus."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from opacus.grad_sample import GradSampleHooks
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedllm.privacy.per_example import GradientSink, record_gradients

ROWS, TOKENS, WORDS = 4, 9, 50
SMALL = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=2))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    )


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**SMALL, intermediate_size=32, num_labels=3))


def roberta() -> PreTrainedModel:
    return RobertaForSequenceClassification(
        RobertaConfig(**SMALL, intermediate_size=32, num_labels=3, max_position_embeddings=40)
    )


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "roberta": roberta}


def adapted(name: str) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return a model with LoRA on every linear map, B off zero, and its trained parameters."""
    torch.manual_seed(0)
    base = MODELS[name]()
    model = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear"))
    parameters = {}
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in key)
        if "lora_" in key:
            parameters[key] = parameter
            with torch.no_grad():
                parameter.normal_(0, 0.3)
    return model.eval(), parameters


def losses(model: nn.Module, name: str, rows: slice = slice(None)) -> Tensor:
    """Return each record's own loss; records are padded on the right to one length."""
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(3, WORDS, (ROWS, TOKENS), generator=source)[rows]
    lengths = torch.tensor([9, 4, 7, 5])[rows]
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    if name in ("bert", "roberta"):
        return nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])[rows], reduction="none")
    token = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return (token * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)


def one_at_a_time(model: nn.Module, name: str, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {key: [] for key in parameters}
    for row in range(ROWS):
        model.zero_grad()
        losses(model, name, slice(row, row + 1)).sum().backward()
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


def recorded(model: nn.Module, name: str, sink: GradientSink) -> dict[str, Tensor]:
    losses(model, name).sum().backward()
    return sink.take()


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_one_record_at_a_time_and_to_opacus(name: str) -> None:
    model, parameters = adapted(name)
    expected = one_at_a_time(model, name, parameters)
    hooks = GradSampleHooks(model.train(), loss_reduction="sum", strict=False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    losses(model, name).sum().backward()
    peer = {key: vars(parameter)["grad_sample"].clone() for key, parameter in parameters.items()}
    hooks.cleanup()
    model.zero_grad()
    found = recorded(model.eval(), name, record_gradients(model, parameters))
    assert error(found, expected) < 2e-6
    assert error(found, peer) < 2e-6
    assert all(parameter.grad is None for parameter in parameters.values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_right_under_both_kinds_of_gradient_checkpointing(reentrant: bool) -> None:
    model, parameters = adapted("llama")
    expected = one_at_a_time(model, "llama", parameters)
    base: Any = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    sink = record_gradients(model, parameters)
    found = recorded(model.train(), "llama", sink)
    assert error(found, expected) < 2e-6


def test_right_to_its_own_precision_under_autocast() -> None:
    model, parameters = adapted("llama")
    expected = one_at_a_time(model, "llama", parameters)
    sink = record_gradients(model, parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = recorded(model, "llama", sink)
    assert all(value.dtype == torch.float32 for value in found.values())
    assert error(found, expected) < 0.05
