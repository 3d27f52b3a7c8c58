"""``fedllm export``: what it refuses, and what it leaves when the hub does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from fedllm.cli.runs import export
from fedllm.config import Config
from fedllm.errors import ConfigError, ModelError, RunError
from fedllm.federation.generate import export_adapter, export_gguf, export_merged
from fedllm.federation.inprocess import run as run_recipe

ROOT = Path(__file__).parents[3]
SETTINGS = {
    "model.name": "tiny-llama",
    "model.dtype": "float32",
    "adapter.rank": 2,
    "adapter.layers": "1",
    "data.source": "mcc",
    "federation.sites": 1,
    "federation.rounds": 1,
    "train.batch_size": 2,
    "train.local_steps": 1,
    "train.max_length": 160,
    "evaluation.records": 1,
    "evaluation.final_records": 1,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "run"
    return run_recipe(Config.from_flat(SETTINGS | {"run.dir": str(path)})).folder.path


def change(run: Path, target: Path, **settings: str) -> Path:
    """Return a copy of a run's folder whose settings say something else."""
    config = Config.from_toml(run / "config.toml").replace(**settings)
    target.mkdir()
    (target / "adapter").symlink_to(run / "adapter")
    (target / "config.toml").write_text(config.to_toml())
    return target


def test_a_hub_out_of_reach_costs_the_upload_and_not_the_export(finished: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    words = ["export", str(finished), str(target), "--gguf", "--quantization", "q8_0", "--push", "ward/model"]
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_any", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fedllm.cli.app", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | nowhere,
    )
    assert done.returncode == 2
    assert "http://127.0.0.1:9 cannot be reached" in done.stderr
    assert f"`hf upload ward/model {target} .` sends it later" in done.stderr
    assert "Traceback" not in done.stderr
    assert {file.name for file in target.iterdir()} == {"README.md", "tiny-llama-q8_0.gguf"}
    assert len(GGUFReader(target / "tiny-llama-q8_0.gguf").tensors) > 10
    with pytest.raises(RunError, match="exists already; choose another folder"):
        export(finished, target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merged": True, "gguf": True}, "--merged, --gguf: give one of them"),
        ({"quantization": "f32"}, "only --gguf stores matrices in another way"),
    ],
)
def test_options_that_do_not_go_together(
    finished: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(finished, tmp_path / "out", **options)
    with pytest.raises(RunError, match="'nobody' is no repository name"):
        export(finished, tmp_path / "out", push="nobody")
    assert not (tmp_path / "out").exists()


def test_a_run_that_gguf_cannot_hold_is_refused_before_anything_is_written(
    finished: Path, tmp_path: Path
) -> None:
    bert = change(finished, tmp_path / "bert", model__kind="encoder", model__name="tiny-bert")
    with pytest.raises(ModelError, match="this one is bert"):
        export_gguf(bert, tmp_path / "out")
    small = change(finished, tmp_path / "small", model__quantization="4bit")
    with pytest.raises(ConfigError, match="a quantised base"):
        export_gguf(small, tmp_path / "out")
    with pytest.raises(RunError, match="no such folder"):
        export_gguf(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_exported_names_a_folder_of_this_machine(finished: Path, tmp_path: Path) -> None:
    export_adapter(finished, tmp_path / "out" / "adapter")
    export_merged(finished, tmp_path / "out" / "merged")
    export_gguf(finished, tmp_path / "out" / "gguf")
    home = os.environ["FEDLLM_HOME"]
    for file in (file for file in (tmp_path / "out").rglob("*") if file.is_file()):
        for path in (home, str(finished.parent), str(ROOT)):
            assert path.encode() not in file.read_bytes(), file
