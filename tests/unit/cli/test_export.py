"""``fedllm export``: what it refuses, and what it leaves when the hub does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from safetensors import SafetensorError

from fedllm.adapters import export as adapter_files
from fedllm.adapters.export import load_state, save_state
from fedllm.cli.runs import export
from fedllm.config import Config
from fedllm.errors import ConfigError, ModelError, RunError
from fedllm.federation.classify import classify
from fedllm.federation.generate import answer, export_adapter, export_gguf, export_merged
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
    (target / "events.jsonl").symlink_to(run / "events.jsonl")
    (target / "config.toml").write_text(config.to_toml())
    return target


def copied(run: Path, target: Path) -> Path:
    """Return a copy of a run's folder that a test may damage."""
    return Path(shutil.copytree(run, target))


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


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_is_neither_exported_nor_used(finished: Path, tmp_path: Path, file: str) -> None:
    run = copied(finished, tmp_path / "run")
    path = run / "adapter" / file
    path.write_bytes(path.read_bytes()[:-7])
    for use in (
        lambda: export_adapter(run, tmp_path / "out"),
        lambda: export_merged(run, tmp_path / "out"),
        lambda: classify(run, "A grocer"),
        lambda: answer(run, "A grocer", max_new_tokens=2),
    ):
        with pytest.raises(RunError, match=f"{file} is missing or damaged"):
            use()
    path.unlink()
    with pytest.raises(RunError, match=f"{file} is missing or damaged"):
        export_adapter(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_an_unfinished_run_left_is_not_exported(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path / "run")
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(line for line in lines if "run_finished" not in line))
    with pytest.raises(RunError, match=f"no finished adapter yet; go on with run.resume={run}"):
        export_adapter(run, tmp_path / "out")


FULL = SafetensorError("I/O error: No space left on device (os error 28)")


def full(*args: Any, **kwargs: Any) -> None:
    raise FULL


@pytest.mark.parametrize("write", [export_adapter, export_merged, export_gguf])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_export_leaves_nothing_and_can_be_tried_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, existing: bool
) -> None:
    target = tmp_path / "out"
    if existing:
        target.mkdir()
    with monkeypatch.context() as patch:
        # the card comes last
        patch.setattr("fedllm.federation.generate.run_card", full)
        with pytest.raises(RunError, match=r"out: cannot be written: .*no space left on device"):
            write(finished, target)
    assert list(tmp_path.rglob("*")) == ([target] if existing else [])
    write(finished, target)
    assert "README.md" in {path.name for path in target.iterdir()}
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_full_disk_is_said_of_an_adapter(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, seed = load_state(finished / "adapter")
    monkeypatch.setattr(adapter_files, "save_file", full)
    with pytest.raises(RunError, match=r"the adapter could not be written .*No space left on device"):
        save_state(state, tmp_path / "adapter", seed=seed)


@pytest.mark.parametrize("write", [export_adapter, export_merged, export_gguf])
def test_a_target_that_cannot_be_is_refused(finished: Path, tmp_path: Path, write: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/sub: cannot be written: not a directory"):
        write(finished, tmp_path / "file" / "sub")
    with pytest.raises(RunError, match="is inside the run folder; choose another folder"):
        write(finished, finished / "adapter" / "out")
