"""Settings: one source, flat and nested forms agree, and bad ones are named."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fedllm.config import SETTINGS, Config, parse_overrides, read_toml
from fedllm.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("app", ["pyproject.toml", "apps/finetune/pyproject.toml"])
def test_the_flower_apps_have_the_same_settings(app: str) -> None:
    tables = tomllib.loads((ROOT / app).read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    flat = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    assert flat == Config().to_flat()


def test_round_trips(tmp_path: Path) -> None:
    config = Config.from_flat({"train.lr": 1, "adapter.layers": "15-29", "privacy.enabled": False})
    path = tmp_path / "r.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert Config.from_toml(path) == config
    assert Config.from_flat(config.to_flat()) == config
    assert Config.from_flat(config.changed()) == config
    assert config.changed() == {"train.lr": 1.0, "adapter.layers": "15-29"}
    assert set(config.to_flat()) == set(SETTINGS)
    assert all(item.metadata["help"] for item in SETTINGS.values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trin.lr": 1}, "unknown setting 'trin.lr'. Did you mean 'train.lr'"),
        ({"zzz": 1}, "unknown setting 'zzz'. `fedllm settings`"),
        ({"adapter.rank": 0}, "adapter.rank: must be at least 1, got 0"),
        ({"adapter.rank": "x"}, "adapter.rank: needs a value of type int, got 'x'"),
        ({"adapter.rank": True}, "adapter.rank: needs a value of type int"),
        ({"adapter.method": "fedsb"}, "Did you mean 'fed-sb'"),
        ({"data.heldout": 1.5}, "between 0 and 0.9"),
        ({"train.lr": float("nan")}, "train.lr: must be at least 0"),
        ({"privacy.enabled": True}, "exactly one of them"),
        (
            {
                "privacy.enabled": True,
                "privacy.epsilon": 1,
                "privacy.engine": "opacus",
                "train.gradient_checkpointing": True,
            },
            "use privacy.engine=own",
        ),
        ({"privacy.enabled": True, "privacy.epsilon": 1, "privacy.noise_multiplier": 1}, "exactly one"),
        ({"privacy.enabled": True, "privacy.epsilon": 1, "privacy.delta": 0}, "privacy.delta: must lie"),
        (
            {"privacy.enabled": True, "privacy.epsilon": 1, "strategy.weighting": "examples"},
            "example counts depend on private records",
        ),
        ({"data.source": "hub"}, "data.name: source=hub needs"),
        ({"data.partition": "column"}, "data.site: partition=column"),
        ({"data.prompt": "x"}, "must contain {text}"),
        ({"federation.quorum": 9}, "9 replies cannot come from 4 sites"),
        ({"adapter.rslora": True}, "adapter.rslora: scales by adapter.alpha, and 0 leaves the scale at 1"),
        ({"adapter.rank": 8, "adapter.site_ranks": "8,16"}, "adapter.site_ranks: '8,16' must be numbers"),
        ({"adapter.rank": 8, "adapter.site_ranks": "²"}, "adapter.site_ranks: '²' must be numbers"),
        ({"train.lr": 10**400}, "train.lr: an integer of that many digits is too large"),
        ({"adapter.basis": "gradient"}, "adapter.allow_private_basis=true if that is meant"),
        ({"adapter.basis": "dp-gradient"}, "needs privacy.enabled=true"),
        (
            {"adapter.basis": "gradient", "privacy.enabled": True, "privacy.epsilon": 1},
            "singular vectors of private gradients would be published",
        ),
        ({"adapter.method": "dora", "model.quantization": "8bit"}, "loses an 8-bit base's scales"),
        ({"model.kind": "encoder", "data.source": "file"}, "data.labels: an encoder's head"),
        ({"model.kind": "encoder", "data.source": "file", "data.labels": " |"}, "data.labels: an encoder's"),
        ({"model.kind": "encoder", "adapter.method": "prompt"}, "is for causal models"),
        ({"data.pair": "context"}, "put {pair} where its text goes"),
        ({"data.rejected": "worse"}, "train.objective=sft reads no rejected answers"),
        ({"train.objective": "dpo"}, "data.rejected: train.objective=dpo needs the column"),
        ({"train.objective": "dpo", "data.rejected": "worse"}, "use data.task=generate"),
        (
            {"train.objective": "dpo", "model.kind": "encoder", "data.labels": "a|b"},
            "an encoder writes none",
        ),
        ({"train.objective": "dop"}, "Did you mean 'dpo'"),
        ({"train.dpo_beta": 0}, "train.dpo_beta: must be at least 1e-06, got 0"),
        (
            {"adapter.method": "lora", "adapter.basis": "public-svd"},
            "applies to adapter.method=fed-sb only",
        ),
    ],
)
def test_bad_settings_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_flat(values)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("[train]\nlr = 1.0\n", encoding="utf-8-sig")
    assert read_toml(file) == {"train.lr": 1.0}


def test_bad_files_and_words_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such recipe"):
        read_toml(tmp_path / "none.toml")
    bad = tmp_path / "bad.toml"
    bad.write_bytes(b"[train]\nlr = \xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_toml(bad)
    bad.write_text("[train\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_toml(bad)
    bad.write_text("lr = 1\n")
    with pytest.raises(ConfigError, match="'lr' stands outside a table"):
        read_toml(bad)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path)
    with pytest.raises(ConfigError, match="not of the form key=value"):
        parse_overrides(["train.lr"])
    assert parse_overrides(["a.b=x y", "c.d=true", "e.f=[1]"]) == {"a.b": "x y", "c.d": True, "e.f": "[1]"}


@pytest.mark.parametrize("text", ["1e3", "1.10", "true", "007", '"1.10"', "2026-01-01"])
def test_a_text_stays_as_it_was_written(text: str) -> None:
    values = parse_overrides([f"run.dir={text}", f"data.label={text}"])
    config = Config.from_flat(values)
    assert config.run.dir == config.data.label == text.strip('"')


def test_every_recipe_that_ships_is_valid() -> None:
    recipes = sorted((ROOT / "recipes").rglob("*.toml"))
    assert len(recipes) >= 3
    for path in recipes:
        Config.from_toml(path)
        assert path.read_text(encoding="utf-8").startswith("# "), path


def test_dropout_and_private_training_contradict_each_other() -> None:
    values = {"privacy.enabled": True, "privacy.epsilon": 8.0, "adapter.method": "lora"}
    Config.from_flat(values)
    with pytest.raises(ConfigError, match="adapter.dropout: its masks follow from run.seed"):
        Config.from_flat(values | {"adapter.dropout": 0.1})
