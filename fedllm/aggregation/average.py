"""Weighted means of adapter states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedllm.adapters.state import AdapterState, require_same_layout, require_same_spec
from fedllm.errors import RunError


def weighted_mean(states: Sequence[AdapterState], weights: Sequence[float]) -> AdapterState:
    """Return ``sum_k p_k X_k`` of every matrix X with ``p_k = w_k / sum w``.

    Exact in the weight change where one factor is frozen (Fed-SB's R, FFA-LoRA's B); for LoRA's
    A and B it is FedIT's factor averaging, which is not. Sums run in float64 and in the order
    given: callers sort by site name to make the result reproducible.

    Raises
    ------
    MismatchError
        If two states differ in spec or layout.
    RunError
        If there is no state, or the weights are not positive and finite.
    """
    if not states or len(states) != len(weights):
        raise RunError(f"cannot average {len(states)} states with {len(weights)} weights.")
    if not all(np.isfinite(weight) and weight > 0 for weight in weights):
        raise RunError("aggregation weights must be positive and finite.")
    first, total = states[0], float(sum(weights))
    for index, state in enumerate(states[1:], start=1):
        require_same_spec(first.spec, state.spec, site=f"#{index}")
        require_same_layout(first.layout, state.layout, site=f"#{index}")
    shares = [weight / total for weight in weights]
    return first.with_tensors(
        {
            key: sum(
                share * state.tensors[key].astype(np.float64)
                for share, state in zip(shares, states, strict=True)
            ).astype(np.float32)  # type: ignore[union-attr]
            for key in first.tensors
        }
    )
