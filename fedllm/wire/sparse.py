"""Which entries of a vector are sent, and how their positions travel.

Positions are a bitmap or ascending 32-bit indices, whichever is smaller for the count and the number
kept; both sides know these two, so nothing says which. Source: FLASC (arXiv 2406.05233), top-k by
magnitude over all entries at once.
"""

from __future__ import annotations

import numpy as np

from fedllm.errors import WireError
from fedllm.wire.formats import Bytes, Integers, Vector


def largest(vector: Vector, kept: int) -> Integers:
    """Return the ascending positions of the entries of largest magnitude.

    Parameters
    ----------
    vector : float32 array, shape (n,)
    kept : int
        How many, 1 to n. Among equal magnitudes the lower index wins.
    """
    magnitude = np.abs(vector)
    least = np.partition(magnitude, vector.size - kept)[vector.size - kept]
    chosen = magnitude > least
    ties = np.flatnonzero(magnitude == least)
    chosen[ties[: kept - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen)


def positions_size(count: int, kept: int) -> int:
    """Return the bytes that ``kept`` positions of ``count`` take."""
    return min(-(-count // 8), 4 * kept)


def pack_positions(positions: Integers, count: int) -> Bytes:
    """Return ascending positions below ``count`` (itself at most 2**32) as bytes."""
    if _is_bitmap(count, positions.size):
        chosen = np.zeros(count, bool)
        chosen[positions] = True
        return np.packbits(chosen)
    return positions.astype("<u4").view(np.uint8)


def unpack_positions(data: Bytes, count: int, kept: int) -> Integers:
    """Return the positions that ``positions_size`` bytes name.

    Raises
    ------
    WireError
        If they are not ``kept`` strictly ascending positions below ``count``.
    """
    if _is_bitmap(count, kept):
        if int(np.bitwise_count(data).sum(dtype=np.int64)) != kept:
            raise WireError(f"the bitmap of the payload does not mark {kept} positions.")
        positions = np.flatnonzero(np.unpackbits(data))
    else:
        positions = data.view("<u4").astype(np.int64)
        if (positions[1:] <= positions[:-1]).any():
            raise WireError("the positions of the payload are not strictly ascending.")
    if positions[-1] >= count:
        raise WireError(f"a position of the payload is not below {count}.")
    return positions


def stretches(positions: Integers, count: int, number: int) -> Integers:
    """Return how many positions fall in each of ``number`` equal stretches of the whole vector.

    They are the blocks of values that share a scale. Cut by place and not by every 64 kept values, a block
    stays the same when some of its values round to zero and others take their place among the kept:
    encoding what was decoded changes nothing.
    """
    width = -(-count // number)
    return np.diff(np.searchsorted(positions, np.arange(number + 1) * width))


def _is_bitmap(count: int, kept: int) -> bool:
    return -(-count // 8) <= 4 * kept
