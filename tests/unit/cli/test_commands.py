"""The command line as a user meets it: output, messages, exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedllm.cli.app import app
from fedllm.cli.launch import Launch
from fedllm.cli.runs import _settings
from fedllm.errors import RunError
from fedllm.resources import find_recipe

ROOT = Path(__file__).parents[3]


def fedllm(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fedllm.cli.app", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd or ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"} | environment,
    )


def test_help_version_ls_cp_settings(tmp_path: Path) -> None:
    assert "generate" in fedllm("--help").stdout
    assert fedllm("--version").stdout.startswith("fedllm 0.")
    assert "demo/smoke" in fedllm("ls").stdout
    assert "peak learning rate" in fedllm("settings", "train").stdout
    assert fedllm("cp", "demo/smoke", cwd=tmp_path).returncode == 0
    assert (tmp_path / "smoke.toml").read_bytes() == (ROOT / "recipes/demo/smoke.toml").read_bytes()
    again = fedllm("cp", "demo/smoke", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_run_in_one_process_check_show_report_and_generate(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = fedllm("run", "demo/smoke", f"run.dir={folder}", "--engine", "process")
    assert done.returncode == 0, done.stderr
    assert "site-1" in done.stdout
    assert "report.html" in done.stdout
    checked = fedllm("check", "demo/smoke", "privacy.enabled=true", "privacy.epsilon=4", "privacy.delta=1e-4")
    assert checked.returncode == 0, checked.stderr
    assert "trained numbers" in checked.stdout
    assert "noise multiplier" in checked.stdout
    assert "site-0" in fedllm("show", str(folder)).stdout
    (folder / "report.html").unlink()
    assert fedllm("report", str(folder)).stdout.strip() == str(folder / "report.html")
    assert (folder / "report.html").is_file()
    answers = fedllm("generate", str(folder), "Grocery store", "--max-new-tokens", "4")
    assert answers.returncode == 0, answers.stderr
    assert "tuned:" in answers.stdout


CSV = "text,label\n" + "\n".join(f"record {i},{'ab'[i % 2]}" for i in range(60)) + "\n"
FILE = ["demo/smoke", "--engine", "process", "data.source=file", "data.partition=iid"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo/nothing"], "no such recipe"),
        (["n" * 300], "no such recipe"),
        (["demo/smoke", "trainlr=1"], "unknown setting 'trainlr'"),
        (["demo/smoke", "train.lr"], "not of the form key=value"),
        (["demo/smoke", "adapter.rank=0"], "adapter.rank: must be at least 1"),
        (["demo/smoke", "--engine", "process", "adapter.targets=q_prj"], "Did you mean 'q_proj'"),
        (["demo/smoke", "--engine", "process", "adapter.layers=7"], "adapter.layers"),
        (["demo/smoke", "model.name=tiny-lama", "HF"], "not of the form key=value"),
        (["demo/smoke", "model.name=tiny-lama"], "Did you mean 'tiny-llama'"),
        (["demo/smoke", "model.path=/nowhere"], "does not exist"),
        ([*FILE, "data.path=none.csv"], "none.csv"),
        ([*FILE, "data.path=empty.csv"], "empty"),
        ([*FILE, "data.path=good.csv", "data.text=texts"], "Did you mean 'text'"),
        ([*FILE, "data.path=latin.csv"], "UTF-8"),
        ([*FILE, "data.path=tiny.csv"], "1 records cannot be shared among federation.sites=2"),
        ([*FILE, "data.path=good.csv", "train.max_length=8"], "max_length"),
        (
            [*FILE, "data.path=good.csv", "privacy.enabled=true", "privacy.epsilon=2", "privacy.delta=0.5"],
            "privacy.delta=0.5 is too large",
        ),
        (
            [*FILE, "data.path=good.csv", "privacy.enabled=true", "privacy.epsilon=2",
             "privacy.delta=1e-4", "train.batch_size=100"],
            "sampling cannot be private",
        ),
        (["demo/smoke", "run.resume=/nowhere"], "/nowhere"),
        (["demo/smoke", "run.dir=taken"], "exists; choose another run.dir"),
        (["demo/smoke", "--engine", "process", "run.dir=/proc/none/run"], "/proc/none"),
        (["demo/smoke", "--engine", "process", "adapter.init=taken"], "holds no fedllm_state"),
    ],
)  # fmt: skip
def test_bad_input_is_named_in_a_line(words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "good.csv").write_text(CSV)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "latin.csv").write_bytes("text,label\ncaf\xe9,a\n".encode("latin-1"))
    (tmp_path / "tiny.csv").write_text("text,label\none,a\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("x")
    if not any(word.startswith(("run.dir", "run.resume")) for word in words):
        words = [*words, f"run.dir={tmp_path / 'run'}"]
    done = fedllm("run", *words, cwd=tmp_path)
    said = done.stderr + done.stdout
    assert done.returncode == 2, said
    assert message in said.replace("\n", " ")
    assert "Traceback" not in said
    assert "record 1" not in said


def test_data_check_counts_and_shows_no_text(tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    path.write_text(CSV + "record 3,b\nrecord 4,b\n")
    done = fedllm("data", "check", str(path), "model.name=tiny-llama")
    assert done.returncode == 0, done.stderr
    assert "62" in done.stdout
    assert "record 3" not in done.stdout
    missing = fedllm("data", "check", str(path), "text=note")
    assert missing.returncode == 2
    assert "no column 'note'" in missing.stderr


def test_data_check_of_pairs_shows_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [f'{{"prompt": "q{i % 3}", "chosen": "better {i}", "rejected": "poor {i}"}}' for i in range(6)]
    path.write_text("\n".join(rows))
    columns = ("text=prompt", "label=chosen", "rejected=rejected")
    done = fedllm("data", "check", str(path), *columns, "model.name=tiny-llama")
    assert done.returncode == 0, done.stderr
    for line in ("different prompts +3", "two equal answers +0", "longer one +100.0%"):
        assert re.search(line, done.stdout), done.stdout
    assert "better" not in done.stdout
    missing = fedllm("data", "check", str(path), *columns[:2], "rejected=rejeted")
    assert missing.returncode == 2
    assert "Did you mean 'rejected'?" in missing.stderr.replace("\n", " ")


def test_models_ls_and_an_unknown_pull() -> None:
    listed = fedllm("models", "ls").stdout
    assert "smollm2-135m-instruct" in listed
    done = fedllm("models", "pull", "nothing")
    assert done.returncode == 2
    assert "nothing" in done.stderr


def test_help_explains_arguments() -> None:
    shown = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "120"})
    assert "Settings to change, as key=value" in shown.output


def test_brackets_are_shown_as_they_are(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "\n".join(f"record {i},[{'ab'[i % 2]}]" for i in range(60)) + "\n")
    shown = fedllm("data", "check", str(rows), cwd=tmp_path)
    assert "[a]" in shown.stdout
    words = [
        "data.source=file",
        "data.partition=iid",
        f"data.path={rows}",
        "data.prompt=[INST] {text} [/INST]",
    ]
    checked = fedllm("check", "demo/smoke", *words, cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert "[INST] {text} [/INST]" in checked.stdout


@pytest.mark.parametrize("engine", ["simulation", "process"])
def test_records_that_cannot_be_read_are_refused_before_anything_starts(tmp_path: Path, engine: str) -> None:
    words = ["run", *FILE, "--engine", engine, "data.path=none.csv", "run.dir=out"]
    done = fedllm(*words, cwd=tmp_path, FEDLLM_HOME=str(tmp_path / "home"))
    assert done.returncode == 2
    assert "none.csv" in done.stderr
    assert "resume" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "home" / "flwr").exists()


def test_a_finished_run_is_not_resumed_and_a_home_is_expanded(tmp_path: Path) -> None:
    done = fedllm(
        "run", "demo/smoke", "--engine", "process", "federation.rounds=1", f"run.dir={tmp_path}/run"
    )
    assert done.returncode == 0, done.stderr
    again = fedllm("run", "demo/smoke", "run.resume=~/run", HOME=str(tmp_path))
    assert again.returncode == 2
    assert "this run is finished" in again.stderr.replace("\n", " ")
    assert "go on with" not in again.stdout


def test_every_path_of_a_recipe_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    recipe = find_recipe("demo/smoke")
    words = ["run.dir=out", "adapter.basis_path=public.csv", "data.path=~/rows.csv", "data.source=file"]
    values, folder, _ = _settings(recipe, [*words, "data.partition=iid", "adapter.basis=public-gradient"])
    assert (values["adapter.basis_path"], values["data.path"]) == (
        str(tmp_path / "public.csv"),
        str(tmp_path / "home" / "rows.csv"),
    )
    assert values["run.dir"] == str(folder) == str(tmp_path / "out")


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(RunError, match=r"Not a directory.*; set FEDLLM_HOME to a folder you may write to"):
        Launch({}, sites=1, parallel=1, offline=True)
