"""What a site keeps from round to round: personal matrices, what a codec left out, open sketches."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.errors import RunError, WireError
from fedllm.runs.checkpoints import KEEP_EVERY
from fedllm.runs.folder import atomic_write

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
        """Keep a state as it is after a round.

        Those of later rounds go: they belong to rounds that a resume has given up. Of the earlier ones
        stay all that the server may go on from: it keeps its newest checkpoints and every tenth.

        Raises
        ------
        RunError
            If it cannot be written.
        """
        tensors = {key: np.array(value) for key, value in state.tensors.items()}
        atomic_write(self._path(name, round), save(tensors))
        found = self._rounds(name)
        held = [kept for kept in found if kept <= round]
        last_of_ten = {(kept - 1) // KEEP_EVERY: kept for kept in held}.values()
        for other in {*found} - {*held[-_KEEP:], *last_of_ten}:
            self._path(name, other).unlink(missing_ok=True)

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

    def require(self, name: str, spec: AdapterSpec, *, before: int) -> AdapterState | None:
        """Return what was kept of the newest round before another; None if the site has kept nothing yet.

        Raises
        ------
        RunError
            If that file is damaged or gone: the site would go on from nothing, and nobody would know.
        """
        kept = self.load(name, spec, round=0, before=before)
        others = [round for round in self._rounds(name) if round != before]
        if kept is not None or before == 1 or not others:
            return kept
        earlier = [round for round in others if round < before]
        path = self._path(name, (earlier or others)[-1])
        what = "is damaged" if earlier else f"is of a later round, and those before round {before} are gone"
        raise RunError(
            f"{path} {what}: this site's own matrices ({name}) cannot be gone on from. Restore them from a "
            f"backup, or delete {name}-*.safetensors there to let the site start from new ones."
        )

    def _path(self, name: str, round: int) -> Path:
        return self._folder / f"{name}-{round:06d}.safetensors"

    def _rounds(self, name: str) -> list[int]:
        files = self._folder.glob(f"{name}-*.safetensors")
        return sorted(int(path.stem.rpartition("-")[2]) for path in files)
