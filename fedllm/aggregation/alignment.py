"""Turn a site's factors towards a reference before they are averaged (FedRot-LoRA)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fedllm.aggregation.lowrank import LowRank, Matrix64, require_alike
from fedllm.errors import RunError


def align(term: LowRank, reference: LowRank, *, factor: Literal["A", "B"], softness: float = 0.0) -> LowRank:
    """Return ``(B Q, Q^T A)``, the same product turned towards a reference (arXiv 2602.23638).

    The product does not change under a rotation Q, the mean of the factors does. Q is the rotation
    (orthogonal, determinant +1) that brings one factor nearest to the reference's (Procrustes)::

        factor "A":  Q = argmin || Q^T A - A_ref ||_F,  from M = A A_ref^T
        factor "B":  Q = argmin || B Q - B_ref ||_F,    from M = B^T B_ref

    ``M = U S V^T`` gives ``Q = U diag(1, .., 1, det(U V^T)) V^T``. A site undoes its own turn alone:
    a reflection against the reference (determinant -1) is met only as nearly as a rotation can.

    Parameters
    ----------
    term : LowRank
        A site's factors after its training.
    reference : LowRank
        The factors that the site received; the smaller of two ranks is zero-padded.
    factor : {"A", "B"}
        Which factor is matched; the paper alternates them by round.
    softness : float
        0 is the full ("hard") rotation Q, 1 none. Between, ``polar(softness I + (1 - softness) Q)``:
        the paper's lambda is ``1 - softness``, its range 0.4 to 0.6.

    Returns
    -------
    LowRank
        Of the larger of the two ranks. Where there is nothing to align with (M = 0, as in the first
        round with B = 0), the term as it is.

    Raises
    ------
    RunError
        If the shapes differ, the factor is unknown or the softness not in [0, 1].
    """
    require_alike((reference, term), (1.0, 1.0))
    if factor not in ("A", "B"):
        raise RunError(f'the factor to align is "A" or "B", not "{factor}".')
    if not 0 <= softness <= 1:
        raise RunError(f"softness is between 0 (full rotation) and 1 (none), not {softness}.")
    rank = max(term.rank, reference.rank)
    term, reference = term.padded(rank), reference.padded(rank)
    match = term.down @ reference.down.T if factor == "A" else term.up.T @ reference.up
    if not match.any():
        return term
    turn = nearest_rotation(match)
    if softness > 0:
        turn = nearest_rotation(softness * np.eye(rank) + (1 - softness) * turn)
    return LowRank(term.up @ turn, turn.T @ term.down)


def nearest_rotation(matrix: Matrix64) -> Matrix64:
    """Return the rotation (determinant +1) nearest to a square matrix, shape (r, r) (Kabsch 1976).

    Where the polar factor is a rotation already, it is that.
    """
    left, _, right = np.linalg.svd(matrix)
    flip = np.ones(len(matrix))
    flip[-1] = np.sign(np.linalg.det(left @ right))
    return np.asarray((left * flip) @ right, dtype=np.float64)
