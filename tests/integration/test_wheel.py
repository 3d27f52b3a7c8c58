"""The wheel: what is in it, and that it works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pip(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT))
    (found,) = folder.glob("fedllm-*.whl")
    return found


def test_only_the_two_packages_are_importable(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fedllm", "strategies"}
    recipes = {path.relative_to(ROOT / "recipes").as_posix() for path in (ROOT / "recipes").rglob("*.toml")}
    assert {n.removeprefix("fedllm/_share/recipes/") for n in names if "_share/recipes/" in n} == recipes
    assert "fedllm/_share/apps/finetune/pyproject.toml" in names


def test_it_runs_a_recipe_away_from_the_checkout(wheel: Path, tmp_path: Path, fedllm_home: Path) -> None:
    target = tmp_path / "installed"
    pip("install", "--quiet", "--no-deps", "--target", str(target), str(wheel))
    done = subprocess.run(
        [sys.executable, "-m", "fedllm.cli.app", "run", "demo/smoke", "--engine", "process",
         f"run.dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target), "FEDLLM_HOME": str(fedllm_home)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "report.html").is_file()
