"""Canaries of a one-run audit: made-up records whose gradient is one number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedllm.data.encode import Encoded
from fedllm.privacy.clipping import clipped_sum
from fedllm.privacy.entropy import SecureGenerator


def random_places(
    shapes: Mapping[str, Sequence[int]], *, count: int, generator: SecureGenerator
) -> list[tuple[str, int]]:
    """Return different random coordinates of some matrices, each as (key, flat position).

    Parameters
    ----------
    count : int
        How many; all coordinates if there are fewer.
    """
    keys = list(shapes)
    starts = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes.values())])
    chosen = np.argsort(generator.uniform(int(starts[-1])))[:count]
    owners = np.searchsorted(starts, chosen, side="right") - 1
    return [(keys[o], int(c - starts[o])) for o, c in zip(owners, chosen, strict=True)]


class DiracCanaries:
    """Canaries of one site in one run (Steinke, Nasr and Jagielski, arXiv 2305.08846).

    Canary i's gradient is far above the clipping norm in a coordinate of its own and zero
    elsewhere; a fair coin decides whether it is among the site's records. The guesser sees every
    step's privatised gradient and knows everything but the canaries: what the real records of each
    step came to is taken off, and what is left at a canary's coordinate is summed over the steps.

    Parameters
    ----------
    shapes : Mapping
        Key -> shape of every matrix that trains in the first round. Where matrices take turns, canaries show
        in the rounds of these alone.
    count : int
        Canaries; at most as many as numbers train.
    clipping_norm : float
        C; a canary's gradient is a thousand times as long.
    expected_batch : float
        What releases are divided by.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        *,
        count: int,
        clipping_norm: float,
        expected_batch: float,
    ) -> None:
        self._clipping_norm = clipping_norm
        self._expected_batch = expected_batch
        self._known: list[dict[str, Tensor]] = []
        generator = SecureGenerator()
        self._places = random_places(shapes, count=count, generator=generator)
        self.included = generator.uniform(len(self._places)) < 0.5
        self.scores = np.zeros(len(self._places))

    @property
    def units(self) -> list[list[Encoded]]:
        """Return the included canaries as units of one record."""
        return [
            [Encoded(prompt=(-1 - int(index),), answer=(), truncated=False)]
            for index in np.flatnonzero(self.included)
        ]

    def among(
        self,
        gradients_of: Callable[[Sequence[Sequence[Encoded]]], dict[str, Tensor]],
        shapes: Mapping[str, Sequence[int]],
    ) -> Callable[[Sequence[Sequence[Encoded]]], dict[str, Tensor]]:
        """Return a function that gives canaries their gradient and asks the given one for real units.

        Parameters
        ----------
        shapes : Mapping
            Key -> shape of every matrix that trains in this round; a canary of another one is zero.
        """

        def mixed(units: Sequence[Sequence[Encoded]]) -> dict[str, Tensor]:
            first = [unit[0].prompt[0] for unit in units]
            real = [row for row, token in enumerate(first) if token >= 0]
            found = {key: torch.zeros(len(units), *shape) for key, shape in shapes.items()}
            if real:
                own = {k: v.cpu() for k, v in gradients_of([units[row] for row in real]).items()}
                self._known.append(clipped_sum(own, clipping_norm=self._clipping_norm))
                for key, value in own.items():
                    found[key][real] = value
            for row, token in enumerate(first):
                if token < 0:
                    key, place = self._places[-1 - token]
                    if key in found:
                        found[key][row].view(-1)[place] = 1000 * self._clipping_norm
            return found

        return mixed

    def observe(self, released: Mapping[str, Tensor]) -> None:
        """Add one step's privatised gradient to the scores."""
        total = {key: value.double().cpu() * self._expected_batch for key, value in released.items()}
        for known in self._known:
            total = {key: value - known[key] for key, value in total.items()}
        self._known = []
        flat = {key: value.reshape(-1) for key, value in total.items()}
        # matrices may take turns; what was not released tells nothing
        self.scores += [float(flat[key][place]) if key in flat else 0.0 for key, place in self._places]
