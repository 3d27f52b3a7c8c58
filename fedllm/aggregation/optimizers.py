"""Server optimisers: what a round's mean does to the matrices the round started from.

All work on the pseudo-gradient ``Delta = mean - current`` (an update, so it is added) in float64,
matrix by matrix, and keep what they remember in one flat mapping of arrays, so that a checkpoint
resumes bit for bit. On LoRA's A and B taken apart they are not well-defined (the product does not
change under ``(B Q, Q^-1 A)``, the moments do): use them on Fed-SB's R, on B with A frozen, or
after alignment.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedllm.aggregation.lowrank import Matrix64
from fedllm.errors import ConfigError, RunError

Matrices = Mapping[str, Matrix64]
Step = tuple[dict[str, Matrix64], dict[str, Matrix64]]


class ServerOptimizer(ABC):
    """A server optimiser: parameters here, memory outside."""

    def step(self, current: Matrices, mean: Matrices, moments: Matrices) -> Step:
        """Return the new matrices and the new moments.

        Parameters
        ----------
        current : mapping of ndarray
            Name -> the matrix that the round started from.
        mean : mapping of ndarray
            Name -> the (weighted) mean of what the sites returned, of the same shape.
        moments : mapping of ndarray
            What the last step returned; empty at the first.

        Returns
        -------
        tuple of dict
            New matrices and new moments, float64; the inputs are not written to.

        Raises
        ------
        RunError
            If names or shapes differ, or the moments lack what this optimiser needs.
        """
        if current.keys() != mean.keys():
            raise RunError(f"matrices differ: {sorted(current.keys() ^ mean.keys())[0]}.")
        old = {key: np.asarray(value, dtype=np.float64) for key, value in current.items()}
        for key, value in mean.items():
            if value.shape != old[key].shape:
                raise RunError(f"{key} has shape {value.shape}, expected {old[key].shape}.")
        update, kept = self._update({key: mean[key] - old[key] for key in old}, moments)
        return {key: old[key] + update[key] for key in old}, kept

    @abstractmethod
    def _update(self, delta: Matrices, moments: Matrices) -> Step:
        """Return what is added to the matrices, and the new moments."""


@dataclass(frozen=True, kw_only=True)
class FedAvgM(ServerOptimizer):
    """Server momentum (Hsu et al., arXiv 1909.06335): ``m <- momentum m + Delta``, ``x += lr m``.

    Without momentum and with ``lr = 1`` it is federated averaging.
    """

    lr: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _require_ranges(lr=self.lr, decays={"momentum": self.momentum})

    def _update(self, delta: Matrices, moments: Matrices) -> Step:
        m = {key: self.momentum * _last(moments, f"m/{key}", d) + d for key, d in delta.items()}
        return {key: self._direction(m[key], d) for key, d in delta.items()}, _named("m", m)

    def _direction(self, m: Matrix64, delta: Matrix64) -> Matrix64:
        return self.lr * m


@dataclass(frozen=True, kw_only=True)
class Nesterov(FedAvgM):
    """DiLoCo's outer optimiser (arXiv 2311.08105): SGD with Nesterov momentum, as torch defines it.

    ``m <- momentum m + Delta``, ``x += lr (Delta + momentum m)``.
    """

    lr: float = 0.7

    def _direction(self, m: Matrix64, delta: Matrix64) -> Matrix64:
        return self.lr * (delta + self.momentum * m)


@dataclass(frozen=True, kw_only=True)
class _Adaptive(ServerOptimizer):
    """Algorithm 2 of Reddi et al. (arXiv 2003.00295), no bias correction.

    ``m <- beta1 m + (1 - beta1) Delta``, v by the subclass, ``x += lr m / (sqrt(v) + tau)``; m starts
    at 0 and v at tau^2, the least that the algorithm allows.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _require_ranges(lr=self.lr, tau=self.tau, decays={"beta1": self.beta1})

    @abstractmethod
    def _second(self, v: Matrix64, square: Matrix64) -> Matrix64:
        """Return the new v from the last one and ``Delta^2``."""

    def _update(self, delta: Matrices, moments: Matrices) -> Step:
        m, v = {}, {}
        for key, d in delta.items():
            m[key] = self.beta1 * _last(moments, f"m/{key}", d) + (1 - self.beta1) * d
            v[key] = self._second(_last(moments, f"v/{key}", d, start=self.tau**2), d**2)
        update = {key: self.lr * m[key] / (np.sqrt(v[key]) + self.tau) for key in delta}
        return update, _named("m", m) | _named("v", v)


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(_Adaptive):
    """Adagrad on the server (arXiv 2003.00295): ``v <- v + Delta^2``; it has no beta2."""

    beta1: float = 0.0

    def _second(self, v: Matrix64, square: Matrix64) -> Matrix64:
        return v + square


