"""Bytes before anything runs: the papers' counts and ratios, and the page that lists all methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedllm.config import Config
from fedllm.errors import ConfigError
from fedllm.federation.catalogue import catalogue, markdown, write_docs
from fedllm.federation.estimate import break_even, estimate, estimate_bytes
from fedllm.federation.plan import check_recipe

ROOT = Path(__file__).parents[3]
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.2-3b": {
        "model_type": "llama",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32000,
    },
    "gemma-2-9b": {
        "model_type": "gemma2",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "vocab_size": 256000,
    },
}
FED_SB = {"adapter.method": "fed-sb", "strategy.name": "fed-sb", "adapter.rank": 200}
FEDIT = {"adapter.method": "lora", "strategy.name": "fedit", "adapter.rank": 32}


def settings(model: str, tmp_path: Path, **values: Any) -> Config:
    folder = tmp_path / model
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODELS[model]))
    dotted = {key.replace("__", "."): value for key, value in values.items()}
    return Config.from_flat({"model.path": str(folder), "data.source": "file"} | dotted)


# specs: numbers of R at rank 200, of LoRA at rank 32, and their ratio
@pytest.mark.parametrize(
    ("model", "core", "lora", "ratio"),
    [
        ("llama-3.2-3b", 7_840_000, 48_627_712, 6.2),
        ("mistral-7b", 8_960_000, 83_886_080, 9.4),
        ("gemma-2-9b", 11_760_000, 108_036_096, 9.2),
    ],
)
def test_counts_and_ratios_of_the_papers(
    model: str, core: int, lora: int, ratio: float, tmp_path: Path
) -> None:
    ours = estimate_bytes(settings(model, tmp_path).replace(**_underscored(FED_SB)))
    theirs = estimate_bytes(settings(model, tmp_path).replace(**_underscored(FEDIT)))
    assert (ours.trained, theirs.trained) == (core, lora)
    assert theirs.bytes_up / ours.bytes_up == pytest.approx(ratio, abs=0.06)


def test_the_230_of_the_paper_is_against_stacking_25_clients(tmp_path: Path) -> None:
    base = settings("gemma-2-9b", tmp_path)
    ours = estimate_bytes(base.replace(**_underscored(FED_SB)))
    flora = {"adapter.method": "lora", "strategy.name": "flora", "adapter.rank": 32, "federation.sites": 25}
    # the paper stacks without end
    stacked = estimate_bytes(base.replace(**_underscored(flora), strategy__residual_cap=10**6))
    assert stacked.bytes_down / ours.bytes_down == pytest.approx(229.7, rel=0.01)


def test_break_even_of_a_shipped_basis_and_of_a_seeded_one(tmp_path: Path) -> None:
    base = settings("mistral-7b", tmp_path)
    theirs = estimate_bytes(base.replace(**_underscored(FEDIT)))
    shipped = estimate_bytes(base.replace(**_underscored(FED_SB), adapter__basis="public-svd"))
    seeded = estimate_bytes(base.replace(**_underscored(FED_SB)))
    assert "Break-even after 3.5 rounds" in break_even(shipped, theirs)
    assert break_even(shipped, theirs) == break_even(theirs, shipped).replace("the other one", "this recipe")
    assert "This recipe moves fewer bytes from the first round on" in break_even(seeded, theirs)
    assert shipped.one_off - seeded.one_off > 2_000_000_000
    assert "same number" in break_even(theirs, theirs)


def test_prompts_beyond_a_models_window_are_not_scored(tmp_path: Path) -> None:
    folder = tmp_path / "window"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODELS["mistral-7b"] | {"sliding_window": 64}))
    values = {"model.path": str(folder), "data.source": "file", "train.max_length": 65}
    with pytest.raises(ConfigError, match=r"train.max_length=65: .* set it to 64 at most"):
        check_recipe(Config.from_flat(values))
    check_recipe(Config.from_flat(values | {"train.max_length": 64}))
    check_recipe(Config.from_flat(values | {"data.task": "generate"}))


@pytest.mark.parametrize(
    ("model", "longest", "settings"),
    [
        ({"model_type": "bert", "max_position_embeddings": 64}, 64, {}),
        # positions start behind the padding token's
        ({"model_type": "roberta", "max_position_embeddings": 66, "pad_token_id": 1}, 64, {}),
        ({"model_type": "gpt2", "n_positions": 64}, 64, {}),
        (MODELS["mistral-7b"] | {"max_position_embeddings": 64}, 64, {}),
        ({"model_type": "gpt2", "n_positions": 64}, 60, {"adapter.method": "prompt", "adapter.rank": 4}),
        (
            {"model_type": "gpt2", "n_positions": 64},
            54,
            {"data.task": "generate", "evaluation.generate": True, "evaluation.max_new_tokens": 10},
        ),
    ],
)
def test_texts_beyond_a_models_positions_are_refused(
    model: dict[str, Any], longest: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model))
    values = {"model.path": str(tmp_path), "data.source": "file", "data.labels": "a | b"} | settings
    if model["model_type"] in ("bert", "roberta"):
        values["model.kind"] = "encoder"
    with pytest.raises(ConfigError, match=rf"train.max_length={longest + 1}.*: the model has 64 positions"):
        check_recipe(Config.from_flat(values | {"train.max_length": longest + 1}))
    check_recipe(Config.from_flat(values | {"train.max_length": longest}))


def test_layers_computed_again_need_less_memory(tmp_path: Path) -> None:
    plain = settings("mistral-7b", tmp_path, train__micro_batch=8, train__max_length=512)
    again = plain.replace(train__gradient_checkpointing=True)
    # an input of each of 32 layers and 34 values of one, where it was 34 of each: bfloat16, 4096 wide
    saved = (34 * 32 - 34 - 32) * 8 * 512 * 4096 * 2 / 2**20
    assert estimate(plain).memory_mib - estimate(again).memory_mib == pytest.approx(saved, abs=1)


def test_memory_of_a_quantised_base(tmp_path: Path) -> None:
    plain = settings("mistral-7b", tmp_path, model__dtype="bfloat16")
    plain = plain.replace(adapter__method="lora", strategy__name="fedit")
    four = plain.replace(model__quantization="4bit")
    # q and o, k and v, three of the feed-forward part; embedding, head and activations stay in 16 bit
    linear = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    saved = linear * (2 - 0.6) / 2**20
    assert estimate(plain).memory_mib - estimate(four).memory_mib == pytest.approx(saved, abs=1)


@pytest.mark.parametrize(
    ("method", "strategy", "heads", "sides"),
    [("fed-sb", "fed-sb", 1, "BA"), ("ravan", "ravan", 2, "BA"), ("ffa", "ffa", 1, "A")],
)
def test_memory_of_frozen_matrices(
    method: str, strategy: str, heads: int, sides: str, tmp_path: Path
) -> None:
    small = settings("mistral-7b", tmp_path, model__dtype="bfloat16", adapter__targets="o_proj")
    small = small.replace(adapter__method=method, strategy__name=strategy, adapter__heads=heads)
    small = small.replace(adapter__rank=64)
    large = small.replace(adapter__rank=128)
    frozen = 32 * 64 * heads * 4096 * len(sides) * (2 + 4)
    # values, gradient and AdamW's two moments, and the sum over a batch
    trained = (estimate_bytes(large).trained - estimate_bytes(small).trained) * (16 + 4)
    found = estimate(large).memory_mib - estimate(small).memory_mib
    assert found == pytest.approx((frozen + trained) / 2**20, abs=1)


def test_the_docs_hold_the_catalogue(tmp_path: Path) -> None:
    page = ROOT / "docs" / "methods.md"
    copy = tmp_path / "methods.md"
    copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    write_docs(copy)
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), (
        "run `python -m fedllm.federation.catalogue`"
    )
    assert markdown() in page.read_text(encoding="utf-8")
    names = [row[0] for _, _, rows in catalogue() for row in rows]
    expected = (
        "fedit ffa rolora fed-sb ravan hydra fedsa flora fedex flexlora florist raflora hetlora lora-fair "
    )
    expected += "fedrot fedsvd fedask fedavgm fedadam fedyogi fedadagrad nesterov fedhyper int8 int4 topk"
    for name in expected.split():
        assert name in names, name


def _underscored(values: dict[str, Any]) -> dict[str, Any]:
    return {key.replace(".", "__"): value for key, value in values.items()}
