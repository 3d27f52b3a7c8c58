"""What the coordinator remembers of each site's privacy ledger, against rollback."""

from __future__ import annotations

import json
from pathlib import Path

from fedllm.errors import RunError
from fedllm.home import home
from fedllm.runs.folder import atomic_write

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
        if head:
            heads = self._read(simulated) | {tag: head}
            atomic_write(self._path(simulated), json.dumps(heads, indent=1, sort_keys=True).encode())

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
