"""Which units take part in a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedllm.privacy.entropy import SecureGenerator


def poisson_sample(count: int, *, rate: float, generator: SecureGenerator) -> list[int]:
    """Return the indices below ``count`` that independent coins of probability ``rate`` choose.

    The result may be empty; an empty batch still gets its noise, its step and its accounting.
    """
    return np.flatnonzero(generator.uniform(count) < rate).tolist()


def random_subset(items: Sequence[int], *, size: int, generator: SecureGenerator) -> list[int]:
    """Return the items, or a uniformly random subset of ``size`` of them, in their order."""
    if len(items) <= size:
        return list(items)
    kept = np.sort(np.argsort(generator.uniform(len(items)), kind="stable")[:size])
    return [items[index] for index in kept]
