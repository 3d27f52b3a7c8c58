import json
from dataclasses import replace

import pytest
import torch
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, PretrainedConfig, T5Config

from fedllm.errors import ConfigError, ModelError
from fedllm.models.fingerprint import architecture_fingerprint, weights_fingerprint
from fedllm.models.load import load_base, load_config
from fedllm.models.registry import EMBEDDED
from fedllm.models.shapes import count_parameters, linear_shapes
from fedllm.settings import ModelSettings

LLAMA_3B = LlamaConfig(
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    tie_word_embeddings=True,
)
MISTRAL_7B = MistralConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=32000,
)
GEMMA2_9B = Gemma2Config(
    hidden_size=3584,
    intermediate_size=14336,
    num_hidden_layers=42,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=256,
    vocab_size=256000,
)


@pytest.mark.parametrize(
    ("config", "modules", "ports", "parameters"),
    [
        (LLAMA_3B, 196, 1_519_616, 3_212_749_824),
        (MISTRAL_7B, 224, 2_621_440, 7_241_732_096),
        (GEMMA2_9B, 294, 3_376_128, 9_241_705_984),
    ],
)
def test_published_models(config, modules, ports, parameters):
    shapes = linear_shapes(config, targets="all-linear", layers="")
    assert len(shapes) == modules
    assert sum(out + width for out, width in shapes.values()) == ports
    assert not any("lm_head" in path for path in shapes)
    assert count_parameters(config) == parameters


def test_shapes_are_those_of_the_loaded_model(tiny):
    config, base = load_config(tiny), load_base(tiny)
    shapes = linear_shapes(config, targets="all-linear", layers="")
    modules = dict(base.named_modules())
    assert shapes == {path: tuple(modules[path].weight.shape) for path in shapes}
    assert list(shapes) == [path for path in modules if path in shapes]
    assert len(shapes) == 14
    assert count_parameters(config) == sum(p.numel() for p in base.parameters())
    assert count_parameters(config) == EMBEDDED["tiny-llama"].parameters


def test_targets_and_layers(tiny):
    config = load_config(tiny)
    assert linear_shapes(config, targets="q_proj, v_proj", layers="1") == {
        "model.layers.1.self_attn.q_proj": (32, 32),
        "model.layers.1.self_attn.v_proj": (16, 32),
    }
    assert list(linear_shapes(config, targets="self_attn.o_proj", layers="0-1")) == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
    ]
    some = linear_shapes(LLAMA_3B, targets="all-linear", layers="0,3-5,27")
    assert {int(path.split(".")[2]) for path in some} == {0, 3, 4, 5, 27}


@pytest.mark.parametrize(
    ("targets", "layers", "message"),
    [
        ("q_prj", "", r"'q_prj'.*q_proj, k_proj.*Did you mean 'q_proj'"),
        ("all_linear", "", r"Did you mean 'all-linear'"),
        ("lm_head", "", r"no linear layer 'lm_head'"),
        ("proj", "", r"no linear layer 'proj'"),
        (" , ", "", r"adapter\.targets: empty"),
        ("all-linear", "0-2", r"adapter\.layers: the model has layers 0-1"),
        ("all-linear", "2", r"adapter\.layers: the model has layers 0-1"),
        ("all-linear", "1-0", "backwards"),
        ("all-linear", "first", "neither a layer nor a range"),
        ("all-linear", "0,,1", "neither a layer nor a range"),
        ("all-linear", "-1", "neither a layer nor a range"),
    ],
)
def test_bad_targets_and_layers(tiny, targets, layers, message):
    with pytest.raises(ConfigError, match=message):
        linear_shapes(load_config(tiny), targets=targets, layers=layers)


def test_models_without_linear_layers_or_without_causal_form():
    with pytest.raises(ConfigError, match="gpt2 has no linear layers"):
        linear_shapes(GPT2Config(n_layer=1), targets="all-linear", layers="")
    with pytest.raises(ModelError, match="t5 is not a causal language model"):
        linear_shapes(T5Config(), targets="all-linear", layers="")


def fingerprint(config: PretrainedConfig, targets: str = "all-linear") -> str:
    return architecture_fingerprint(config, linear_shapes(config, targets=targets, layers=""))


def test_architecture_fingerprint_sees_sizes_only(tiny):
    config = load_config(tiny)
    ours = fingerprint(config)
    assert len(ours) == 16
    same = load_config(tiny)
    same.transformers_version, same.dtype, same.name_or_path = "1.0", torch.bfloat16, "elsewhere"
    assert fingerprint(same) == ours
    assert fingerprint(load_base(replace(tiny, dtype="bfloat16")).config) == ours
    assert fingerprint(config, "q_proj") != ours
    wider = load_config(tiny)
    wider.vocab_size = 300
    assert fingerprint(wider) != ours
    assert fingerprint(LLAMA_3B) != fingerprint(MISTRAL_7B)


def test_weights_fingerprint(tiny):
    base, again = load_base(tiny), load_base(tiny)
    ours = weights_fingerprint(base)
    assert len(ours) == 16
    assert weights_fingerprint(again) == ours
    changed = again.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        changed.mul_(1.001)
    assert weights_fingerprint(again) != ours
    same = base.model.layers[1].mlp.up_proj.weight
    assert weights_fingerprint(again, exclude=[changed]) == weights_fingerprint(base, exclude=[same]) != ours
    codes = {
        kind: weights_fingerprint(load_base(replace(tiny, quantization=kind))) for kind in ("4bit", "8bit")
    }
    assert len({ours, *codes.values()}) == 3


def test_weights_fingerprint_is_exact_for_a_widened_bfloat16_base(tiny):
    base = load_base(replace(tiny, dtype="bfloat16"))
    ours = weights_fingerprint(base)
    assert weights_fingerprint(base.float()) == ours


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_attention_heads": 0},
        {"hidden_act": "no such function"},
        {"hidden_act": None},
        {"num_hidden_layers": "two"},
        {"hidden_size": -4},
    ],
)
def test_a_config_that_describes_no_model(wrong, tmp_path):
    values = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(values | wrong))
    with pytest.raises(ModelError, match=r"config\.json"):
        count_parameters(load_config(ModelSettings(path=str(tmp_path))))
