"""Checkpoints of the server: one safetensors file a round, checked by its own hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.errors import RunError
from fedllm.runs.folder import RunFolder, atomic_write, write_error

KEEP_NEWEST = 3
KEEP_EVERY = 10
FORMAT = "fedllm-checkpoint-1"
_MOMENT = "moment/"


@dataclass(frozen=True)
class Checkpoint:
    """The adapter after a round.

    Attributes
    ----------
    round : int
        The last finished round.
    state : AdapterState
        The federation's adapter.
    extra : Mapping[str, str]
        What else a strategy needs to go on.
    moments : Mapping[str, ndarray]
        What the server optimiser remembers, float64.
    """

    round: int
    state: AdapterState
    extra: Mapping[str, str]
    moments: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """Return the sha256 over round, spec, extra and every matrix with name and shape, as hex."""
    digest = hashlib.sha256()
    head = [FORMAT, checkpoint.round, checkpoint.state.spec.to_json(), sorted(checkpoint.extra.items())]
    layout = [[key, list(shape)] for key, shape in checkpoint.state.layout.items()]
    digest.update(json.dumps([head, layout], separators=(",", ":")).encode())
    for matrix in checkpoint.state.tensors.values():
        digest.update(matrix.astype("<f4", copy=False).tobytes())
    for name, moment in sorted(checkpoint.moments.items()):
        digest.update(f"{name} {list(moment.shape)}\n".encode())
        digest.update(moment.astype("<f8", copy=False).tobytes())
    return digest.hexdigest()


def save_checkpoint(folder: RunFolder, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, then drop the ones no longer needed.

    The newest three stay, and those of every tenth round. Checkpoints of later rounds go: they
    belong to rounds that a resume has given up.

    Returns
    -------
    Path
        ``checkpoints/round-<4 digits>.safetensors``.

    Raises
    ------
    RunError
        If it cannot be written; older checkpoints are then all still there.
    """
    state = checkpoint.state
    metadata = {
        "format": FORMAT,
        "round": str(checkpoint.round),
        "spec": state.spec.to_json(),
        "extra": json.dumps(dict(checkpoint.extra)),
        # safetensors sorts its tensors; the order of the state is part of its meaning.
        "keys": json.dumps(list(state.tensors)),
        "sha256": checkpoint_digest(checkpoint),
    }
    path = folder.checkpoints_dir / f"round-{checkpoint.round:04d}.safetensors"
    moments = {f"{_MOMENT}{name}": np.ascontiguousarray(m) for name, m in checkpoint.moments.items()}
    atomic_write(path, save({**state.tensors, **moments}, metadata=metadata))
    _prune(folder, newest=checkpoint.round)
    return path


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint and check it against its hash.

    Raises
    ------
    RunError
        If the file is missing or damaged, naming it and what is wrong.
    """
    file = Path(path)
    try:
        with safe_open(file, framework="np") as stream:
            metadata = stream.metadata() or {}
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise RunError(f"{file}: no such checkpoint.") from None
    except SafetensorError:
        raise _damaged(file, "it is truncated or not a safetensors file") from None
    except OSError as error:
        raise RunError(
            f"{file}: cannot be read: {(error.strerror or 'input/output error').lower()}."
        ) from None
    except (TypeError, ValueError, KeyError, AttributeError):
        # A flipped bit in the header can name a number format numpy does not have.
        raise _damaged(file, "its header is unreadable") from None
    try:
        keys: list[str] = json.loads(metadata["keys"])
        moments = {
            key.removeprefix(_MOMENT): tensors.pop(key) for key in list(tensors) if key.startswith(_MOMENT)
        }
        if metadata["format"] != FORMAT:
            raise _damaged(file, f"its format is '{metadata['format']}', expected '{FORMAT}'")
        if sorted(keys) != sorted(tensors):
            raise _damaged(file, "its matrices are not those its header lists")
        if any(matrix.dtype != np.float32 for matrix in tensors.values()):
            raise _damaged(file, "a matrix is not float32")
        spec = AdapterSpec.from_json(metadata["spec"])
        state = AdapterState(spec, {key: tensors[key] for key in keys})
        extra = dict(json.loads(metadata["extra"]))
        checkpoint = Checkpoint(int(metadata["round"]), state, extra, moments)
        intact = checkpoint_digest(checkpoint) == metadata["sha256"]
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError):
        raise _damaged(file, "its header is unreadable") from None
    if not intact:
        raise _damaged(file, "its content does not match its sha256")
    return checkpoint


def latest_checkpoint(folder: RunFolder) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """Return the newest intact checkpoint (None when there is none) and a warning a damaged one."""
    warnings: list[str] = []
    for path in reversed(_by_round(folder).values()):
        try:
            return load_checkpoint(path), tuple(warnings)
        except RunError as error:
            warnings.append(str(error))
    return None, tuple(warnings)


def kept_extras(folder: RunFolder) -> list[dict[str, str]]:
    """Return ``extra`` of every checkpoint that is kept, from its header alone; nothing of a damaged one."""
    found = []
    for path in _by_round(folder).values():
        with suppress(SafetensorError, OSError, ValueError, KeyError), safe_open(path, "np") as stream:
            found.append(dict(json.loads((stream.metadata() or {})["extra"])))
    return found


def _by_round(folder: RunFolder) -> dict[int, Path]:
    """Return round -> file, in order of rounds."""
    named = re.compile(r"round-(\d+)\.safetensors")
    found = [
        (named.fullmatch(path.name), path) for path in folder.checkpoints_dir.glob("round-*.safetensors")
    ]
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def _prune(folder: RunFolder, *, newest: int) -> None:
    files = _by_round(folder)
    rounds = [number for number in files if number <= newest]
    keep = {*rounds[-KEEP_NEWEST:], *(number for number in rounds if number % KEEP_EVERY == 0)}
    for number, path in files.items():
        if number not in keep:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise write_error(path, error) from None


def _damaged(file: Path, reason: str) -> RunError:
    return RunError(
        f"{file}: damaged checkpoint: {reason}. Other rounds are separate files and keep their own "
        "hashes; run.resume takes the newest intact one."
    )
