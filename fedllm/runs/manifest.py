"""The manifest: which versions, seeds, settings and data made a run's numbers."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedllm.config import Config
from fedllm.errors import RunError
from fedllm.runs.events import read_events
from fedllm.runs.folder import RunFolder, atomic_write, load_config

PACKAGES = ("fedllm", "torch", "flwr", "transformers", "peft", "opacus", "dp-accounting", "numpy")
#: What every manifest has, of whatever version.
_ALWAYS = {"time", "versions", "config_sha256", "simulated", "data"}


def versions() -> dict[str, str]:
    """Return the version of Python and of every package that shapes a result."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def config_digest(config: Config) -> str:
    """Return the sha256 of all settings as canonical JSON, as hex; where the run lies does not count."""
    settings = config.replace(run__dir="", run__resume="").to_flat()
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(
    folder: RunFolder,
    *,
    config: Config,
    model: Mapping[str, str],
    data: Mapping[str, str],
    simulated: bool,
) -> Path:
    """Write ``manifest.json``. It names no host and no path of this machine.

    ``versions`` are those of the session that ended the run, ``earlier_versions`` what others before had.

    Parameters
    ----------
    folder : RunFolder
        The run.
    config : Config
        Its settings.
    model : Mapping[str, str]
        What identifies the base model, such as name and weights hash.
    data : Mapping[str, str]
        Site -> fingerprint of its data; empty where the site withholds it.
    simulated : bool
        Whether the sites ran on one machine.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    now = versions()
    manifest = {
        "schema": 1,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": now,
        "earlier_versions": _earlier(folder, now),
        "commit": _commit(),
        "platform": {
            "system": platform.system(),
            "machine": platform.machine(),
            "cpus": len(os.sched_getaffinity(0)),
        },
        "seeds": {"run.seed": config.run.seed},
        "config_sha256": config_digest(config),
        "simulated": simulated,
        "model": dict(model),
        "data": dict(data),
    }
    atomic_write(folder.manifest_file, json.dumps(manifest, indent=2).encode() + b"\n")
    return folder.manifest_file


def read_manifest(folder: RunFolder) -> dict[str, Any] | None:
    """Return the manifest, or None when the run has not written it yet.

    Raises
    ------
    RunError
        If the file is not a manifest.
    """
    try:
        manifest = json.loads(folder.manifest_file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise RunError(f"{folder.manifest_file}: not a readable manifest; restore or remove it.") from None
    if not isinstance(manifest, dict) or not manifest.keys() >= _ALWAYS:
        raise RunError(f"{folder.manifest_file}: not a manifest; restore or remove it.")
    return manifest


def settings_of(folder: RunFolder) -> Config:
    """Return a run's settings as its sites had them: real ones have files of their own, whatever is named.

    Raises
    ------
    RunError
        If settings or manifest cannot be read.
    """
    config, manifest = load_config(folder), read_manifest(folder)
    if manifest is None or manifest["simulated"]:
        return config
    data = replace(config.data, source="file", path="", name="", subset="", partition="iid", site="")
    return replace(config, data=data)


def _earlier(folder: RunFolder, now: Mapping[str, str]) -> dict[str, str]:
    """Return where a run that was resumed had other versions before, and which."""
    found = {}
    for event in read_events(folder):
        if event["event"] in ("run_started", "run_resumed"):
            held = event["versions"]
            other = [f"{name} {text}" for name, text in (held or {}).items() if now.get(name) != text]
            if other or held is None:
                found[f"from round {event.get('round', 1)}"] = ", ".join(other) or "not recorded"
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """Return the commit of the checkout fedllm runs from (``-dirty`` when changed), or ''."""
    here = Path(__file__)
    # An installed fedllm may lie inside somebody else's checkout: only one that tracks it counts.
    tracked = _git(here.parent, "ls-files", "--error-unmatch", here.name)
    return tracked and _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
