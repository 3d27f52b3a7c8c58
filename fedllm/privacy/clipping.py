"""Per-example clipping, jointly over all trained matrices (Abadi et al., arXiv 1607.00133)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def clipped_sum(gradients: Mapping[str, Tensor], *, clipping_norm: float) -> dict[str, Tensor]:
    """Return ``sum_b g_b min(1, C / ||g_b||)`` with the norm over all matrices of example b.

    An example whose gradient is not finite counts as zero: dropping the step would reveal it.
    The result moves by at most C when one example is added or removed.

    Parameters
    ----------
    gradients : Mapping[str, Tensor]
        Name -> per-example gradients, shape (B, *shape), float32.
    clipping_norm : float
        C, the largest norm an example contributes.
    """
    squares = torch.stack([value.flatten(1).square().sum(1) for value in gradients.values()])
    norms = squares.sum(0).sqrt()
    finite = torch.isfinite(norms)
    factors = torch.where(finite, (clipping_norm / norms.clamp_min(1e-12)).clamp_max(1.0), 0.0)
    result = {}
    for name, value in gradients.items():
        safe = torch.where(finite.view(-1, *[1] * (value.dim() - 1)), value, 0.0)
        result[name] = torch.einsum("b,b...->...", factors, safe)
    return result
