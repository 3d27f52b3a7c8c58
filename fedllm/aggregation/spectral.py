"""Rules that rebuild both factors from singular vectors: FedSVD and FedASK."""

from __future__ import annotations

import numpy as np

from fedllm.adapters.basis import generator
from fedllm.aggregation.lowrank import LowRank, Matrix64, svd, truncate
from fedllm.errors import RunError


def refactor(up: Matrix64, previous_down: Matrix64) -> LowRank:
    """Give ``B A_prev`` an orthonormal A again (FedSVD, arXiv 2505.12805).

    ``B A_prev = U S V^T``; then ``B <- U S`` and ``A <- V^T``. A function of what was already
    released, so free under differential privacy; the product is unchanged.

    Parameters
    ----------
    up : ndarray
        The averaged B, shape (m, r).
    previous_down : ndarray
        The frozen A it was trained with, shape (r, n).

    Returns
    -------
    LowRank
        Rank r. The rows of A are orthonormal even where B is zero or rank-deficient; only
        components beyond min(m, n), which no m x n matrix can use, are zero.

    Raises
    ------
    RunError
        If the factors do not multiply or are not finite.
    """
    left, values, right = svd(LowRank(up, previous_down))
    return LowRank(left * values, right).padded(up.shape[1])


def omega(seed: str, columns: int, width: int) -> Matrix64:
    """Draw FedASK's shared test matrix, shape (columns, width), standard normal, from a seed.

    Philox keyed by the seed's sha256: every party draws the same one. Name the round and the
    module in the seed.
    """
    return generator(seed, "fedask").standard_normal((columns, width))


def sketch(term: LowRank, omega: Matrix64) -> Matrix64:
    """Return a site's first message ``Y_k = B_k (A_k Omega)``, shape (m, width) (arXiv 2507.09990).

    Parameters
    ----------
    term : LowRank
        The site's product, shape (m, n).
    omega : ndarray
        The shared test matrix, shape (n, width).

    Raises
    ------
    RunError
        If the test matrix has not n rows.
    """
    return term.up @ (term.down @ _with_rows(omega, term.shape[1]))


def range_of(summed_sketch: Matrix64) -> Matrix64:
    """Return Q with orthonormal columns whose span holds that of ``sum_k p_k Y_k``.

    Parameters
    ----------
    summed_sketch : ndarray
        Shape (m, width).

    Returns
    -------
    ndarray
        Shape (m, min(m, width)). Spans the aggregate's whole range, almost surely, where the width
        is at least its rank (at most the sum of the sites' ranks).
    """
    return np.linalg.qr(np.asarray(summed_sketch, dtype=np.float64))[0]


def back_project(term: LowRank, basis: Matrix64) -> Matrix64:
    """Return a site's second message ``Z_k = A_k^T (B_k^T Q)``, shape (n, width).

    Parameters
    ----------
    term : LowRank
        The site's product, shape (m, n).
    basis : ndarray
        Q of :func:`range_of`, shape (m, width).

    Raises
    ------
    RunError
        If Q has not m rows.
    """
    return term.down.T @ (term.up.T @ _with_rows(basis, term.shape[0]))


def rebuild(basis: Matrix64, summed_back_projection: Matrix64, *, rank: int) -> LowRank:
    """Return both factors from ``sum_k p_k Z_k``, FedASK's last step (arXiv 2507.09990).

    ``(sum_k p_k Z_k)^T = U S V^T`` gives ``B = Q U S^1/2`` and ``A = S^1/2 V^T``. Both messages are
    plain sums, so they pass through secure aggregation. Where the sketch spans the aggregate's
    range, the result is the aggregate's best truncation to the rank.

    Parameters
    ----------
    basis : ndarray
        Q, shape (m, width).
    summed_back_projection : ndarray
        ``sum_k p_k Z_k``, shape (n, width).
    rank : int
        Components kept at most.

    Raises
    ------
    RunError
        If the widths differ or the rank is negative.
    """
    return truncate(LowRank(basis, summed_back_projection.T), rank=rank, balanced=True)


def _with_rows(matrix: Matrix64, rows: int) -> Matrix64:
    """Return the matrix in float64, refusing one that does not multiply."""
    if matrix.ndim != 2 or matrix.shape[0] != rows:
        raise RunError(f"expected a matrix with {rows} rows, not one of shape {matrix.shape}.")
    return np.asarray(matrix, dtype=np.float64)
