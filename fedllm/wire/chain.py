"""Codecs by name: a number format, alone or behind a choice of the largest entries.

``float32``, ``int8``, ``topk:0.25`` (float32 values), ``topk:0.25+int8``.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from fedllm.errors import ConfigError, WireError
from fedllm.wire.formats import BLOCK, Bytes, Integers, NumberFormat, Stored, Vector
from fedllm.wire.registry import CODECS
from fedllm.wire.sparse import largest, pack_positions, positions_size, stretches, unpack_positions

_FORMATS = {name: codec.format for name, codec in CODECS.items() if codec.format is not None}
_SHARE = re.compile(r"0?\.[0-9]{1,4}|1(\.0{1,4})?")
_ALLOWED = (
    f"Allowed: {', '.join(_FORMATS)}, topk:SHARE, topk:SHARE+FORMAT (such as topk:0.25+int8) "
    "with a SHARE above 0, up to 1, of at most four decimals."
)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A codec ready for use; made by :func:`parse_codec`.

    Attributes
    ----------
    format : NumberFormat
    share : Fraction or None
        Share of the entries that travel; None: all of them, and no positions.
    """

    format: NumberFormat
    share: Fraction | None = None

    @property
    def name(self) -> str:
        """Return the codec's text in its one canonical form, which headers carry."""
        if self.share is None:
            return self.format.name
        values = "" if self.format.name == "float32" else f"+{self.format.name}"
        return f"topk:{float(self.share):g}{values}"

    @property
    def dtype(self) -> str:
        """Return the name of the stored type in a safetensors header."""
        return self.format.dtype if self.share is None else "U8"

    @property
    def item(self) -> int:
        """Return the bytes of one stored element."""
        return self.format.item if self.share is None else 1

    def size(self, count: int) -> int:
        """Return the exact bytes of the numbers (and positions) for ``count`` values."""
        if self.share is None:
            return self.format.size(count)
        kept = math.ceil(self.share * count)
        return positions_size(count, kept) + self.format.size(kept)

    def pack(self, vector: Vector) -> Stored:
        """Return the stored form of a vector of shape (n,).

        Raises
        ------
        WireError
            If a number is not finite or exceeds the format's range.
        """
        if not np.isfinite(vector).all():
            raise WireError("an adapter matrix holds NaN or infinity; it is not sent.")
        if self.share is None:
            return self.format.pack(vector, _runs(vector.size))
        positions = largest(vector, math.ceil(self.share * vector.size))
        blocks = stretches(positions, vector.size, -(-positions.size // BLOCK))
        values = self.format.pack(vector[positions], blocks)
        return np.concatenate([pack_positions(positions, vector.size), values.view(np.uint8)])

    def unpack(self, data: Bytes, count: int) -> Vector:
        """Return the vector of shape (count,) that :meth:`size` bytes stand for.

        Raises
        ------
        WireError
            If the bytes are none that :meth:`pack` makes, or a number is not finite.
        """
        if self.share is None:
            vector = self.format.unpack(data, _runs(count))
        else:
            kept = math.ceil(self.share * count)
            start = positions_size(count, kept)
            positions = unpack_positions(data[:start], count, kept)
            vector = np.zeros(count, np.float32)
            blocks = stretches(positions, count, -(-kept // BLOCK))
            vector[positions] = self.format.unpack(data[start:], blocks)
        if not np.isfinite(vector).all():
            raise WireError("NaN or infinity in the adapter.")
        return vector


def parse_codec(text: str) -> Chain:
    """Return the codec that a text names; this is also the check of a setting.

    Raises
    ------
    ConfigError
        If it names none, with the nearest that exists and all that is allowed.

    Examples
    --------
    >>> parse_codec("topk:0.250+int8").name
    'topk:0.25+int8'
    """
    head, plus, values = text.partition("+")
    first, _, share = head.partition(":")
    if text in _FORMATS:
        return Chain(format=_FORMATS[text])
    known = _FORMATS.get(values if plus else "float32")
    if known and first == "topk" and _share(share):
        return Chain(format=known, share=_share(share))
    raise ConfigError(f"unknown codec '{text}'{_near(first, share, values)} {_ALLOWED}")


def is_lossless(codec: str) -> bool:
    """Tell whether what is decoded is bit for bit what was encoded: for ``float32`` alone."""
    chain = parse_codec(codec)
    return chain.share is None and not CODECS[chain.format.name].lossy


def expected_bytes(codec: str, count: int) -> int:
    """Return the exact bytes of the numbers section for ``count`` numbers, header excluded."""
    return parse_codec(codec).size(count)


def compress(vector: Vector, codec: str) -> Vector:
    """Return what the other side will see of a float32 vector of shape (n,), as a new array.

    Raises
    ------
    WireError
        If a number is not finite or exceeds the codec's range.
    """
    chain = parse_codec(codec)
    return chain.unpack(chain.pack(vector).view(np.uint8), vector.size).copy()


def _runs(count: int) -> Integers:
    return np.minimum(BLOCK, count - np.arange(0, count, BLOCK))


def _share(text: str) -> Fraction | None:
    return Fraction(text) or None if _SHARE.fullmatch(text) else None


def _near(first: str, share: str, values: str) -> str:
    sparse = f"topk:{share if _share(share) else '0.25'}"
    choices = {name: name for name in _FORMATS} | {"topk": sparse}
    head = difflib.get_close_matches(first, choices, n=1)
    if not head:
        return "."
    if head[0] != "topk":
        return f"; did you mean {head[0]}?"
    tail = difflib.get_close_matches(values, _FORMATS, n=1)
    return f"; did you mean {sparse}{'+' + tail[0] if tail else ''}?"
