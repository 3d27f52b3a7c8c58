"""Per-example clipping, jointly over all trained matrices (Abadi et al., arXiv 1607.00133)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def clipped(gradients: Mapping[str, Tensor], *, clipping_norm: float) -> dict[str, Tensor]:
    """Return ``g_b min(1, C / ||g_b||)`` with the norm over all matrices of example b.

    An example whose gradient is not finite, or so long that its factor is no normal float32 (it would be
    rounded up to C and more), counts as zero: dropping the step would reveal it.

    Parameters
    ----------
    gradients : Mapping[str, Tensor]
        Name -> per-example gradients, shape (B, *shape), float32.
    clipping_norm : float
        C, the largest norm an example contributes.
    """
    finite, factors = _factors(gradients, clipping_norm)
    result = {}
    for name, value in gradients.items():
        ones = [1] * (value.dim() - 1)
        result[name] = torch.where(finite.view(-1, *ones), value, 0.0) * factors.view(-1, *ones)
    return result


def clipped_sum(gradients: Mapping[str, Tensor], *, clipping_norm: float) -> dict[str, Tensor]:
    """Return the sum over the examples of :func:`clipped`, without holding its terms.

    It moves by at most C when one example is added or removed.
    """
    finite, factors = _factors(gradients, clipping_norm)
    # a factor of zero times NaN is NaN; without one, no gradient is copied
    whole = bool(finite.all())
    result = {}
    for name, value in gradients.items():
        safe = value if whole else torch.where(finite.view(-1, *[1] * (value.dim() - 1)), value, 0.0)
        result[name] = torch.einsum("b,b...->...", factors, safe)
    return result


def grid_sum(gradients: Mapping[str, Tensor], *, clipping_norm: float, step: float) -> dict[str, Tensor]:
    """Return the sum of clipped gradients, each rounded to a grid first; int64, in grid steps.

    Sums of integers are exact in any order. Rounding adds at most ``step * sqrt(d) / 2`` to the
    norm of an example's gradient of d numbers; the examples are clipped that much closer.

    Raises
    ------
    ValueError
        If the grid is too coarse for the norm.
    """
    count = sum(value[0].numel() for value in gradients.values()) if gradients else 0
    inner = clipping_norm - step * count**0.5 / 2
    if inner <= 0:
        raise ValueError("the grid is too coarse for this many numbers.")
    terms = clipped(gradients, clipping_norm=inner)
    return {name: (value.double() / step).round().long().sum(dim=0) for name, value in terms.items()}


def owned_means(gradients: Mapping[str, Tensor], owners: Tensor, *, units: int) -> dict[str, Tensor]:
    """Return each unit's mean gradient over its records.

    Parameters
    ----------
    owners : Tensor
        The unit of each row, shape (B,), int64, below ``units``.

    Returns
    -------
    dict[str, Tensor]
        Name -> gradients, shape (units, *shape).
    """
    device = next(iter(gradients.values())).device
    owners = owners.to(device)
    counts = torch.bincount(owners, minlength=units).clamp_min(1)
    result = {}
    for name, value in gradients.items():
        sums = value.new_zeros(units, *value.shape[1:]).index_add_(0, owners, value)
        result[name] = sums / counts.view(-1, *[1] * (value.dim() - 1))
    return result


def pair_sums(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each pair's gradient from those of its two rows, shape (B, *shape).

    A pair's loss depends on row b and row B + b and no others; its gradient is the sum of what
    reaches them. Each row's alone may be long where their sum is short, and the other way round:
    clipping rows would bound a pair by 2 C and turn its direction.

    Parameters
    ----------
    gradients : Mapping[str, Tensor]
        Name -> gradients a row, shape (2 B, *shape): all first rows, then all second ones.
    """
    return {name: value.reshape(2, -1, *value.shape[1:]).sum(0) for name, value in gradients.items()}


def _factors(gradients: Mapping[str, Tensor], clipping_norm: float) -> tuple[Tensor, Tensor]:
    """Return which examples are finite, and what each is multiplied with; shape (B,) both."""
    parts = [torch.linalg.vector_norm(value.flatten(1), dim=1) for value in gradients.values()]
    norms = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    factors = (clipping_norm / norms.clamp_min(1e-12)).clamp_max(1.0)
    finite = torch.isfinite(norms) & (factors >= torch.finfo(factors.dtype).tiny)
    return finite, torch.where(finite, factors, 0.0)
