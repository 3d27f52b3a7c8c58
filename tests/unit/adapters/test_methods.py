"""Every adapter method: exact export, zero start, spec checks; one row a method."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fedllm.adapters import METHODS
from fedllm.adapters.export import load_state, save_peft_adapter
from fedllm.adapters.method import inject, read_state, trained_parameters, write_state
from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.errors import MismatchError, RunError

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
# trained numbers by hand: q 32x32, k and v 16x32, o 32x32, gate and up 48x32, down 32x48, two layers
TRAINED = {"lora": 2 * 4 * (64 + 48 + 48 + 64 + 80 + 80 + 80), "ffa": 2 * 4 * 224, "fed-sb": 14 * 16}


def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()


def make_spec(method: str, scale: float = 2.0) -> AdapterSpec:
    shapes = {
        path: (module.out_features, module.in_features)
        for path, module in tiny().named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    }
    has_basis = METHODS[method].has_basis
    return AdapterSpec(
        method=method,
        rank=4,
        scale=scale,
        shapes=shapes,
        basis="seeded:0011223344556677" if has_basis else "none",
        base="tiny",
    )


def random_state(state: AdapterState, seed: int = 0) -> AdapterState:
    rng = np.random.default_rng(seed)
    return state.with_tensors(
        {k: (0.3 * rng.standard_normal(v.shape)).astype(np.float32) for k, v in state.tensors.items()}
    )


@pytest.mark.parametrize("name", METHODS)
def test_start_is_the_base_and_round_trip_is_exact(name: str) -> None:
    method, spec = METHODS[name], make_spec(name)
    basis = method.seeded(spec, "0011223344556677")
    model = inject(method, tiny(), spec, basis)
    start = method.initial_state(spec, seed="0011223344556677")
    ids = torch.randint(0, 300, (2, 9))
    write_state(method, model, start)
    assert torch.equal(model(ids).logits, tiny()(ids).logits)
    state = random_state(start)
    write_state(method, model, state)
    back = read_state(method, model, spec)
    assert list(back.tensors) == list(state.tensors)
    assert all(np.array_equal(back.tensors[key], state.tensors[key]) for key in state.tensors)


@pytest.mark.parametrize("name", METHODS)
def test_only_the_named_matrices_train(name: str) -> None:
    method, spec = METHODS[name], make_spec(name)
    model = inject(method, tiny(), spec, method.seeded(spec, "0011223344556677"))
    parameters = trained_parameters(method, model)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters.values()}
    assert {k: tuple(p.shape) for k, p in parameters.items()} == method.trained_shapes(spec)
    assert sum(p.numel() for p in parameters.values()) == TRAINED[name]


@pytest.mark.parametrize("name", METHODS)
def test_export_loads_in_plain_peft_with_equal_logits(name: str, tmp_path: Path) -> None:
    method, spec = METHODS[name], make_spec(name, scale=1.5)
    basis = method.seeded(spec, "0011223344556677")
    model = inject(method, tiny(), spec, basis)
    state = random_state(method.initial_state(spec, seed="0011223344556677"))
    write_state(method, model, state)
    save_peft_adapter(state, basis, tmp_path, base_model="tiny", seed="0011223344556677")
    loaded = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    ids = torch.randint(0, 300, (3, 8))
    with torch.no_grad():
        ours, theirs, base = model(ids).logits, loaded(ids).logits, tiny()(ids).logits
        merged = model.merge_and_unload()(ids).logits
    assert torch.allclose(ours, theirs, atol=2e-6)
    assert torch.allclose(ours, merged, atol=1e-5)
    assert (ours - base).abs().max() > 0.05
    again, seed = load_state(tmp_path)
    assert again.spec == spec
    assert seed == "0011223344556677"
    assert all(np.array_equal(again.tensors[key], state.tensors[key]) for key in state.tensors)


def test_a_state_of_another_layout_is_refused_by_name() -> None:
    method, spec = METHODS["fed-sb"], make_spec("fed-sb")
    model = inject(method, tiny(), spec, method.seeded(spec, "00"))
    state = method.initial_state(spec, seed="00")
    tensors = dict(state.tensors)
    first = next(iter(tensors))
    tensors.pop(first)
    with pytest.raises(MismatchError, match=r"matrix 'model.layers.0.self_attn.q_proj.R' is missing"):
        write_state(method, model, state.with_tensors(tensors))


def test_a_spec_for_another_model_is_refused() -> None:
    method, spec = METHODS["lora"], make_spec("lora")
    shapes = dict(spec.shapes) | {"model.layers.1.mlp.down_proj": (32, 64)}
    other = AdapterSpec(**{**vars(spec), "shapes": shapes})
    with pytest.raises(MismatchError, match=r"down_proj' has shape \(32, 48\), expected \(32, 64\)"):
        inject(method, tiny(), other, method.seeded(other, "00"))


def test_load_state_names_what_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no fedllm_state.safetensors"):
        load_state(tmp_path)
    (tmp_path / "fedllm_state.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not json......")
    with pytest.raises(RunError, match="damaged"):
        load_state(tmp_path)
