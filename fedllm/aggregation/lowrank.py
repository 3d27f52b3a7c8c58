"""Matrices kept as a product of two thin factors, and the exact algebra on them.

A module's weight change ``s B A`` is (m x n) but has rank r, so sums, inner products and singular
values come from its factors in O((m + n) r^2): no m x n matrix is ever formed. All in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedllm.errors import RunError

Matrix64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix ``up @ down``, every scale already folded in.

    Parameters
    ----------
    up : ndarray
        Left factor, shape (m, r); any float type, kept as float64. Rank 0 is the zero matrix.
    down : ndarray
        Right factor, shape (r, n).

    Raises
    ------
    RunError
        If the factors are not two matrices that multiply, or hold NaN or infinity.
    """

    up: Matrix64
    down: Matrix64

    def __post_init__(self) -> None:
        up, down = np.asarray(self.up, dtype=np.float64), np.asarray(self.down, dtype=np.float64)
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            raise RunError(f"factors of shapes {up.shape} and {down.shape} do not multiply.")
        if not (np.isfinite(up).all() and np.isfinite(down).all()):
            raise RunError("a factor holds NaN or infinity.")
        object.__setattr__(self, "up", up)
        object.__setattr__(self, "down", down)

    @property
    def rank(self) -> int:
        """Return r, the number of components held (the matrix' own rank may be less)."""
        return int(self.up.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """Return (m, n), the shape of the product."""
        return int(self.up.shape[0]), int(self.down.shape[1])

    def scaled(self, factor: float) -> LowRank:
        """Return ``factor * up @ down``; the factor goes into ``up``."""
        return LowRank(self.up * factor, self.down)

    def padded(self, rank: int) -> LowRank:
        """Return the same product with zero components added up to a rank (never fewer than held)."""
        missing = max(rank - self.rank, 0)
        return LowRank(np.pad(self.up, ((0, 0), (0, missing))), np.pad(self.down, ((0, missing), (0, 0))))


def normalised(weights: Sequence[float]) -> list[float]:
    """Return the shares ``p_k = w_k / sum w``.

    Raises
    ------
    RunError
        If there is no weight, or one is not positive and finite.
    """
    if not weights or not all(np.isfinite(weight) and weight > 0 for weight in weights):
        raise RunError("aggregation weights must be positive and finite, and at least one.")
    total = float(sum(weights))
    return [float(weight) / total for weight in weights]


def require_alike(terms: Sequence[LowRank], weights: Sequence[float]) -> None:
    """Refuse an empty list, a weight too many or too few, and products of different shapes.

    Raises
    ------
    RunError
        Naming the first difference.
    """
    if not terms or len(terms) != len(weights):
        raise RunError(f"cannot aggregate {len(terms)} terms with {len(weights)} weights.")
    for index, term in enumerate(terms):
        if term.shape != terms[0].shape:
            raise RunError(f"term #{index} has shape {term.shape}, expected {terms[0].shape}.")


def stack(terms: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return ``sum_k w_k up_k down_k`` exactly, by concatenation (FLoRA, arXiv 2409.05976).

    Parameters
    ----------
    terms : sequence of LowRank
        Products of one shape (m, n); ranks may differ.
    weights : sequence of float
        Used as given: they need not sum to 1, and may be negative (a difference).

    Returns
    -------
    LowRank
        Of rank ``sum_k r_k``.

    Raises
    ------
    RunError
        If there is no term, the counts differ, the shapes differ or a weight is not finite.
    """
    require_alike(terms, weights)
    return LowRank(
        np.hstack([term.up * weight for term, weight in zip(terms, weights, strict=True)]),
        np.vstack([term.down for term in terms]),
    )


def inner(a: LowRank, b: LowRank) -> float:
    """Return the Frobenius inner product ``<a, b> = sum((U_a^T U_b) * (D_a D_b^T))``.

    Raises
    ------
    RunError
        If the shapes differ.
    """
    require_alike((a, b), (1.0, 1.0))
    return float(np.sum((a.up.T @ b.up) * (a.down @ b.down.T)))


def singular_values(a: LowRank) -> Matrix64:
    """Return the min(m, n, r) leading singular values, falling; shape (min(m, n, r),)."""
    return np.asarray(np.linalg.svd(_core(a), compute_uv=False), dtype=np.float64)


def norm(a: LowRank) -> float:
    """Return the Frobenius norm.

    From the QR core and not as ``sqrt(inner(a, a))``: Grams square the rounding, so that a
    difference of 1e-8 of its terms would drown in it.
    """
    return float(np.linalg.norm(_core(a)))


def svd(a: LowRank) -> tuple[Matrix64, Matrix64, Matrix64]:
    """Return the thin singular value decomposition ``a = U diag(s) Vt``.

    With ``up = Q_b R_b`` and ``down^T = Q_a R_a`` it is that of the small core ``R_b R_a^T``
    (FLoRIST's idea, arXiv 2506.09199). Signs: the entry of largest magnitude in each left vector
    is positive, so that two machines agree.

    Returns
    -------
    tuple of ndarray
        U (m, q), s (q,) falling, Vt (q, n), with q = min(m, n, r).
    """
    q_up, r_up = np.linalg.qr(a.up)
    q_down, r_down = np.linalg.qr(a.down.T)
    left, values, right = np.linalg.svd(r_up @ r_down.T, full_matrices=False)
    left, right = q_up @ left, right @ q_down.T
    signs = np.sign(left[np.abs(left).argmax(axis=0), np.arange(len(values))])
    return left * signs, values, right * signs[:, None]


def truncate(
    a: LowRank, *, rank: int | None = None, energy: float | None = None, balanced: bool = False
) -> LowRank:
    """Return the best approximation of low rank (Eckart-Young), components in falling order.

    The first q components of the result are therefore the best approximation of rank q, which is
    what FlexLoRA (arXiv 2402.11505) sends to a site of rank q.

    Parameters
    ----------
    a : LowRank
        What to compress.
    rank : int, optional
        Components kept at most.
    energy : float, optional
        Keep the fewest components that hold this share of the sum of squared singular values
        (FLoRIST's tau). With both, the smaller rank holds; with neither, nothing is dropped.
    balanced : bool
        False: ``up = U s, down = Vt``. True: ``up = U sqrt(s), down = sqrt(s) Vt``.

    Raises
    ------
    RunError
        If the rank is negative or the energy not in [0, 1].
    """
    if rank is not None and rank < 0:
        raise RunError(f"cannot truncate to rank {rank}.")
    if energy is not None and not 0 <= energy <= 1:
        raise RunError(f"the energy to keep is a share between 0 and 1, not {energy}.")
    left, values, right = svd(a)
    keep = len(values) if rank is None else min(rank, len(values))
    if energy is not None:
        held = np.concatenate([[0.0], np.cumsum(values**2)])
        keep = min(keep, int(np.searchsorted(held, energy * held[-1])))
    left, values, right = left[:, :keep], values[:keep], right[:keep]
    if balanced:
        return LowRank(left * np.sqrt(values), np.sqrt(values)[:, None] * right)
    return LowRank(left * values, right)


def _core(a: LowRank) -> Matrix64:
    """Return the product up to rotations on both sides: ``R_b R_a^T``, at most (r, r), or itself."""
    if a.rank >= min(a.shape):
        # a sum of many sites has more columns than rows: its QRs would cost more than the product
        return np.asarray(a.up @ a.down, dtype=np.float64)
    r_up, r_down = (np.asarray(np.linalg.qr(x, mode="r"), dtype=np.float64) for x in (a.up, a.down.T))
    return r_up @ r_down.T
