"""Rules that aggregate LoRA's two factors, one function a paper.

Notation: site k holds ``B_k A_k`` (up, down) of one module with its scale folded in, and has the
share ``p_k``; ``Bbar = sum_k p_k B_k``, ``Abar = sum_k p_k A_k``. Unequal ranks are zero-padded to
the largest one R.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedllm.aggregation.lowrank import LowRank, Matrix64, norm, normalised, require_alike, stack


def factor_mean(terms: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return ``Bbar Abar``, the mean of each factor (FedIT, arXiv 2305.05644).

    Not the mean of the products; what is missing is :func:`centred_residual`.

    Parameters
    ----------
    terms : sequence of LowRank
        One a site, products of one shape (m, n).
    weights : sequence of float
        Positive; normalised here.

    Returns
    -------
    LowRank
        Of rank R.

    Raises
    ------
    RunError
        If there is no term, counts or shapes differ, or weights are not positive and finite.
    """
    require_alike(terms, weights)
    return _factor_mean(terms, normalised(weights))


def centred_residual(terms: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return ``sum_k p_k B_k A_k - Bbar Abar`` exactly (FedEx-LoRA, arXiv 2410.09432).

    Because ``sum_k p_k (B_k - Bbar) = 0``, one constant C may be taken from every A_k::

        sum_k p_k B_k A_k - Bbar Abar = sum_k p_k (B_k - Bbar) A_k = sum_k p_k (B_k - Bbar) (A_k - C)

    With ``C = A_K`` the last term vanishes: rank at most (K - 1) R, and 0 for one site.

    Parameters
    ----------
    terms, weights
        As in :func:`factor_mean`.

    Returns
    -------
    LowRank
        Of rank (K - 1) R.

    Raises
    ------
    RunError
        As :func:`factor_mean`.
    """
    require_alike(terms, weights)
    shares = np.array(normalised(weights))
    ups, downs = _padded(terms)
    (out, into), inside = terms[0].shape, (len(terms) - 1) * ups.shape[2]
    up = shares[:-1, None, None] * (ups[:-1] - np.tensordot(shares, ups, 1))
    down = downs[:-1] - downs[-1]
    return LowRank(up.transpose(1, 0, 2).reshape(out, inside), down.reshape(inside, into))


def rank_partitioned(terms: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Average each rank component only over the sites that own it (raFLoRA, arXiv 2602.13486).

    The rank axis is cut at the distinct ranks; within a partition the weights of its owners are
    renormalised. Component j of site k (j < r_k) thus weighs ``p_k / sum(p_i : r_i > j)``. Dividing
    by the owners alone keeps high components from fading round after round ("rank collapse").

    Parameters
    ----------
    terms, weights
        As in :func:`factor_mean`. Components must be in a common order (:func:`truncate`'s).

    Returns
    -------
    LowRank
        Of rank ``sum_k r_k``, stacked and not truncated. For equal ranks the mean of the products.

    Raises
    ------
    RunError
        As :func:`factor_mean`.
    """
    require_alike(terms, weights)
    shares = np.array(normalised(weights))
    ranks = np.array([term.rank for term in terms])
    owned = np.array([shares[ranks > j].sum() for j in range(ranks.max())])
    owners = [
        LowRank(term.up * (share / owned[: term.rank]), term.down)
        for term, share in zip(terms, shares, strict=True)
    ]
    return stack(owners, [1.0] * len(owners))


def sparsity_weights(terms: Sequence[LowRank]) -> list[float]:
    """Return shares proportional to ``||B_k A_k||_F`` (HetLoRA, arXiv 2401.06432).

    Uniform where every term is zero; a zero term among others gets the share 0.

    Raises
    ------
    RunError
        If there is no term, or the shapes differ.
    """
    require_alike(terms, [1.0] * len(terms))
    norms = [norm(term) for term in terms]
    total = sum(norms)
    return [size / total if total > 0 else 1 / len(terms) for size in norms]


def hetlora(terms: Sequence[LowRank]) -> LowRank:
    """Return the zero-padded factor mean under :func:`sparsity_weights` (HetLoRA, arXiv 2401.06432).

    Raises
    ------
    RunError
        If there is no term, or the shapes differ.
    """
    return _factor_mean(terms, sparsity_weights(terms))


def fair(terms: Sequence[LowRank], weights: Sequence[float], *, tolerance: float = 1e-6) -> LowRank:
    """Keep Abar and refit B to the mean of the products (LoRA-FAIR, arXiv 2411.14961).

    The paper fits B by SGD with a penalty; here is the least-squares solution without one::

        B* = argmin_B || sum_k p_k B_k A_k - B Abar ||_F = sum_k p_k B_k (A_k Abar^+)

    ``Abar^+ = Abar^T (Abar Abar^T)^+``, taken from the SVD of Abar itself: the Gram would square its
    condition number.

    Parameters
    ----------
    terms, weights
        As in :func:`factor_mean`.
    tolerance : float
        Singular values of Abar below this share of the largest count as zero. The default is above
        the rounding of factors that travelled in float32.

    Returns
    -------
    LowRank
        B* (m, R) and Abar (R, n). The mean of the products projected on Abar's row space.

    Raises
    ------
    RunError
        As :func:`factor_mean`.
    """
    require_alike(terms, weights)
    shares = normalised(weights)
    mean = _factor_mean(terms, shares)
    inverse = np.linalg.pinv(mean.down, rcond=tolerance)
    up = sum(
        (share * term.up @ (term.down @ inverse) for term, share in zip(terms, shares, strict=True)),
        start=np.zeros_like(mean.up),
    )
    return LowRank(up, mean.down)


def _padded(terms: Sequence[LowRank]) -> tuple[Matrix64, Matrix64]:
    """Return all ups (K, m, R) and downs (K, R, n)."""
    rank = max(term.rank for term in terms)
    padded = [term.padded(rank) for term in terms]
    return np.stack([term.up for term in padded]), np.stack([term.down for term in padded])


def _factor_mean(terms: Sequence[LowRank], shares: Sequence[float]) -> LowRank:
    ups, downs = _padded(terms)
    return LowRank(np.tensordot(np.array(shares), ups, 1), np.tensordot(np.array(shares), downs, 1))
