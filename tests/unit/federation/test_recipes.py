"""Every recipe that ships runs: on a few made-up rows of its columns, with a tiny model of its kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from fedllm.config import Config, read_toml
from fedllm.data.options import option_columns
from fedllm.federation.estimate import estimate
from fedllm.federation.inprocess import run_values
from fedllm.models.shapes import count_parameters
from fedllm.resources import recipe_names, recipes_dir
from fedllm.runs.events import read_events
from fedllm.runs.folder import open_run
from fedllm.training.spec import adapter_spec

ROWS = 96
SMALL: dict[str, Any] = {
    "model.dtype": "float32",
    "model.quantization": "none",
    "adapter.layers": "1",
    "federation.rounds": 1,
    "federation.join_wait": 1.0,
    "train.local_steps": 1,
    "train.batch_size": 4,
    "train.micro_batch": 4,
    "train.max_length": 500,
    "train.threads": 1,
    "evaluation.every": 0,
    "evaluation.final_records": 2,
}


def write_rows(config: Config, path: Path) -> None:
    """Write rows of a recipe's columns: short made-up texts, its own labels, sites and patients."""
    data = config.data
    labels = [label.strip() for label in data.labels.split("|")] if data.labels else ["first", "second"]
    with path.open("w", encoding="utf-8") as file:
        for row in range(ROWS):
            answer = labels[row % len(labels)] if data.task == "classify" else f"it is {row}"
            values: dict[str, Any] = {data.text: f"text {row}", data.label: answer}
            if data.task == "choose":
                values[data.label] = row % 4
                values |= {column: f"option {column}" for column in option_columns(data.options)}
            for column, value in (
                (data.pair, f"pair {row}"),
                (data.rejected, f"it is not {row}"),
                (data.site, f"site {row % 3}"),
                (data.unit, f"p{row // 2}"),
            ):
                if column:
                    values[column] = value
            file.write(json.dumps(values) + "\n")


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_runs_on_rows_of_its_columns(name: str, tmp_path: Path) -> None:
    values = read_toml(recipes_dir() / f"{name}.toml")
    config = Config.from_flat(values)
    values |= SMALL | {
        "model.name": "tiny-bert" if config.model.kind == "encoder" else "tiny-llama",
        "adapter.rank": min(config.adapter.rank, 4),
        "federation.sites": min(config.federation.sites, 3),
        "federation.sites_per_round": min(config.federation.sites_per_round, 2),
        "run.dir": str(tmp_path / "run"),
    }
    if config.data.source in ("file", "hub"):
        write_rows(config, tmp_path / "rows.jsonl")
        values |= {"data.source": "file", "data.path": str(tmp_path / "rows.jsonl"), "data.name": ""}
        values["data.heldout"] = 0.3
    if config.data.partition == "dirichlet":
        values["data.dirichlet_alpha"] = 10.0
    run_values(values, sites=int(str(values["federation.sites"])))
    events = read_events(open_run(tmp_path / "run"))
    replies = [event for event in events if event["event"] == "site_reply"]
    assert replies
    assert all(event["accepted"] for event in replies), replies
    assert (tmp_path / "run" / "report.html").is_file()


GPU = {
    "general/mistral-7b-fedsb": (
        MistralConfig(sliding_window=None),
        7_241_732_096,
        # 7 maps a layer, R is 200 x 200
        32 * 7 * 200 * 200,
    ),
    "finance/llama-3-8b-fedit": (
        LlamaConfig(
            vocab_size=128_256,
            hidden_size=4096,
            intermediate_size=14_336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
        8_030_261_248,
        # r (in + out) of q, k, v, o in 32 layers
        32 * 16 * (8192 + 5120 + 5120 + 8192),
    ),
    "medical/mistral-7b-fedit": (
        MistralConfig(vocab_size=32_768, sliding_window=None),
        7_248_023_552,
        # r (in + out) of q, k, v, o in 32 layers
        32 * 16 * (8192 + 5120 + 5120 + 8192),
    ),
    "medical/qwen-7b-dp-fedsb": (
        Qwen2Config(
            vocab_size=152_064,
            hidden_size=3584,
            intermediate_size=18_944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
        ),
        7_615_616_512,
        28 * 7 * 64 * 64,
    ),
}


@pytest.mark.parametrize("name", GPU)
def test_a_recipe_for_gpus_has_the_shapes_and_bytes_it_should(name: str, tmp_path: Path) -> None:
    model, parameters, trained = GPU[name]
    model.save_pretrained(tmp_path)
    values = read_toml(recipes_dir() / f"{name}.toml") | {"model.path": str(tmp_path)}
    # what auto stands for on such a card
    values["model.dtype"] = "bfloat16"
    config = Config.from_flat(values | {"data.source": "file", "data.path": "", "data.name": ""})
    assert count_parameters(model, "causal") == parameters
    found = estimate(config)
    assert found.trained == trained
    assert adapter_spec(config).rank == config.adapter.rank
    size = {"float32": 4, "int8": 1}[config.wire.codec]
    assert trained * size < found.bytes_up < 1.1 * trained * size + 50_000
    # a 4-bit base, its 16-bit ends, frozen matrices and the activations of a micro-batch fit into 24 GB
    assert 4000 < found.memory_mib < 24_000


def test_every_recipe_says_how_to_run_it_and_what_it_needs() -> None:
    assert len(recipe_names()) >= 14
    for name in recipe_names():
        text = (recipes_dir() / f"{name}.toml").read_text(encoding="utf-8")
        head = text.partition("\n[")[0]
        assert f"fedllm run {name}" in head, name
        if name != "demo/smoke":
            assert "Needs:" in head, name
            assert "Minutes on 2 cores" in head or "without a GPU" in head, name
