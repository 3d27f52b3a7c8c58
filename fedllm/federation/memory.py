"""What a site keeps from round to round: personal matrices, what a codec left out, open sketches."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.errors import WireError

_KEEP = 4


def run_folder(folder: Path, run: str) -> Path:
    """Return the folder of one run.

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
    if not re.fullmatch(r"[0-9a-f]{1,32}", run):
        raise WireError("the run's id is not of the agreed form.")
    return folder / run


class SiteMemory:
    """Named adapter states of one run at one site, a file a round.

    A state is read back from an earlier round only, so that a round which is repeated after a crash
    starts from what it started from before.

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

    def save(self, name: str, round: int, state: AdapterState) -> None:
        """Keep a state as it is after a round; the oldest ones go."""
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".{name}.tmp"
        save_file({key: np.array(value) for key, value in state.tensors.items()}, temporary)
        temporary.replace(self._path(name, round))
        for old in self._rounds(name)[:-_KEEP]:
            self._path(name, old).unlink(missing_ok=True)

    def load(self, name: str, spec: AdapterSpec, *, round: int, before: int = 10**9) -> AdapterState | None:
        """Return what was kept of a round or, with round 0, of the newest one before another.

        None if nothing was, or if its file is damaged.
        """
        held = [kept for kept in self._rounds(name) if kept < before and round in (0, kept)]
        if not held:
            return None
        try:
            return AdapterState(spec, load_file(self._path(name, held[-1])))
        except SafetensorError:
            return None

    def _path(self, name: str, round: int) -> Path:
        return self._folder / f"{name}-{round:06d}.safetensors"

    def _rounds(self, name: str) -> list[int]:
        files = self._folder.glob(f"{name}-*.safetensors")
        return sorted(int(path.stem.rpartition("-")[2]) for path in files)
