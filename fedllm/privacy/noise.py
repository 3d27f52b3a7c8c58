"""The two laws of noise: Gaussian, and discrete Gaussian on a grid."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedllm.privacy.entropy import SecureGenerator

#: The discrete Gaussian's deviation in grid steps is 2 to this power.
GRID_BITS = 24

Bools = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]


def gaussian(
    shape: tuple[int, ...], *, deviation: float, generator: SecureGenerator
) -> npt.NDArray[np.float64]:
    """Return independent Gaussian numbers, float64."""
    return deviation * generator.normal(shape)


def discrete_gaussian(
    shape: tuple[int, ...], *, generator: SecureGenerator, bits: int = GRID_BITS
) -> Integers:
    """Return integers y with probabilities in proportion to ``exp(-y^2 / (2 * 4^bits))``, exactly.

    Rejection from the discrete Laplace law with integer arithmetic alone (Canonne, Kamath and
    Steinke, arXiv 2004.00010, algorithms 1 to 3, with t = sigma = 2^bits, so that every
    probability is a fraction over a power of two). No rounding of a real number takes part, which
    is what attacks on floating-point noise live on.

    Parameters
    ----------
    bits : int
        Binary logarithm of the deviation, 1 to 24.
    """
    count = int(np.prod(shape))
    found: Integers = np.zeros(0, np.int64)
    while len(found) < count:
        drawn = _discrete_laplace(max(64, 2 * (count - len(found))), bits, generator)
        distance = np.abs(drawn) - (1 << bits)
        exponent = distance * distance
        kept = _exp_coin(exponent, 2 * bits + 1, generator)
        found = np.concatenate([found, drawn[kept]])
    result: Integers = found[:count].reshape(shape)
    return result


def _discrete_laplace(count: int, bits: int, generator: SecureGenerator) -> Integers:
    """Return about half of ``count`` integers with probabilities in proportion to exp(-|y| / 2^bits)."""
    low = (generator.words(count) >> np.uint64(64 - bits)).astype(np.int64)
    low = low[_exp_coin(low, bits, generator)]
    high = np.zeros(len(low), np.int64)
    going = np.ones(len(low), bool)
    while going.any():
        going[going] = _exp_coin(np.full(going.sum(), 1 << bits, np.int64), bits, generator)
        high[going] += 1
    size = low + (high << bits)
    negative = (generator.words(len(size)) & np.uint64(1)).astype(bool)
    # zero has one sign
    result: Integers = np.where(negative, -size, size)[~(negative & (size == 0))]
    return result


def _exp_coin(numerator: Integers, bits: int, generator: SecureGenerator) -> Bools:
    """Return coins that are true with probability ``exp(-numerator / 2^bits)``."""
    whole, rest = numerator >> bits, numerator & ((1 << bits) - 1)
    result = _small_exp_coin(rest, bits, generator)
    for _ in range(int(whole.max(initial=0))):
        asked = result & (whole > 0)
        one = np.full(int(asked.sum()), 1 << bits, np.int64)
        result[asked] = _small_exp_coin(one, bits, generator)
        whole = whole - 1
    return result


def _small_exp_coin(numerator: Integers, bits: int, generator: SecureGenerator) -> Bools:
    """Return coins of probability ``exp(-x)``, x = numerator / 2^bits at most 1 (the series of exp)."""
    odd = np.zeros(len(numerator), bool)
    going = np.arange(len(numerator))
    turn = 0
    while len(going):
        turn += 1
        odd[going] = turn % 2 == 1
        drawn = (generator.words(len(going)) >> np.uint64(64 - bits)).astype(np.int64)
        going = going[(drawn < numerator[going]) & _one_in(turn, len(going), generator)]
    return odd


def _one_in(chances: int, count: int, generator: SecureGenerator) -> Bools:
    """Return coins of probability 1 / chances, by rejection."""
    limit = np.uint64((1 << 64) // chances * chances - 1)
    words = generator.words(count)
    while (wrong := words > limit).any():
        words[wrong] = generator.words(int(wrong.sum()))
    result: Bools = words % np.uint64(chances) == 0
    return result
