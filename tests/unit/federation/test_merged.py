"""Whole models: the base with a finished run's adapter merged into it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedllm.adapters import METHODS
from fedllm.config import Config
from fedllm.errors import ConfigError, RunError
from fedllm.federation.generate import export_adapter, export_gguf, export_merged
from fedllm.models.load import load_base, resolve
from fedllm.settings import ModelSettings


@pytest.mark.parametrize("method", ["fed-sb", "hydra", "dora"])
def test_the_merged_model_needs_no_peft_and_says_the_same(method: str, federate: Any, tmp_path: Path) -> None:
    strategy = {"fed-sb": "fed-sb", "hydra": "fedit", "dora": "average"}[method]
    folder = federate(adapter__method=method, strategy__name=strategy, train__lr=5e-2)
    merged = export_merged(folder.path, tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    adapter = export_adapter(folder.path, tmp_path / "adapter")
    base = load_base(Config.from_flat({"model.name": "tiny-llama", "model.dtype": "float32"}).model)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        peft = PeftModel.from_pretrained(base, adapter).eval()(input_ids=ids).logits
        assert torch.allclose(whole(input_ids=ids).logits, peft, atol=1e-5)
    assert not torch.allclose(plain, peft, atol=1e-5)
    with pytest.raises(RunError, match="exists already"):
        export_merged(folder.path, merged)
    file = export_gguf(folder.path, tmp_path / "gguf", quantization="f32")
    assert file.name == "tiny-llama-f32.gguf"
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(read(input_ids=ids).logits, whole(input_ids=ids).logits)
    with pytest.raises(RunError, match="exists already"):
        export_gguf(folder.path, file.parent)
    with pytest.raises(ConfigError, match="'q3' is not one of f32, f16, q8_0"):
        export_gguf(folder.path, tmp_path / "other", quantization="q3")


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.export == "base"])
def test_a_base_with_some_biases_takes_in_what_is_made_with_the_base(
    method: str, federate: Any, tmp_path: Path
) -> None:
    plain = resolve(ModelSettings(name="tiny-llama"))
    place = shutil.copytree(plain, tmp_path / "biased")
    biased = AutoModelForCausalLM.from_pretrained(plain, attention_bias=True, dtype=torch.float32).eval()
    for name, parameter in biased.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    biased.save_pretrained(place)
    folder = federate(adapter__method=method, model__path=str(place), train__lr=5e-2, federation__rounds=1)
    whole = AutoModelForCausalLM.from_pretrained(
        export_merged(folder.path, tmp_path / "merged"), dtype=torch.float32
    )
    ids = torch.arange(3, 40)[None]
    adapter = export_adapter(folder.path, tmp_path / "adapter")
    with torch.no_grad():
        base = biased(input_ids=ids).logits
        peft = PeftModel.from_pretrained(biased, adapter).eval()(input_ids=ids).logits
        assert torch.allclose(whole.eval()(input_ids=ids).logits, peft, atol=1e-5)
    assert not torch.allclose(base, peft, atol=1e-5)
