import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from fedllm.errors import ModelError, PrivacyError
from fedllm.models.fingerprint import weights_fingerprint
from fedllm.models.load import load_base, load_config, load_tokenizer, require_separate_records, resolve
from fedllm.settings import ModelSettings


@pytest.fixture
def folder(tiny: ModelSettings, tmp_path: Path) -> Path:
    """A copy of tiny-llama that a test may damage."""
    return Path(shutil.copytree(resolve(tiny), tmp_path / "model"))


def at(folder: Path) -> ModelSettings:
    return ModelSettings(path=str(folder), dtype="float32")


def test_resolve_prefers_path_then_embedded_then_hub(tiny, shared_home, folder):
    assert resolve(replace(tiny, path=str(folder))) == folder
    assert resolve(tiny) == shared_home / "models" / "tiny-llama"
    assert resolve(ModelSettings(name="some-org/some-model")) == "some-org/some-model"


def test_resolve_names_what_is_missing(tmp_path):
    with pytest.raises(ModelError, match=r"nowhere does not exist"):
        resolve(ModelSettings(path=str(tmp_path / "nowhere")))
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(ModelSettings(path=str(tmp_path)))
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        resolve(ModelSettings(path=str(tmp_path / "file")))


def test_tokenizer_round_trip_and_chat_template(tiny):
    tokenizer = load_tokenizer(tiny)
    assert len(tokenizer) == 258
    assert tokenizer.padding_side == "right"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Grüße, 你好\n"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nGrüße, 你好\n<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer(text)["input_ids"]
    assert tokens.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(tokens) == text


def test_tokenizer_pads_with_its_end_token(folder):
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text())
    del values["pad_token"]
    file.write_text(json.dumps(values))
    tokenizer = load_tokenizer(at(folder))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    del values["eos_token"]
    file.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="neither a padding nor an end token"):
        load_tokenizer(at(folder))


def test_config_needs_no_weights(folder):
    (folder / "model.safetensors").unlink()
    config = load_config(at(folder))
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 2, 32)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_base_is_frozen_and_in_evaluation_mode(tiny, dtype, expected):
    base = load_base(replace(tiny, dtype=dtype))
    assert {parameter.dtype for parameter in base.parameters()} == {expected}
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert not base.training
    assert base.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("kind", "codes"), [("4bit", torch.uint8), ("8bit", torch.int8)])
def test_gradient_flows_through_a_quantised_base_after_evaluation(tiny, kind, codes):
    base = load_base(replace(tiny, quantization=kind))
    assert base.model.layers[0].mlp.up_proj.weight.dtype == codes
    assert not any(parameter.requires_grad for parameter in base.parameters())
    before = weights_fingerprint(base)
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        evaluated = base(input_ids=tokens).logits
    embedded = base.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = base(inputs_embeds=embedded).logits
    logits.logsumexp(-1).sum().backward()
    exact = load_base(tiny)(input_ids=tokens).logits
    torch.testing.assert_close(logits, evaluated)
    assert embedded.grad is not None
    assert embedded.grad.norm() > 0.1
    assert (logits - exact).norm() / exact.norm() < 0.2
    assert weights_fingerprint(base) == before


def test_loading_is_silent_and_leaves_no_setting_behind(tiny, capfd):
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    load_base(tiny)
    load_tokenizer(tiny)
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.is_progress_bar_enabled() == bars
    assert transformers_logging.get_verbosity() == level


@pytest.mark.parametrize("content", [b"", b"x" * 10_000, None])
def test_damaged_weights(folder, content):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000] if content is None else content)
    with pytest.raises(ModelError, match=r"weights cannot be loaded.*Copy the whole model folder"):
        load_base(at(folder))


def test_absent_weights_and_the_pickle_format(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"weights cannot be loaded.*safetensors"):
        load_base(at(folder))


def test_incomplete_weights_are_never_filled_with_random_ones(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 .*layers\.1\.mlp\.up_proj"):
        load_base(at(folder))


def test_weights_of_another_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"shapes are not those config\.json"):
        load_base(at(folder))


@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", '{"model_type": "zork"}', '{"model_type": "llama", "hidden_size": "a"}']
)
def test_damaged_config(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json cannot be loaded"):
        load_config(at(folder))


def test_encoder_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(ModelError, match="BertModel is not a causal language model"):
        load_config(at(folder))


@pytest.mark.parametrize("harm", ["none left", "damaged", "only the settings"])
def test_tokenizer_files(folder, harm):
    match harm:
        case "none left":
            for file in folder.glob("tokenizer*"):
                file.unlink()
        case "damaged":
            (folder / "tokenizer.json").write_text("{")
        case "only the settings":
            (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(at(folder))


def test_unreachable_hub_lists_the_embedded_models(monkeypatch):
    def offline(*_: object, **__: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr("fedllm.models.load.AutoConfig.from_pretrained", offline)
    with pytest.raises(ModelError) as error:
        load_config(ModelSettings(name="smollm2-135m-instrct"))
    for part in (
        "no connection",
        "tiny-llama",
        "minilm-l6",
        "Did you mean 'smollm2-135m-instruct'?",
        "model.path",
    ):
        assert part in str(error.value)


def test_damaged_embedded_folder_says_how_to_make_it_again(tiny, folder, tmp_path):
    embedded = folder.rename(tmp_path / "tiny-llama")
    size = (embedded / "model.safetensors").stat().st_size
    (embedded / "model.safetensors").write_bytes(b"\0" * size)
    with pytest.raises(ModelError, match="fedllm models pull tiny-llama"):
        load_base(at(embedded))


def test_8_bit_layers_do_not_mix_the_records_of_a_batch(tiny):
    base = load_base(replace(tiny, quantization="8bit", dtype="float32"))
    calm, loud = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 9, 9, 9]])
    with torch.no_grad():
        # an outlier of one record must not change how the other is multiplied
        base.get_input_embeddings().weight[9] *= 1000
        alone = base(input_ids=calm).logits[0]
        beside = base(input_ids=torch.cat([calm, loud])).logits[0]
    assert torch.allclose(alone, beside, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_follow_the_longest_record_are_not_private(tiny, kind):
    base = load_base(tiny)
    require_separate_records(base)
    base.config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(PrivacyError, match=f"rope_type={kind}: .* another base model"):
        require_separate_records(base)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_quantised_checkpoint_is_loaded_as_what_it_is(tiny, tmp_path, kind):
    load_base(replace(tiny, quantization=kind, dtype="float32")).save_pretrained(tmp_path)
    saved = ModelSettings(path=str(tmp_path), quantization=kind, dtype="float32")
    if kind == "8bit":
        # what the checkpoint says would mix the records of a batch
        assert load_config(saved).quantization_config["llm_int8_threshold"] == 6.0
        layers = [part for part in load_base(saved).modules() if isinstance(part, Linear8bitLt)]
        assert layers
        assert {part.state.threshold for part in layers} == {0.0}
    for other in {"none", "4bit", "8bit"} - {kind}:
        with pytest.raises(ModelError, match=f"set model.quantization={kind}"):
            load_config(replace(saved, quantization=other))


def test_a_checkpoint_quantised_in_another_way_is_refused(tiny, tmp_path):
    config = load_config(tiny)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"quantised \(gptq, another way\) .* the unquantised model"):
        load_config(ModelSettings(path=str(tmp_path), quantization="4bit"))
