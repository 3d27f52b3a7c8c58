"""The parts of a codec's text: number formats and the choice of the largest entries.

A new number format is one class in ``formats.py`` and one entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedllm.wire.formats import BFloat16, Blocks, Float, NumberFormat


@dataclass(frozen=True, kw_only=True)
class Codec:
    """One part of a codec's text, as the command line lists it.

    Attributes
    ----------
    name, description : str
    bits : str
        Bits a number, scales included.
    lossy : bool
    purpose : str
        What it is for.
    format : NumberFormat or None
        None for ``topk``, which stands before a number format.
    """

    name: str
    description: str
    bits: str
    lossy: bool
    purpose: str
    format: NumberFormat | None


CODECS: Mapping[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec(
            name="float32",
            description="every number as it is",
            bits="32",
            lossy=False,
            purpose="whole adapters and exact runs",
            format=Float("float32", "F32", 4),
        ),
        Codec(
            name="float16",
            description="rounded to 11 significant bits; magnitudes of 6e-8 to 65504",
            bits="16",
            lossy=True,
            purpose="whole adapters, half the bytes",
            format=Float("float16", "F16", 2),
        ),
        Codec(
            name="bfloat16",
            description="rounded to 8 significant bits; the range of float32",
            bits="16",
            lossy=True,
            purpose="half the bytes where magnitudes vary widely",
            format=BFloat16("bfloat16", "U16", 2),
        ),
        Codec(
            name="int8",
            description="8-bit integers, one bfloat16 scale for 64 numbers",
            bits="8.25",
            lossy=True,
            purpose="updates, a quarter of the bytes",
            format=Blocks("int8", "U8", 1, 8),
        ),
        Codec(
            name="int4",
            description="4-bit integers, one bfloat16 scale for 64 numbers",
            bits="4.25",
            lossy=True,
            purpose="updates with error feedback, an eighth of the bytes",
            format=Blocks("int4", "U8", 1, 4),
        ),
        Codec(
            name="topk",
            description="topk:SHARE or topk:SHARE+FORMAT sends the largest entries, zeros for the rest",
            bits="SHARE x FORMAT + at most 1",
            lossy=True,
            purpose="updates with error feedback, never whole adapters",
            format=None,
        ),
    )
}
