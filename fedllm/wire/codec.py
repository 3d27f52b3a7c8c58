"""Adapter state <-> bytes.

Both sides know the layout (it follows from the spec they agreed on when the site joined), so a
payload is one flat vector and a short header: a safetensors file with a single tensor. The
header carries the digest of spec and layout; names travel once, when a site joins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from fedllm.adapters.state import AdapterSpec, AdapterState, Layout, Matrix
from fedllm.errors import WireError

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Codec:
    """A number format: float32 vector -> stored array and back.

    Attributes
    ----------
    dtype : str
        Name of the stored type in the safetensors header.
    item : int
        Bytes a number.
    """

    name: str
    dtype: str
    item: int
    pack: Callable[[Vector], npt.NDArray[np.generic]]
    unpack: Callable[[bytes], Vector]


def _to_bfloat16(vector: Vector) -> npt.NDArray[np.uint16]:
    """Round to nearest even on the upper 16 bits; NaN stays NaN."""
    bits = vector.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(vector), np.uint16(0x7FC0), rounded)


def _from_bfloat16(data: bytes) -> Vector:
    return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)


CODECS: Mapping[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("float32", "F32", 4, lambda v: v, lambda b: np.frombuffer(b, dtype="<f4")),
        Codec(
            "float16",
            "F16",
            2,
            lambda v: v.astype(np.float16),
            lambda b: np.frombuffer(b, dtype="<f2").astype(np.float32),
        ),
        Codec("bfloat16", "U16", 2, _to_bfloat16, _from_bfloat16),
    )
}


def layout_digest(spec: AdapterSpec, layout: Layout) -> str:
    """Return 16 hex digits that name a spec and its layout."""
    text = spec.to_json() + json.dumps([[key, list(shape)] for key, shape in layout.items()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encode(state: AdapterState, *, codec: str) -> bytes:
    """Serialise a state.

    Raises
    ------
    WireError
        If a number is not finite, or does not fit the codec's range.
    """
    vector = np.concatenate([value.ravel() for value in state.tensors.values()])
    if not np.isfinite(vector).all():
        raise WireError("an adapter matrix holds NaN or infinity; it is not sent.")
    with np.errstate(over="ignore"):
        packed = CODECS[codec].pack(vector)
    if codec == "float16" and not np.isfinite(packed.astype(np.float32)).all():
        raise WireError("an adapter matrix exceeds the range of float16; use wire.codec=bfloat16.")
    header = {"codec": codec, "layout": layout_digest(state.spec, state.layout)}
    return save({"adapter": packed}, metadata=header)


def decode(payload: bytes, *, spec: AdapterSpec, layout: Layout) -> AdapterState:
    """Read a payload that must hold exactly this layout.

    Nothing in the payload decides how much memory is taken: its size must be the one the layout
    gives before anything is parsed.

    Raises
    ------
    WireError
        Saying what is wrong: size, format, codec, layout, or numbers that are not finite.
    """
    count = sum(int(np.prod(shape)) for shape in layout.values())
    limit = 4 * count + 4096
    if len(payload) > limit:
        raise WireError(f"oversized payload: {len(payload)} bytes, at most {limit} are possible.")
    try:
        length = int.from_bytes(payload[:8], "little")
        metadata = json.loads(payload[8 : 8 + length]).get("__metadata__", {})
        tensors = deserialize(payload)  # type: ignore[no-untyped-call]
    except (SafetensorError, ValueError, AttributeError, RecursionError):
        raise WireError("the payload is not a readable adapter (damaged or truncated).") from None
    if not isinstance(metadata, dict):
        raise WireError("the payload has no header.")
    codec = CODECS.get(str(metadata.get("codec")))
    if codec is None:
        raise WireError("the payload names no known codec.")
    if metadata.get("layout") != layout_digest(spec, layout):
        raise WireError("the payload's matrices are not those agreed on (other names, shapes or spec).")
    if len(tensors) != 1 or tensors[0][0] != "adapter" or tensors[0][1]["dtype"] != codec.dtype:
        raise WireError("the payload does not hold one adapter vector.")
    data = bytes(tensors[0][1]["data"])
    if len(data) != codec.item * count:
        raise WireError(f"the payload holds {len(data)} bytes of numbers, expected {codec.item * count}.")
    vector = codec.unpack(data)
    if not np.isfinite(vector).all():
        raise WireError("NaN or infinity in the adapter.")
    return AdapterState(spec, _split(vector, layout))


def _split(vector: Vector, layout: Layout) -> dict[str, Matrix]:
    tensors: dict[str, Matrix] = {}
    start = 0
    for key, shape in layout.items():
        stop = start + int(np.prod(shape))
        tensors[key] = vector[start:stop].reshape(shape)
        start = stop
    return tensors
