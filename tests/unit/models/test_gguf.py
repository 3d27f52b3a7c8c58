from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fedllm.errors import ModelError
from fedllm.models.gguf_file import QUANTIZATIONS, require_llama, rope_factors, write_gguf
from fedllm.models.load import load_base, load_tokenizer
from fedllm.models.vocabulary import LLAMA3_SPLIT, read_vocabulary
from fedllm.settings import ModelSettings

TEXT = "A patient of 57 years, 3 mg/day; naïve  twice<|im_end|>\n\tend"
WORDS = ["the patient has the flu", "a patient with 12 teeth", "naïve therapy, the thin end"] * 3


def small(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    settings = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def bpe(splits: list[Any], *, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few words."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits) if len(splits) > 1 else splits[0]
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken("<|im_end|>", special=True)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.add_tokens([AddedToken("twice", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_end|>")


def byte_level(use_regex: bool = True) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def pieces() -> LlamaTokenizer:
    """SentencePiece's kind: pieces with scores, bytes to fall back on, a space before the first word."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    tokens += ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    merges = [
        ("▁", "t"),
        ("h", "e"),
        ("▁t", "he"),
        ("e", "n"),
        ("▁", "p"),
        ("e", "e"),
        ("a", "t"),
        ("▁p", "at"),
    ]
    tokens += ["".join(pair) for pair in merges]
    return LlamaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


def logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits
    return found


def field(file: Path, key: str) -> Any:
    return GGUFReader(file).fields[key].contents()


@pytest.mark.parametrize(("quantization", "far"), [("f32", 0.0), ("f16", 1e-3), ("q8_0", 1e-2)])
def test_what_is_written_reads_back_as_the_same_model(
    tiny: ModelSettings, tmp_path: Path, quantization: str, far: float
) -> None:
    model, tokenizer = load_base(tiny), load_tokenizer(tiny)
    file = write_gguf(model, tokenizer, tmp_path / "m.gguf", name="tiny", quantization=quantization)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    ids = tokenizer(TEXT)["input_ids"]
    assert read(TEXT)["input_ids"] == ids
    assert read.decode(ids) == tokenizer.decode(ids)
    assert (read.eos_token, read.bos_token, read.pad_token) == ("<|im_end|>", "<|im_start|>", "<|im_end|>")
    assert read.chat_template == tokenizer.chat_template
    assert (logits(again, ids) - logits(model, ids)).abs().max() <= far
    stored = {tensor.name: tensor.tensor_type for tensor in GGUFReader(file).tensors}
    assert stored["blk.1.ffn_down.weight"] == QUANTIZATIONS[quantization][0]
    assert stored["blk.0.attn_norm.weight"].name == "F32"
    assert "output.weight" not in stored, "tied: the embedding is the head"


def test_rows_that_blocks_do_not_divide_stay_float16(tmp_path: Path) -> None:
    file = write_gguf(small(), bpe([byte_level()]), tmp_path / "m.gguf", name="m", quantization="q8_0")
    stored = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert stored["blk.0.ffn_down.weight"] == "F16"
    assert stored["blk.0.ffn_up.weight"] == "Q8_0"
    assert stored["output.weight"] == "Q8_0"


def test_a_head_of_its_own_width_and_untied_weights(tmp_path: Path) -> None:
    model = small(head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 5e4}, rms_norm_eps=1e-5)
    file = write_gguf(model, bpe([byte_level()]), tmp_path / "m.gguf", name="m", quantization="f32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    ids = list(range(3, 40))
    assert torch.allclose(logits(again, ids), logits(model, ids), atol=1e-6)
    assert field(file, "llama.attention.key_length") == 16


def test_a_mistral_promises_no_more_than_its_window(tmp_path: Path) -> None:
    torch.manual_seed(2)
    values = small().config.to_dict() | {"sliding_window": 24}
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "max_position_embeddings", "sliding_window")
    config = MistralConfig(**{key: values[key] for key in (*kept, *more)}, attn_implementation="eager")
    model = MistralForCausalLM(config).eval()
    file = write_gguf(model, bpe([byte_level()]), tmp_path / "m.gguf", name="m", quantization="f32")
    assert field(file, "llama.context_length") == 24
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    ids = list(range(3, 27))
    assert torch.allclose(logits(again, ids), logits(model, ids), atol=1e-5)


@pytest.mark.parametrize(
    ("splits", "whole", "name"),
    [
        ([byte_level()], False, "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), byte_level()], False, "smollm"),
        (
            [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), byte_level(use_regex=False)],
            True,
            "llama-bpe",
        ),
    ],
)
def test_byte_level_vocabularies_keep_merges_and_names(
    tmp_path: Path, splits: list[Any], whole: bool, name: str
) -> None:
    tokenizer = bpe(splits, ignore_merges=whole)
    vocabulary = read_vocabulary(tokenizer, rows=300)
    assert (vocabulary.model, vocabulary.split) == ("gpt2", name)
    assert len(vocabulary.merges) > 5
    assert vocabulary.kinds[tokenizer.convert_tokens_to_ids("<|im_end|>")] == TokenType.CONTROL
    assert vocabulary.kinds[tokenizer.convert_tokens_to_ids("twice")] == TokenType.USER_DEFINED
    assert vocabulary.tokens[299] == "[PAD299]"
    assert vocabulary.kinds[299] == TokenType.UNUSED
    file = write_gguf(small(), tokenizer, tmp_path / "m.gguf", name="m", quantization="f32")
    assert field(file, "tokenizer.ggml.pre") == name
    assert field(file, "tokenizer.ggml.add_bos_token") is False
    if name != "smollm":  # transformers reads this kind without its rule for digits; llama.cpp has it
        read = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
        for text in (*WORDS, TEXT):
            assert read(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_sentencepiece_vocabularies_keep_the_order_of_merges(tmp_path: Path) -> None:
    tokenizer = pieces()
    model = small(vocab_size=len(tokenizer))
    file = write_gguf(model, tokenizer, tmp_path / "m.gguf", name="m", quantization="f32")
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    for text in ("then the patent", "peet then thee", "the ü 9", " the"):
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"], text
    assert "▁the" in tokenizer.tokenize("then the")
    assert field(file, "tokenizer.ggml.model") == "llama"
    assert field(file, "tokenizer.ggml.add_space_prefix") is True
    kinds = field(file, "tokenizer.ggml.token_type")
    assert kinds[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    scores = dict(
        zip(field(file, "tokenizer.ggml.tokens"), field(file, "tokenizer.ggml.scores"), strict=True)
    )
    assert scores["▁t"] > scores["he"] > scores["▁the"] > scores["▁pat"]


def test_scaled_rotary_frequencies_are_written_as_factors(tmp_path: Path) -> None:
    """Llama 3.1's rule: slow frequencies are divided by the factor, fast ones not, between them a mixture."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = small(hidden_size=64, rope_parameters=rope)
    expected = []
    for step in range(0, 16, 2):
        length = 2 * math.pi * 10_000.0 ** (step / 16)
        if length < 32 / 4.0:
            expected.append(1.0)
        elif length > 32 / 1.0:
            expected.append(8.0)
        else:
            mixture = (32 / length - 1.0) / (4.0 - 1.0)
            expected.append(1 / ((1 - mixture) / 8.0 + mixture))
    assert rope_factors(model) == pytest.approx(np.array(expected), rel=1e-5)
    file = write_gguf(model, bpe([byte_level()]), tmp_path / "m.gguf", name="m", quantization="f16")
    stored = {tensor.name: tensor.data for tensor in GGUFReader(file).tensors}
    assert stored["rope_freqs.weight"] == pytest.approx(np.array(expected), rel=1e-5)
    linear = small(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
    assert rope_factors(linear) == pytest.approx(np.full(4, 4.0), rel=1e-5)
    assert rope_factors(small()) == pytest.approx(np.ones(4), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(), "this one is bert"),
        (LlamaConfig(attention_bias=True), "has biases"),
        (LlamaConfig(hidden_act="gelu"), "another activation than silu"),
    ],
)
def test_other_models_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        require_llama(config)


def test_rotary_scaling_that_depends_on_length_is_refused() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    with pytest.raises(ModelError, match="rotary scaling of type 'yarn'"):
        rope_factors(small(rope_parameters=rope))


def test_weights_beyond_half_precision_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(ModelError, match="beyond float16's range"):
        write_gguf(model, bpe([byte_level()]), tmp_path / "m.gguf", name="m", quantization="f16")
    assert list(tmp_path.iterdir()) == []
    assert write_gguf(model, bpe([byte_level()]), tmp_path / "m.gguf", name="m", quantization="f32").is_file()


def changed(tokenizer: Any, **parts: Any) -> PreTrainedTokenizerFast:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec | parts)))


def test_other_tokenizers_are_refused() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"a": 0}, unk_token="a")))
    with pytest.raises(ModelError, match="its model is WordPiece"):
        read_vocabulary(words, rows=9)
    with pytest.raises(ModelError, match="cuts text in its own way"):
        read_vocabulary(bpe([pre_tokenizers.Whitespace(), byte_level()]), rows=300)
    with pytest.raises(ModelError, match="cuts text in its own way"):
        read_vocabulary(bpe([byte_level()], ignore_merges=True), rows=300)
    with pytest.raises(ModelError, match="not of one model"):
        read_vocabulary(bpe([byte_level()]), rows=200)
    with pytest.raises(ModelError, match="treats spaces in its own way"):
        read_vocabulary(changed(pieces(), pre_tokenizer=None), rows=300)
    spec = json.loads(pieces().backend_tokenizer.to_str())["model"]
    spec["vocab"]["the"] = 299
    spec["merges"] += [["▁", "the"]]
    with pytest.raises(ModelError, match="not in the order of token scores"):
        read_vocabulary(changed(pieces(), model=spec), rows=320)


@pytest.mark.parametrize(
    ("scheme", "prefix"),
    [("first", True), ("always", True), ("never", False), ("prepend", True), ("replace", False)],
)
def test_the_space_before_the_first_word(scheme: str, prefix: bool) -> None:
    tokenizer = pieces()
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if scheme in ("prepend", "replace"):
        steps = [normalizers.Replace(" ", "▁")]
        steps = [normalizers.Prepend("▁"), *steps] if scheme == "prepend" else steps
        backend = Tokenizer.from_str(json.dumps(spec | {"pre_tokenizer": None}))
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend = Tokenizer.from_str(json.dumps(spec))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    found = read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend), rows=400)
    assert found.space_prefix is prefix
