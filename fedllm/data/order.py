"""The order in which a site sees its records: a pure function of seed, site and step."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np


def batch_indices(n: int, *, batch_size: int, step: int, seed: int, site: str) -> list[int]:
    """Return positions ``[step*B, (step+1)*B)`` of an endless run of shuffled epochs.

    A site so goes on through its records from round to round instead of starting over, and a
    resumed run sees what an undisturbed one sees.

    Parameters
    ----------
    n : int
        Records at the site; B may exceed it and then spans epochs.
    step : int
        Step counted over the whole run, from 0.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [_epoch(n, position // n, seed, site)[position % n] for position in positions]


@lru_cache(maxsize=64)
def _epoch(n: int, epoch: int, seed: int, site: str) -> tuple[int, ...]:
    key = hashlib.sha256(f"order\x1f{seed}\x1f{site}\x1f{epoch}".encode()).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))
    return tuple(int(index) for index in generator.permutation(n))
