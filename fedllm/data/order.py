"""Which records a step trains on, as a pure function of the step."""

from __future__ import annotations

import hashlib

import numpy as np

from fedllm.errors import DataError


def batch_indices(n: int, *, batch_size: int, step: int, seed: int, site: str) -> list[int]:
    """Return the records of one step.

    Every epoch is a permutation of 0..n-1 that depends on (seed, site, epoch) alone; the step
    takes positions step*B..(step+1)*B-1 of all epochs put one after another. So a site that
    resumes, or sits out a round, needs no state to go on exactly.

    Parameters
    ----------
    n : int
        Number of training records.
    step : int
        Step counted over the whole run, from 0.

    Returns
    -------
    list[int]
        ``batch_size`` indices; a batch at an epoch's end, or larger than ``n``, goes on in the
        next epoch.

    Raises
    ------
    DataError
        If there is no record.
    """
    if n < 1:
        raise DataError(f"site {site}: no training records.")
    start, stop = step * batch_size, (step + 1) * batch_size
    chosen: list[int] = []
    for epoch in range(start // n, (stop - 1) // n + 1):
        order = _permutation(n, seed=seed, site=site, epoch=epoch)
        chosen += order[max(0, start - epoch * n) : stop - epoch * n].tolist()
    return chosen


def _permutation(n: int, *, seed: int, site: str, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    key = hashlib.sha256(f"order/{seed}/{epoch}/{site}".encode()).digest()
    words = np.frombuffer(key[:16], dtype="<u8")
    return np.random.Generator(np.random.Philox(key=words)).permutation(n)
