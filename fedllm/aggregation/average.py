"""Weighted means of named matrices, one site at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedllm.adapters.state import AdapterState, Matrix, require_same_layout, require_same_spec
from fedllm.aggregation.lowrank import Matrix64
from fedllm.errors import RunError


class Mean:
    """``sum_k w_k X_k / sum_k w_k`` of every matrix, summed in float64 as the sites are added.

    Only the sums are held. The order of adding decides the last bits: callers add in the order of
    site names to make the result reproducible.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Matrix64] = {}
        self._weight = 0.0

    def add(self, tensors: Mapping[str, Matrix], weight: float) -> None:
        """Add one site's matrices.

        Raises
        ------
        RunError
            If the weight is not positive and finite.
        """
        if not (np.isfinite(weight) and weight > 0):
            raise RunError("aggregation weights must be positive and finite.")
        for key, value in tensors.items():
            held = self._sums.get(key)
            if held is None:
                self._sums[key] = weight * value.astype(np.float64)
            else:
                held += weight * value.astype(np.float64)
        self._weight += weight

    def result(self) -> dict[str, Matrix]:
        """Return the means as float32.

        Raises
        ------
        RunError
            If nothing was added.
        """
        return {key: value.astype(np.float32) for key, value in self.result64().items()}

    def result64(self) -> dict[str, Matrix64]:
        """Return the means as float64; see :meth:`result`."""
        if not self._weight:
            raise RunError("cannot average 0 states.")
        return {key: value / self._weight for key, value in self._sums.items()}


def weighted_mean(states: Sequence[AdapterState], weights: Sequence[float]) -> AdapterState:
    """Return the weighted mean of states of one spec.

    Exact in the weight change where one factor is frozen (Fed-SB's R, FFA-LoRA's B); for LoRA's
    A and B it is FedIT's factor averaging, which is not.

    Raises
    ------
    MismatchError
        If two states differ in spec or layout.
    RunError
        If there is no state, or the weights are not positive and finite.
    """
    if not states or len(states) != len(weights):
        raise RunError(f"cannot average {len(states)} states with {len(weights)} weights.")
    first, mean = states[0], Mean()
    for index, (state, weight) in enumerate(zip(states, weights, strict=True)):
        require_same_spec(first.spec, state.spec, site=f"#{index}")
        require_same_layout(first.layout, state.layout, site=f"#{index}")
        mean.add(state.tensors, weight)
    return first.with_tensors(mean.result())