@dataclass(frozen=True, kw_only=True)
class FedAdam(_Adaptive):
    """Adam on the server (arXiv 2003.00295): ``v <- beta2 v + (1 - beta2) Delta^2``."""

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_ranges(lr=self.lr, decays={"beta2": self.beta2})

    def _second(self, v: Matrix64, square: Matrix64) -> Matrix64:
        return self.beta2 * v + (1 - self.beta2) * square


@dataclass(frozen=True, kw_only=True)
class FedYogi(FedAdam):
    """Yogi on the server (arXiv 2003.00295): ``v <- v - (1 - beta2) Delta^2 sign(v - Delta^2)``."""

    def _second(self, v: Matrix64, square: Matrix64) -> Matrix64:
        return v - (1 - self.beta2) * square * np.sign(v - square)


@dataclass(frozen=True, kw_only=True)
class FedHyper(ServerOptimizer):
    """A server rate that follows the agreement of successive rounds (arXiv 2310.03156, form G).

    ``alpha <- clip(alpha + h, 1 / gamma, gamma)``, ``x += alpha Delta``, with ``alpha = 1`` in the
    first round.

    Parameters
    ----------
    gamma : float
        Bound of the rate, at least 1; the authors' code has 5.
    form : {"cosine", "paper"}
        ``h = gain * cos(Delta_t, Delta_{t-1})``, free of scale; or the paper's raw inner product,
        which grows with the number and the size of the parameters. Both over all matrices together.
    gain : float
        Change of the rate under full agreement; of the cosine form only.
    """

    gamma: float = 5.0
    form: Literal["cosine", "paper"] = "cosine"
    gain: float = 0.1

    def __post_init__(self) -> None:
        if self.form not in ("cosine", "paper"):
            raise ConfigError(f'FedHyper\'s form is "cosine" or "paper", not "{self.form}".')
        if not (1 <= self.gamma < np.inf and 0 < self.gain < np.inf):
            raise ConfigError(f"FedHyper needs gamma >= 1 and gain > 0, not {self.gamma} and {self.gain}.")

    def _update(self, delta: Matrices, moments: Matrices) -> Step:
        last = {key: _last(moments, f"d/{key}", d) for key, d in delta.items()}
        change = _inner(delta, last)
        if self.form == "cosine":
            lengths = np.sqrt(_inner(delta, delta) * _inner(last, last))
            change = self.gain * change / lengths if lengths > 0 else 0.0
        before = _last(moments, "alpha", np.zeros(1), start=1.0)
        alpha = np.clip(before + change, 1 / self.gamma, self.gamma)
        return {key: alpha * d for key, d in delta.items()}, {"alpha": alpha} | _named("d", delta)


#: Registry of server optimisers; a new one adds one line here.
OPTIMIZERS: dict[str, type[ServerOptimizer]] = {
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedadagrad": FedAdagrad,
    "nesterov": Nesterov,
    "fedhyper": FedHyper,
}


def _last(moments: Matrices, name: str, like: Matrix64, *, start: float = 0.0) -> Matrix64:
    """Return a moment, or its start in the first round; a foreign or half set is refused."""
    if not moments:
        return np.full(like.shape, start)
    if name not in moments or moments[name].shape != like.shape:
        raise RunError(f"the saved moments hold no {name} of shape {like.shape}: another optimiser's?")
    return np.asarray(moments[name], dtype=np.float64)


def _named(kind: str, values: Matrices) -> dict[str, Matrix64]:
    return {f"{kind}/{key}": value for key, value in values.items()}


def _inner(left: Matrices, right: Matrices) -> float:
    return float(sum(np.vdot(left[key], right[key]) for key in sorted(left)))


def _require_ranges(*, decays: Mapping[str, float], **positive: float) -> None:
    """Refuse a rate that is not positive and finite, or a decay outside [0, 1)."""
    for name, value in positive.items():
        if not 0 < value < np.inf:
            raise ConfigError(f"{name} must be positive and finite, not {value}.")
    for name, value in decays.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{name} must be at least 0 and below 1, not {value}.")
