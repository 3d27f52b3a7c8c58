"""The optimisers of a site's round."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from fedllm.settings import TrainSettings

_BETAS = (0.9, 0.999)


class AdamBC(Optimizer):
    """Adam whose second moment is freed of the privacy noise's share (Tang et al., arXiv 2312.14334).

    With the noise's variance V in each number of the gradient::

        theta <- theta - lr m / sqrt(max(v - V, floor V))

    where m and v are Adam's moments, each corrected for its start at zero. The variance is public:
    this is post-processing. The paper's floor is an absolute number; as a share of V it does not
    depend on the clipping norm and the batch.

    Parameters
    ----------
    variance : float
        V.
    floor : float
        Least second moment over V.
    weight_decay : float
        Decoupled weight decay.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        variance: float,
        floor: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr})
        self._decay = weight_decay
        self._variance = variance
        self._floor = floor

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients in ``.grad``."""
        first, second = _BETAS
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    zero = torch.zeros_like(parameter)
                    state |= {"count": 0, "mean": zero, "square": zero.clone()}
                state["count"] += 1
                state["mean"].lerp_(parameter.grad, 1 - first)
                state["square"].lerp_(parameter.grad.square(), 1 - second)
                mean = state["mean"] / (1 - first ** state["count"])
                square = state["square"] / (1 - second ** state["count"])
                signal = (square - self._variance).clamp_min(self._floor * self._variance)
                parameter -= group["lr"] * (mean / signal.sqrt() + self._decay * parameter)


def make_optimizer(
    parameters: Iterable[nn.Parameter], train: TrainSettings, *, noise_deviation: float, floor: float
) -> Optimizer:
    """Return the optimiser of ``train.optimizer``.

    Parameters
    ----------
    noise_deviation : float
        Standard deviation of the noise in each number of a private gradient; else 0.
    floor : float
        ``privacy.adam_floor``.
    """
    if train.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=train.lr, weight_decay=train.weight_decay)
    if train.optimizer == "adam-bc":
        return AdamBC(
            parameters,
            lr=train.lr,
            variance=noise_deviation**2,
            floor=floor,
            weight_decay=train.weight_decay,
        )
    return AdamW(parameters, lr=train.lr, betas=_BETAS, weight_decay=train.weight_decay)
