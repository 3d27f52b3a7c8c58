"""FedHyper's client-side learning rate (arXiv 2310.03156, form CL)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_GROWTH = 1.1
_LOWEST, _HIGHEST = 0.1, 10.0
_GAIN = 0.1


class ClientRate:
    """The factor on the learning rate of one site in one round.

    After each step with the change u_b of the trained matrices, and with the federation's last
    change D::

        gamma = min(1.1, 1 + 0.1 <u_b, D> / steps + <u_b, u_{b-1}>)      (the paper)
        gamma = min(1.1, 1 + 0.1 cos(u_b, D) + 0.1 cos(u_b, u_{b-1}))    (free of scale)
        beta <- clip(gamma beta, 0.1, 10)

    Raw inner products grow with the number of parameters, so that the paper's form depends on the
    adapter's size; cosines do not.

    Parameters
    ----------
    parameters : Mapping[str, Parameter]
        The matrices that train.
    last : Mapping[str, Tensor]
        D, the last change that the federation made to each matrix; empty in the first round.
    steps : int
        Steps of a round.
    paper : bool
        Use the paper's form.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        last: Mapping[str, Tensor],
        *,
        steps: int,
        paper: bool,
    ) -> None:
        self._parameters = parameters
        self._steps = steps
        self._paper = paper
        self._before = self._flat(parameters)
        known = parameters.keys() <= last.keys()
        moved = {key: last[key].to(value.device) for key, value in parameters.items()} if known else {}
        self._last = self._flat(moved) if known else None
        self._change: Tensor | None = None
        self.factor = 1.0

    def update(self) -> None:
        """Take in the step just made."""
        now = self._flat(self._parameters)
        change, self._before = now - self._before, now
        gamma = 1.0
        if self._last is not None:
            gamma += _GAIN * self._agreement(change, self._last) / (self._steps if self._paper else 1)
        if self._change is not None:
            gamma += (1.0 if self._paper else _GAIN) * self._agreement(change, self._change)
        self._change = change
        self.factor = min(_HIGHEST, max(_LOWEST, min(_GROWTH, gamma) * self.factor))

    def _agreement(self, left: Tensor, right: Tensor) -> float:
        product = float(left @ right)
        if self._paper:
            return product
        size = float(left.norm() * right.norm())
        return product / size if size > 0 else 0.0

    @staticmethod
    def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([value.detach().reshape(-1).float().clone() for value in tensors.values()])
