"""``fedllm tune`` as a user meets it: what it refuses, and what it says of runs that failed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedllm.cli.app import app
from fedllm.cli.jobs import Job

FILE = """\
recipe = "demo/smoke"
seeds = [1]

[settings]
data.heldout_public = true
privacy.enabled = true
privacy.epsilon = 4.0
privacy.delta = 1e-4

[[cells]]
name = "low"
"""


def test_failed_runs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file.toml").write_text(FILE)

    def fail_one(jobs: Sequence[Job], states: object) -> dict[str, str]:
        return {jobs[0].name: "the disk was full"}

    monkeypatch.setattr("fedllm.federation.tuning.draw_runs", lambda **_: [0, 0])
    monkeypatch.setattr("fedllm.cli.tune.run_all", fail_one)
    monkeypatch.setattr("fedllm.cli.tune._score", lambda job: 0.5)
    done = CliRunner().invoke(app, ["tune", str(tmp_path / "file.toml"), "--dir", str(tmp_path / "out")])
    assert done.exit_code == 1, done.output
    assert "kept: " in done.output
    assert "failed: run 1, low, seed 1: the disk was full" in done.output


def test_a_file_is_no_folder_of_runs(tmp_path: Path) -> None:
    (tmp_path / "file.toml").write_text(FILE)
    (tmp_path / "out").write_text("")
    done = CliRunner().invoke(app, ["tune", str(tmp_path / "file.toml"), "--dir", str(tmp_path / "out")])
    assert "exists; a private choice starts anew" in str(done.exception)
