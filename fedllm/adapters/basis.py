"""Frozen matrices that never depend on private records, and how two parties compare them.

Fed-SB (arXiv 2502.15436) trains only R in ``W0 + s B R A``. The paper takes B and A from
gradients of private records; here they come from an 8-byte seed, or from the singular vectors of
the public base weights (the LoRA-XS start), so that they cost no privacy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedllm.adapters.state import Matrix
from fedllm.errors import MismatchError

PROJECTIONS = 4
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Basis:
    """Frozen factors of every adapted module.

    Attributes
    ----------
    up : Mapping[str, Matrix]
        Module path -> B, shape (out, rank); empty where B is trained.
    down : Mapping[str, Matrix]
        Module path -> A, shape (rank, in).
    core : Mapping[str, Matrix]
        Module path -> the R (rank, rank) to start from, where a gradient basis brings one.
    """

    up: Mapping[str, Matrix]
    down: Mapping[str, Matrix]
    core: Mapping[str, Matrix] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Matrix]:
        """Return all matrices under ``<module>.B``, ``<module>.A`` and ``<module>.R``."""
        parts = {"B": self.up, "A": self.down, "R": self.core}
        return {f"{m}.{name}": matrix for name, part in parts.items() for m, matrix in part.items()}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Matrix]) -> Basis:
        """Rebuild a basis from :attr:`tensors`."""
        up, down, core = (
            {key[:-2]: value for key, value in tensors.items() if key.endswith(f".{name}")} for name in "BAR"
        )
        return Basis(up=up, down=down, core=core)

    @property
    def digest(self) -> str:
        """Return the sha256 over names and float32 bytes."""
        digest = hashlib.sha256()
        for key, value in sorted(self.tensors.items()):
            digest.update(key.encode())
            digest.update(np.ascontiguousarray(value, dtype="<f4").tobytes())
        return digest.hexdigest()


def generator(seed: str, *names: str) -> np.random.Generator:
    """Return a Philox generator keyed by the sha256 of a seed and names (same on any machine)."""
    key = hashlib.sha256("\x1f".join((seed, *names)).encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))


def orthonormal(seed: str, name: str, *, rows: int, columns: int) -> Matrix:
    """Draw a (rows, columns) matrix with orthonormal columns, uniformly over such matrices.

    QR of a float64 Gaussian draw, columns signed so that R's diagonal is positive.
    """
    draw = generator(seed, name).standard_normal((rows, columns))
    q, r = np.linalg.qr(draw)
    return np.asarray(q * np.where(np.diag(r) < 0, -1.0, 1.0), dtype=np.float32)


def seeded_basis(shapes: Mapping[str, tuple[int, int]], *, rank: int, seed: str, heads: int = 1) -> Basis:
    """Return orthonormal B (out, heads rank) and A (heads rank, in) of every module from one seed.

    Where all heads together have more columns than the matrix has rows, each head's own columns
    are orthonormal and those of two heads are not.
    """

    def columns(name: str, rows: int) -> Matrix:
        if heads * rank <= rows:
            return orthonormal(seed, name, rows=rows, columns=heads * rank)
        drawn = [orthonormal(seed, f"{name}.{head}", rows=rows, columns=rank) for head in range(heads)]
        return np.hstack(drawn)

    return Basis(
        up={module: columns(f"{module}.B", out) for module, (out, _) in shapes.items()},
        down={module: columns(f"{module}.A", into).T for module, (_, into) in shapes.items()},
    )


def kaiming_basis(shapes: Mapping[str, tuple[int, int]], *, rank: int, seed: str) -> Basis:
    """Return FFA-LoRA's frozen A (rank, in), uniform within ``1/sqrt(in)`` as PEFT draws it."""
    down = {}
    for module, (_, into) in shapes.items():
        bound = 1.0 / np.sqrt(into)
        draw = generator(seed, f"{module}.A").uniform(-bound, bound, (rank, into))
        down[module] = draw.astype(np.float32)
    return Basis(up={}, down=down)


def svd_basis(weights: Mapping[str, npt.NDArray[np.float32]], *, rank: int) -> Basis:
    """Return the top singular vectors of each base weight (LoRA-XS's start, with R0 = 0).

    Signs: the entry of largest magnitude in each left vector is positive, and the right vector
    follows, so that two machines agree.

    Parameters
    ----------
    weights : Mapping[str, ndarray]
        Module path -> W0, shape (out, in).
    rank : int
        Number of singular directions kept.
    """
    up, down = {}, {}
    for module, weight in weights.items():
        left, _, right = np.linalg.svd(weight.astype(np.float32), full_matrices=False)
        left, right = left[:, :rank], right[:rank]
        signs = np.sign(left[np.abs(left).argmax(axis=0), np.arange(rank)])
        up[module] = np.ascontiguousarray(left * signs)
        down[module] = np.ascontiguousarray(right * signs[:, None])
    return Basis(up=up, down=down)


def gradient_basis(
    gradients: Mapping[str, npt.NDArray[np.float32]], *, rank: int, step: float | None, scale: float
) -> Basis:
    """Return Fed-SB's own start: the top singular directions of a first step of AdamW.

    ``-step sign(G)`` is that step for the summed gradient G (LoRA-SB, arXiv 2411.19557), and its best
    rank-r approximation s B R A is what training starts from. With ``step=None`` the directions are
    those of -G itself and R starts at zero: the sign of a noised gradient has lost the little
    low-rank structure that noise leaves.

    Parameters
    ----------
    gradients : Mapping[str, ndarray]
        Module path -> summed gradient of the weight, shape (out, in).
    step : float or None
        Effective learning rate of that step.
    scale : float
        The adapter's s.
    """
    if step is None:
        return svd_basis({module: -gradient for module, gradient in gradients.items()}, rank=rank)
    updates = {m: np.asarray(-step * np.sign(g), dtype=np.float32) for m, g in gradients.items()}
    basis = svd_basis(updates, rank=rank)
    values = {m: np.diag(basis.up[m].T @ updates[m] @ basis.down[m].T) for m in updates}
    return Basis(up=basis.up, down=basis.down, core={m: np.diag(v / scale) for m, v in values.items()})


def projections(basis: Basis, *, seed: str) -> tuple[float, ...]:
    """Return a few seeded random projections of a basis.

    QR differs in the last bits between machines, so two seeded bases are compared by numbers
    and not by their bytes. Each projection is the inner product of all matrices with one seeded
    Gaussian draw, divided by the basis' norm.
    """
    tensors = basis.tensors
    norm = np.sqrt(sum(float(np.sum(value.astype(np.float64) ** 2)) for value in tensors.values()))
    return tuple(
        float(
            sum(
                np.vdot(generator(seed, "probe", str(probe), key).standard_normal(value.shape), value)
                for key, value in sorted(tensors.items())
            )
            / max(norm, 1e-30)
        )
        for probe in range(PROJECTIONS)
    )


def require_same_basis(ours: tuple[float, ...], theirs: tuple[float, ...], *, site: str) -> None:
    """Refuse a site whose seeded basis is not ours within 1e-4.

    Raises
    ------
    MismatchError
        Naming the site and the first projection that differs.
    """
    if len(ours) != len(theirs):
        raise MismatchError(f"site {site}: sent {len(theirs)} basis projections, expected {len(ours)}.")
    for index, (left, right) in enumerate(zip(ours, theirs, strict=True)):
        if not abs(left - right) <= TOLERANCE:
            raise MismatchError(
                f"site {site}: its seeded basis differs (projection {index}: {right:.6f}, expected "
                f"{left:.6f}); compare the versions of fedllm and numpy."
            )
