"""What the coordinator remembers of each site's privacy ledger, against rollback."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedllm.errors import RunError
from fedllm.home import home
from fedllm.runs.folder import atomic_write, write_error

_FILE = "ledger_heads.json"


class LedgerHeads:
    """The newest hash of each site's ledger that this coordinator has seen.

    Real sites' hashes outlive the run: a ledger goes on over runs. A simulated site has a ledger
    a run.

    Parameters
    ----------
    folder : Path
        The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def seen(self, tag: str, *, simulated: bool) -> str:
        """Return the newest hash seen of a ledger, empty if there is none."""
        return self._read(simulated).get(tag, "")

    def note(self, tag: str, head: str, *, simulated: bool) -> None:
        """Remember a hash."""
        if not head:
            return
        path = self._path(simulated)
        # coordinators of one home share the file: what another notes meanwhile must not be lost
        with _alone(path):
            heads = self._read(simulated) | {tag: head}
            atomic_write(path, json.dumps(heads, indent=1, sort_keys=True).encode())

    def _path(self, simulated: bool) -> Path:
        return (self._folder if simulated else home()) / _FILE

    def _read(self, simulated: bool) -> dict[str, str]:
        path = self._path(simulated)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path}: not readable ({error}); restore it, or remove it to start anew."
            ) from None
        return {str(tag): str(head) for tag, head in found.items()}


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process changes a file, and keep it so; the lock ends with the process.

    The lock is on a file beside it, since the file itself is replaced.

    Raises
    ------
    RunError
        If the folder cannot be written.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    except OSError as error:
        raise write_error(lock, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise write_error(lock, error) from None
        yield
