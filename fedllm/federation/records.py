"""Flower records <-> notes and payloads, and their true size in bytes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from fedllm.errors import WireError

Note = str | int | float | bool | bytes | list[int] | list[float] | list[str] | list[bool] | list[bytes]
Notes = dict[str, Note]
#: Name -> bytes; ``adapter`` is the adapter, other names are digests of what sites keep.
Parts = Mapping[str, bytes]
ADAPTER = "adapter"
BASIS = "basis"
#: The note of a round's noise multiplier, where every site hides its own change.
SITE_NOISE = "site_noise"
_ARRAYS, _NOTES = "arrays", "notes"
_BYTES = "fedllm.bytes"


def pack(notes: Mapping[str, Note], parts: Parts | None = None) -> RecordDict:
    """Return a message content of notes and, where there are some, payloads."""
    content = RecordDict({_NOTES: ConfigRecord(dict(notes))})
    if parts:
        content[_ARRAYS] = ArrayRecord(
            {
                name: Array(dtype="uint8", shape=(len(data),), stype=_BYTES, data=data)
                for name, data in parts.items()
            }
        )
    return content


def unpack(content: RecordDict) -> tuple[Notes, dict[str, bytes]]:
    """Return the notes and payloads of a message content.

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
        return dict(notes), {}
    if not isinstance(arrays, ArrayRecord):
        raise WireError("the message carries no payloads where they are expected.")
    if any(array.stype != _BYTES or array.dtype != "uint8" for array in arrays.values()):
        raise WireError("a payload of the message is not of the agreed type.")
    return dict(notes), {name: array.data for name, array in arrays.items()}


def wire_size(content: RecordDict) -> int:
    """Return the bytes of a content as Flower serialises it."""
    return int(recorddict_to_proto(content).ByteSize())


def text(notes: Mapping[str, Note], key: str, *, limit: int = 500) -> str:
    """Return a text note of another party, cut to a length and freed of control characters."""
    value = notes.get(key, "")
    if not isinstance(value, str):
        raise WireError(f"the note '{key}' is not a text.")
    return "".join(char if char.isprintable() else " " for char in value)[:limit]


def number(notes: Mapping[str, Note], key: str) -> float | None:
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


def whole(notes: Mapping[str, Note], key: str, *, largest: int = 10**9) -> int:
    """Return a note of another party that has to be a whole number from 0 to ``largest``.

    Raises
    ------
    WireError
        If it is absent or anything else.
    """
    value = notes.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= largest:
        raise WireError(f"the note '{key}' is not a whole number from 0 to {largest}.")
    return value


def example_count(notes: Mapping[str, Note]) -> int:
    """Return the number of records a site says it trained on: its weight, so no more than can be true.

    Raises
    ------
    WireError
        If it is absent or not a whole number from 1.
    """
    count = whole(notes, "examples", largest=10**12)
    if not count:
        raise WireError("the note 'examples' is 0; a site without records has no weight.")
    return count


def amounts(notes: Mapping[str, Note], key: str, *, length: int) -> list[float] | None:
    """Return a note of another party that has to be ``length`` finite numbers from 0, None if it is absent.

    Raises
    ------
    WireError
        If it is anything else.
    """
    value = notes.get(key)
    if value is None:
        return None
    held = value if isinstance(value, list) else []
    found = [item for item in held if isinstance(item, float) and 0 <= item < np.inf]
    if not len(held) == len(found) == length:
        raise WireError(f"the note '{key}' is not a list of {length} finite numbers from 0.")
    return found


def numbers(notes: Mapping[str, Note], key: str) -> tuple[float, ...]:
    """Return a note of another party that has to be a list of finite numbers; empty if it is absent.

    Raises
    ------
    WireError
        If it is anything else.
    """
    value = notes.get(key, [])
    if not isinstance(value, list):
        raise WireError(f"the note '{key}' is not a list of finite numbers.")
    found = [item for item in value if isinstance(item, float) and np.isfinite(item)]
    if len(found) != len(value):
        raise WireError(f"the note '{key}' is not a list of finite numbers.")
    return tuple(found)


def texts(notes: Mapping[str, Note], key: str) -> list[str]:
    """Return a note of another party that has to be a list of texts; empty if it is absent."""
    value = notes.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise WireError(f"the note '{key}' is not a list of texts.")
    return [str(item) for item in value]
