"""Payloads that a site keeps by their hash, so that what has not changed is not sent again."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedllm.adapters.layers import Factors
from fedllm.adapters.state import AdapterSpec
from fedllm.errors import MismatchError, WireError
from fedllm.federation.memory import run_folder
from fedllm.federation.records import Parts

_RUNS = 4


def digest(payload: bytes) -> str:
    """Return the name of a payload: 32 hex digits of its sha256."""
    return hashlib.sha256(payload).hexdigest()[:32]


class BlobStore:
    """The payloads one run has sent a site, one file each, named by its digest.

    Runs at one site do not touch each other's payloads; those of the newest runs alone are kept.

    Parameters
    ----------
    folder : Path
        Of all runs.
    run : str
        The run's id, as the server sent it.

    Raises
    ------
    WireError
        If the id could name another folder.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self._folder = run_folder(folder, run)

    def take(self, names: Collection[str], parts: Parts) -> dict[str, bytes]:
        """Return the payloads with these names, sent now or kept from before; others are dropped.

        Raises
        ------
        MismatchError
            If one is neither in the message nor here.
        WireError
            If one that was sent is not what its name says.
        """
        found: dict[str, bytes] = {}
        for name in names:
            path = self._folder / name
            if name in parts:
                if digest(parts[name]) != name:
                    raise WireError("a payload is not the one its hash names.")
                found[name] = parts[name]
                self._make_folder()
                path.write_bytes(parts[name])
            elif len(name) == 32 and name.isalnum() and path.is_file():
                found[name] = path.read_bytes()
                if digest(found[name]) != name:
                    path.unlink()
                    raise MismatchError(
                        f"a kept payload {name[:12]} is damaged here; it has to be sent again."
                    )
            else:
                raise MismatchError(f"a kept payload {name[:12]} is missing here; send it again.")
        if self._folder.is_dir():
            # the runs that a site works on are those whose payloads were used last
            os.utime(self._folder)
            for path in self._folder.iterdir():
                if path.name not in found:
                    path.unlink()
        return found

    def _make_folder(self) -> None:
        """Make the run's folder; those of the runs that were used longest ago go."""
        if self._folder.is_dir():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        runs = [path for path in self._folder.parent.iterdir() if path.is_dir() and path != self._folder]
        for path in sorted(runs, key=lambda path: path.stat().st_mtime)[: -_RUNS + 1]:
            shutil.rmtree(path, ignore_errors=True)


def pack_factors(found: Factors) -> bytes:
    """Serialise low-rank updates of modules, float32."""
    tensors = {}
    for module, (up, down) in found.items():
        tensors[f"{module}.U"] = np.ascontiguousarray(up, dtype=np.float32)
        tensors[f"{module}.D"] = np.ascontiguousarray(down, dtype=np.float32)
    return save(tensors)


def read_factors(payload: bytes, spec: AdapterSpec) -> Factors:
    """Read low-rank updates; modules, shapes and numbers have to fit the spec.

    Raises
    ------
    WireError
        Saying what is wrong.
    """
    try:
        tensors = load(payload)
    except (SafetensorError, ValueError, KeyError):
        raise WireError("a low-rank update is damaged or truncated.") from None
    factors = {}
    for module, (out, into) in spec.shapes.items():
        up, down = tensors.pop(f"{module}.U", None), tensors.pop(f"{module}.D", None)
        if up is None and down is None:
            continue
        if (
            up is None
            or down is None
            or any(matrix.ndim != 2 or matrix.dtype != np.float32 for matrix in (up, down))
            or (up.shape[0], down.shape[1]) != (out, into)
            or up.shape[1] != down.shape[0]
        ):
            raise WireError(f"the low-rank update of {module} does not fit it.")
        if not (np.isfinite(up).all() and np.isfinite(down).all()):
            raise WireError(f"the low-rank update of {module} holds NaN or infinity.")
        factors[module] = (up, down)
    if tensors:
        raise WireError("a low-rank update names modules that are not adapted.")
    return factors


def join_factors(several: Collection[Factors]) -> Factors:
    """Return the sum of low-rank updates, by concatenation."""
    joined = {}
    for module in dict.fromkeys(module for factors in several for module in factors):
        pairs = [factors[module] for factors in several if module in factors]
        joined[module] = (np.hstack([up for up, _ in pairs]), np.vstack([down for _, down in pairs]))
    return joined
