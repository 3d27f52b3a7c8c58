"""The simulation engine, with the wrapper and without it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import tomli_w

ROOT = Path(__file__).parents[2]


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def fedllm(*words: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedllm.cli.app", *words],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=os.environ | {"FEDLLM_HOME": str(home), "PYTHONPATH": str(ROOT), "COLUMNS": "160"},
    )


def test_the_wrapper_runs_reports_failure_and_leaves_nothing_behind(
    tmp_path: Path, fedllm_home: Path
) -> None:
    done = fedllm("run", "demo/smoke", f"run.dir={tmp_path / 'run'}", home=fedllm_home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "flower.log").stat().st_size > 0
    assert [event["accepted"] for event in events(tmp_path / "run", "round_finished")] == [2, 2]
    one_process = fedllm(
        "run", "demo/smoke", f"run.dir={tmp_path / 'one'}", "train.threads=1", "--engine", "process",
        home=fedllm_home,
    )  # fmt: skip
    assert one_process.returncode == 0, one_process.stdout + one_process.stderr
    # the same recipe gives the same adapter whatever carries the messages
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    failed = fedllm(
        "run", "demo/smoke", f"run.dir={tmp_path / 'bad'}", "privacy.enabled=true", "privacy.epsilon=1",
        "privacy.delta=0.4", home=fedllm_home,
    )  # fmt: skip
    assert failed.returncode == 2, failed.stdout
    assert "privacy.delta=0.4 is too large" in failed.stderr
    assert not left_running(fedllm_home)


def left_running(home: Path) -> list[list[str]]:
    """Return the commands of Flower's processes that a home's runs have started and that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME", "").startswith(str(home / "flwr")):
                found.append(process.cmdline())
        except (psutil.Error, OSError):
            continue
    return found


def test_a_command_that_is_terminated_takes_what_it_started_with_it(
    tmp_path: Path, fedllm_home: Path
) -> None:
    command = ["run", "demo/smoke", f"run.dir={tmp_path / 'run'}", "federation.rounds=500"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedllm.cli.app", *command],
        env=os.environ | {"FEDLLM_HOME": str(fedllm_home), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("run/checkpoints/*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left_running(fedllm_home)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not left_running(fedllm_home)


def test_flwr_run_does_the_same_without_the_wrapper(tmp_path: Path, fedllm_home: Path) -> None:
    settings = {
        "model.name": "tiny-llama",
        "model.dtype": "float32",
        "adapter.rank": 4,
        "data.source": "mcc",
        "federation.sites": 3,
        "federation.rounds": 1,
        "train.local_steps": 2,
        "train.max_length": 160,
        "evaluation.records": 2,
        "evaluation.final_records": 2,
        "run.dir": str(tmp_path / "run"),
    }
    (tmp_path / "settings.toml").write_text(tomli_w.dumps(settings))
    environment = os.environ | {
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FEDLLM_HOME": str(fedllm_home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": "39591",
        "FLWR_LOCAL_CONTROL_API_PORT": "39593",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["run", str(ROOT), "--stream", "-c", str(tmp_path / "settings.toml")]
    try:
        done = subprocess.run(
            [str(Path(sys.executable).parent / "flwr"), *command],
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
            env=environment,
        )
        # two simulated SuperNodes by default: they play three sites
        assert events(tmp_path / "run", "run_finished"), done.stdout + done.stderr
        assert events(tmp_path / "run", "round_finished")[0]["accepted"] == 3
        assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    finally:
        for process in psutil.process_iter():
            try:
                if process.environ().get("FLWR_HOME") == str(tmp_path / "flwr"):
                    process.kill()
            except (psutil.Error, OSError):
                continue
