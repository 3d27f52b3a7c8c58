"""Adapter state <-> bytes.

Both sides know the layout (it follows from the spec they agreed on when the site joined), so a
payload is one flat vector and a short header: a safetensors file with a single tensor. The
header carries the codec and the digest of spec and layout; names travel once, when a site joins.
The header is written here and not by the safetensors package, which orders its keys at random: equal
states give equal bytes.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np

from fedllm.adapters.state import AdapterSpec, AdapterState, Layout, Matrix
from fedllm.errors import ConfigError, WireError
from fedllm.wire.chain import Chain, parse_codec
from fedllm.wire.formats import Vector

_HEADER = 4096
# no codec needs more than every float32 and a bit for its position
_LARGEST = parse_codec("topk:1")


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
    ConfigError
        If there is no such codec.
    """
    chain = parse_codec(codec)
    packed = chain.pack(np.concatenate([value.ravel() for value in state.tensors.values()]))
    metadata = {"codec": chain.name, "layout": layout_digest(state.spec, state.layout)}
    header = {"__metadata__": metadata, "adapter": _entry(chain, packed.nbytes)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, packed.data])


def decode(payload: bytes, *, spec: AdapterSpec, layout: Layout, codec: str | None = None) -> AdapterState:
    """Read a payload that must hold exactly this layout.

    Nothing in the payload decides how much memory is taken: its size must be the one that codec
    and layout give, and its header short, before anything is parsed.

    Parameters
    ----------
    payload : bytes
    spec, layout
        What the two sides agreed on.
    codec : str, optional
        The only codec accepted; None accepts any.

    Raises
    ------
    WireError
        Saying what is wrong: size, format, codec, layout, or numbers that are not finite.
    ConfigError
        If there is no codec of the name given by the caller.
    """
    count = sum(int(np.prod(shape)) for shape in layout.values())
    agreed = None if codec is None else parse_codec(codec)
    limit = (agreed or _LARGEST).size(count) + _HEADER
    if len(payload) > limit:
        raise WireError(f"oversized payload: {len(payload)} bytes, at most {limit} are possible.")
    length = int.from_bytes(payload[:8], "little")
    header = _read_header(payload, length)
    metadata = header["__metadata__"]
    chain = _read_codec(metadata.get("codec"), agreed)
    if metadata.get("layout") != layout_digest(spec, layout):
        raise WireError("the payload's matrices are not those agreed on (other names, shapes or spec).")
    size = chain.size(count)
    if header["adapter"] != _entry(chain, size):
        raise WireError(f"the payload does not hold one adapter vector of {size} bytes.")
    if len(payload) != 8 + length + size:
        raise WireError(f"the payload holds {len(payload) - 8 - length} bytes of numbers, expected {size}.")
    vector = chain.unpack(np.frombuffer(payload, np.uint8, offset=8 + length), count)
    return AdapterState(spec, _split(vector, layout))


def _entry(chain: Chain, size: int) -> dict[str, object]:
    return {"dtype": chain.dtype, "shape": [size // chain.item], "data_offsets": [0, size]}


def _read_header(payload: bytes, length: int) -> dict[str, dict[str, object]]:
    """Return the two tables of a header: ``__metadata__`` and ``adapter``, and no others."""
    # JSON takes up to thirty times its length in memory, so a long header is not parsed at all
    if length > min(_HEADER, len(payload) - 8):
        raise WireError("the payload is not a readable adapter (damaged or truncated).")
    try:
        header = json.loads(payload[8 : 8 + length].decode())
    except (ValueError, RecursionError):
        raise WireError("the payload is not a readable adapter (damaged or truncated).") from None
    if not isinstance(header, dict) or header.keys() != {"__metadata__", "adapter"}:
        raise WireError("the payload does not hold one adapter vector and its codec.")
    if not isinstance(header["__metadata__"], dict):
        raise WireError("the payload's header has no table of codec and layout.")
    return header


def _read_codec(name: object, agreed: Chain | None) -> Chain:
    """Return the codec a payload names; its text is never quoted, for it is the peer's."""
    try:
        chain = parse_codec(str(name))
    except ConfigError:
        raise WireError("the payload names no known codec.") from None
    if agreed is not None and chain != agreed:
        raise WireError(f"the payload was made with {chain.name}; {agreed.name} was agreed on.")
    return chain


def _split(vector: Vector, layout: Layout) -> dict[str, Matrix]:
    tensors: dict[str, Matrix] = {}
    start = 0
    for key, shape in layout.items():
        stop = start + int(np.prod(shape))
        tensors[key] = vector[start:stop].reshape(shape)
        start = stop
    return tensors
