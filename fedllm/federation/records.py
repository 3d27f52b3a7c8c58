"""Flower records <-> payload and notes, and their true size in bytes."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from fedllm.errors import WireError

Note = str | int | float | bool | bytes | list[int] | list[float] | list[str] | list[bool] | list[bytes]
_ARRAYS, _NOTES, _PAYLOAD = "arrays", "notes", "payload"
_BYTES = "fedllm.bytes"


def pack(notes: dict[str, Note], payload: bytes | None = None) -> RecordDict:
    """Return a message content of notes and, where there is one, an encoded adapter."""
    content = RecordDict({_NOTES: ConfigRecord(notes)})
    if payload is not None:
        array = Array(dtype="uint8", shape=(len(payload),), stype=_BYTES, data=payload)
        content[_ARRAYS] = ArrayRecord({_PAYLOAD: array})
    return content


def unpack(content: RecordDict) -> tuple[dict[str, Note], bytes | None]:
    """Return the notes and payload of a message content.

    Raises
    ------
    WireError
        If the content is not of the form :func:`pack` makes.
    """
    notes = content.get(_NOTES)
    if not isinstance(notes, ConfigRecord):
        raise WireError("the message carries no notes.")
    arrays = content.get(_ARRAYS)
    if arrays is None:
        return dict(notes), None
    if not isinstance(arrays, ArrayRecord) or list(arrays) != [_PAYLOAD]:
        raise WireError("the message carries other arrays than one payload.")
    array = arrays[_PAYLOAD]
    if array.stype != _BYTES or array.dtype != "uint8":
        raise WireError("the message's payload is not of the agreed type.")
    return dict(notes), array.data


def wire_size(content: RecordDict) -> int:
    """Return the bytes of a content as Flower serialises it."""
    return len(recorddict_to_proto(content).SerializeToString())


def text(notes: dict[str, Note], key: str, *, limit: int = 500) -> str:
    """Return a text note of another party, cut to a length and freed of control characters."""
    value = notes.get(key, "")
    if not isinstance(value, str):
        raise WireError(f"the note '{key}' is not a text.")
    return "".join(char if char.isprintable() else " " for char in value)[:limit]


def number(notes: dict[str, Note], key: str) -> float | None:
    """Return a finite number note of another party, None if it is absent.

    Raises
    ------
    WireError
        If it is not a finite number.
    """
    value = notes.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise WireError(f"the note '{key}' is not a finite number.")
    return float(value)
