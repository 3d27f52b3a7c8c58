"""Every adapter method: exact export, zero start, spec checks; one row a method."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from safetensors.numpy import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
)

from fedllm.adapters import METHODS
from fedllm.adapters.export import load_state, save_peft_adapter, save_state, save_with_base
from fedllm.adapters.layers import drop_empty_biases, fold
from fedllm.adapters.method import read_state, trained_parameters, write_state
from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.adapters.vectors import prefix_of
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
SUMS, OUTS = 64 + 48 + 48 + 64 + 80 + 80 + 80, 224
TRAINED = {
    "lora": 2 * 4 * SUMS,
    "ffa": 2 * 4 * OUTS,
    "fed-sb": 14 * 16,
    "ravan": 14 * 3 * 16,
    "hydra": 2 * 4 * (SUMS + 2 * OUTS),
    "dora": 2 * (4 * SUMS + OUTS),
    # IA3 scales down_proj at its input
    "ia3": 2 * (OUTS - 32 + 48),
    "prompt": 4 * 32,
}
SEED = "0011223344556677"


def tiny(*, bias: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, attention_bias=bias)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


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
        shapes=shapes if method != "prompt" else {},
        basis=f"seeded:{SEED}" if has_basis else "none",
        base="tiny",
        heads=3 if method == "ravan" else 1,
        width=32 if method == "prompt" else 0,
    )


def inject(name: str, spec: AdapterSpec, base: PreTrainedModel | None = None) -> nn.Module:
    basis = METHODS[name].seeded(spec, SEED)
    return METHODS[name].inject(base or tiny(), spec, basis, dropout=0.0)


def forward(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    prefix = prefix_of(model)
    if prefix is None:
        return model(input_ids=ids).logits
    base = model.get_submodule("base")
    before = prefix.expand(len(ids), -1, -1)
    embedded = torch.cat([before, base.get_input_embeddings()(ids)], dim=1)
    return base(inputs_embeds=embedded).logits


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return forward(model, ids)


def random_state(state: AdapterState, seed: int = 0) -> AdapterState:
    rng = np.random.default_rng(seed)
    return state.with_tensors(
        {k: (v + 0.3 * rng.standard_normal(v.shape)).astype(np.float32) for k, v in state.tensors.items()}
    )


@pytest.mark.parametrize("name", METHODS)
def test_start_is_the_base_and_round_trip_is_exact(name: str) -> None:
    method, spec = METHODS[name], make_spec(name)
    model = inject(name, spec)
    start = method.initial_state(spec, seed=SEED)
    ids = torch.randint(0, 300, (2, 9))
    write_state(method, model, start)
    if name != "prompt":
        # DoRA divides by a norm it has computed, so its start is the base up to rounding
        assert torch.allclose(logits(model, ids), tiny()(ids).logits, atol=2e-6 if name == "dora" else 0)
    state = random_state(start)
    write_state(method, model, state)
    back = read_state(method, model, spec)
    assert list(back.tensors) == list(state.tensors)
    for key in state.tensors:
        assert np.allclose(back.tensors[key], state.tensors[key], atol=1e-6 if key.endswith(".M") else 0)


@pytest.mark.parametrize("name", METHODS)
def test_methods_say_whether_zeros_are_the_base(name: str) -> None:
    method, spec = METHODS[name], make_spec(name)
    model, ids = inject(name, spec), torch.randint(0, 300, (2, 9))
    write_state(method, model, method.initial_state(spec, seed=SEED).zeros())
    ours, base = logits(model, ids)[:, -9:], tiny()(ids).logits
    assert torch.allclose(ours, base, atol=2e-6) == method.zero_is_base


@pytest.mark.parametrize("name", METHODS)
def test_only_the_named_matrices_train(name: str) -> None:
    method, spec = METHODS[name], make_spec(name)
    model = inject(name, spec)
    parameters = trained_parameters(method, model, spec)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters.values()}
    assert {k: tuple(p.shape) for k, p in parameters.items()} == method.trained_shapes(spec)
    assert sum(p.numel() for p in parameters.values()) == TRAINED[name]
    assert {key.rpartition(".")[2] for key in parameters} == set(method.matrices(spec))


@pytest.mark.parametrize("name", METHODS)
def test_export_loads_in_plain_peft_with_equal_logits(name: str, tmp_path: Path) -> None:
    method, spec = METHODS[name], make_spec(name, scale=1.5)
    base = tiny(bias=True)
    model = inject(name, spec, tiny(bias=True))
    state = random_state(method.initial_state(spec, seed=SEED))
    write_state(method, model, state)
    if method.export == "base":
        with pytest.raises(MismatchError):
            save_peft_adapter(state, method.seeded(spec, SEED), tmp_path, base_model="tiny")
        save_with_base(state, base, tmp_path, base_model="tiny")
    else:
        save_peft_adapter(state, method.seeded(spec, SEED), tmp_path, base_model="tiny")
    loaded = PeftModel.from_pretrained(tiny(bias=True), tmp_path).eval()
    ids = torch.randint(0, 300, (3, 8))
    with torch.no_grad():
        ours, theirs = logits(model, ids), loaded(input_ids=ids).logits
        untuned = base(ids).logits
    assert torch.allclose(ours[:, -8:], theirs[:, -8:], atol=1e-5)
    assert (ours[:, -8:] - untuned).abs().max() > 0.005
    if method.export in ("lora", "base"):
        # the attention of this model has biases, and its feed-forward maps have none
        drop_empty_biases(loaded)
        with torch.no_grad():
            merged = loaded.merge_and_unload()(ids).logits
        assert torch.allclose(ours, merged, atol=2e-5)
    save_state(state, tmp_path, seed=SEED)
    again, seed = load_state(tmp_path)
    assert again.spec == spec
    assert seed == SEED
    assert all(np.array_equal(again.tensors[key], state.tensors[key]) for key in state.tensors)


def test_doras_magnitudes_start_from_the_exact_norms_of_a_bfloat16_base(tmp_path: Path) -> None:
    method, spec = METHODS["dora"], make_spec("dora")
    model = inject("dora", spec, tiny().bfloat16())
    start = method.initial_state(spec, seed=SEED)
    write_state(method, model, start)
    save_with_base(start, tiny().bfloat16(), tmp_path, base_model="tiny")
    exported = load_file(tmp_path / "adapter_model.safetensors")
    norms = {key: value for key, value in exported.items() if key.endswith("lora_magnitude_vector")}
    assert len(norms) == len(spec.shapes)
    for key, norm in norms.items():
        module = key.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        trained = method.parameters(model)[f"{module}.M"]
        assert trained.dtype == torch.float32
        assert np.array_equal(trained.detach().numpy(), norm)
        frozen = tiny().bfloat16().get_submodule(module).get_parameter("weight").detach()
        assert np.allclose(norm, frozen.float().norm(dim=1).numpy())


def test_hydra_merges_into_weight_and_bias_as_its_paper_says() -> None:
    spec = make_spec("hydra", scale=1.5)
    base, model = tiny(bias=True), inject("hydra", spec, tiny(bias=True))
    state = random_state(METHODS["hydra"].initial_state(spec, seed=SEED))
    write_state(METHODS["hydra"], model, state)
    with torch.no_grad():
        for module in spec.shapes:
            a, b, a_s, b_s = (torch.tensor(state.tensors[f"{module}.{n}"]) for n in ("A", "B", "As", "Bs"))
            layer = base.get_submodule(module)
            assert isinstance(layer, nn.Linear)
            if layer.bias is not None:
                layer.bias += 1.5 * b_s @ (a_s @ layer.bias)
            layer.weight += 1.5 * (b @ a + b_s @ (a_s @ layer.weight))
    ids = torch.randint(0, 300, (2, 7))
    assert torch.allclose(logits(model, ids), base(ids).logits, atol=2e-5)


@pytest.mark.parametrize("name", ["lora", "fed-sb", "ravan", "ffa"])
def test_a_folded_update_acts_as_part_of_the_base_and_is_exported(name: str, tmp_path: Path) -> None:
    method, spec = METHODS[name], make_spec(name, scale=0.5)
    model, base = inject(name, spec), tiny()
    state = random_state(method.initial_state(spec, seed=SEED))
    write_state(method, model, state)
    rng = np.random.default_rng(5)
    folded = {
        module: (
            (0.1 * rng.standard_normal((out, 2))).astype(np.float32),
            rng.standard_normal((2, into)).astype(np.float32),
        )
        for module, (out, into) in list(spec.shapes.items())[3:9]
    }
    fold(model, folded)
    with torch.no_grad():
        for module, (up, down) in folded.items():
            base.get_submodule(module).weight += torch.tensor(up @ down)
    expected = inject(name, spec, base)
    write_state(method, expected, state)
    ids = torch.randint(0, 300, (2, 7))
    assert torch.allclose(logits(model, ids), logits(expected, ids), atol=1e-5)
    save_peft_adapter(state, method.seeded(spec, SEED), tmp_path, base_model="tiny", folded=folded)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert torch.allclose(logits(loaded, ids), logits(expected, ids), atol=1e-5)
    fold(model, {})
    assert not torch.allclose(logits(model, ids), logits(expected, ids), atol=1e-3)


@pytest.mark.parametrize("name", ["lora", "fed-sb", "ravan", "ffa", "hydra", "dora", "ia3"])
def test_an_encoder_has_a_trained_head_and_exports_it(name: str, tmp_path: Path) -> None:
    def encoder() -> PreTrainedModel:
        torch.manual_seed(1)
        sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "vocab_size": 90}
        config = BertConfig(**sizes, num_attention_heads=2, num_labels=3)
        return AutoModelForSequenceClassification.from_config(config).eval()

    method = METHODS[name]
    shapes = {
        path: (module.out_features, module.in_features)
        for path, module in encoder().named_modules()
        if isinstance(module, nn.Linear) and path != "classifier"
    }
    spec = replace(make_spec(name), shapes=shapes, head={"classifier": (3, 24)})
    model = inject(name, spec, encoder())
    parameters = trained_parameters(method, model, spec)
    assert {k: tuple(p.shape) for k, p in parameters.items()} == method.trained_shapes(spec)
    state = random_state(method.initial_state(spec, seed=SEED))
    write_state(method, model, state)
    if method.export == "base":
        save_with_base(state, encoder(), tmp_path, base_model="tiny")
    else:
        save_peft_adapter(state, method.seeded(spec, SEED), tmp_path, base_model="tiny")
    loaded = PeftModel.from_pretrained(encoder(), tmp_path).eval()
    ids = torch.randint(0, 90, (3, 8))
    assert torch.allclose(logits(model, ids), logits(loaded, ids), atol=1e-5)
    assert (logits(model, ids) - encoder()(ids).logits).abs().max() > 0.05


def quantised(kind: str) -> PreTrainedModel:
    options = {"load_in_8bit": True}
    if kind == "4bit":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.float32,
        }
    with tempfile.TemporaryDirectory() as folder:
        tiny().save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32
        )
    base.requires_grad_(False)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    loaded: PreTrainedModel = base
    return loaded


# DoRA on an 8-bit base is refused by the settings: bitsandbytes loses its scales on the CPU
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in METHODS for kind in ("4bit", "8bit") if (name, kind) != ("dora", "8bit")],
)
def test_every_method_trains_on_a_quantised_base(name: str, kind: str) -> None:
    base = quantised(kind)
    method, spec = METHODS[name], make_spec(name)
    model = inject(name, spec, base)
    ids = torch.randint(0, 300, (2, 6))
    before = logits(model, ids)
    write_state(method, model, random_state(method.initial_state(spec, seed=SEED)))
    assert (logits(model, ids) - before).abs().max() > 1e-3
    forward(model, ids).square().mean().backward()
    for key, parameter in trained_parameters(method, model, spec).items():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize(("name", "kind"), [("hydra", "4bit"), ("hydra", "8bit"), ("dora", "4bit")])
def test_what_takes_the_bases_weights_is_exported_from_a_quantised_one(
    name: str, kind: str, tmp_path: Path
) -> None:
    method, spec = METHODS[name], make_spec(name)
    base, ids = quantised(kind), torch.randint(0, 300, (2, 6))
    plain = base(ids).logits
    model = inject(name, spec, base)
    state = random_state(method.initial_state(spec, seed=SEED))
    write_state(method, model, state)
    save_with_base(state, quantised(kind), tmp_path, base_model="tiny")
    loaded = PeftModel.from_pretrained(quantised(kind), tmp_path).eval()
    moved = (logits(model, ids) - plain).abs().max()
    # an 8-bit map rounds its input too, which a factor in float32 cannot follow
    least = 1e-4 if kind == "4bit" else 0.03
    assert (logits(loaded, ids) - logits(model, ids)).abs().max() < least * moved


def test_a_state_of_another_layout_is_refused_by_name() -> None:
    method, spec = METHODS["fed-sb"], make_spec("fed-sb")
    model = inject("fed-sb", spec)
    state = method.initial_state(spec, seed="00")
    tensors = dict(state.tensors)
    first = next(iter(tensors))
    tensors.pop(first)
    with pytest.raises(MismatchError, match=r"matrix 'model.layers.0.self_attn.q_proj.R' is missing"):
        write_state(method, model, state.with_tensors(tensors))


def test_a_spec_for_another_model_is_refused() -> None:
    spec = make_spec("lora")
    shapes = dict(spec.shapes) | {"model.layers.1.mlp.down_proj": (32, 64)}
    other = AdapterSpec(**{**vars(spec), "shapes": shapes})
    with pytest.raises(MismatchError, match=r"down_proj' has shape \(32, 48\), expected \(32, 64\)"):
        inject("lora", other)


def test_load_state_names_what_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no fedllm_state.safetensors"):
        load_state(tmp_path)
    (tmp_path / "fedllm_state.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not json......")
    with pytest.raises(RunError, match="damaged"):
        load_state(tmp_path)
