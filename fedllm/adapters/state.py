"""The adapter state: what travels, what strategies aggregate, what checkpoints hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from fedllm.errors import MismatchError

Matrix = npt.NDArray[np.float32]
Layout = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """What is needed to interpret an adapter's matrices.

    Attributes
    ----------
    method : str
        Registry name of the adapter method.
    rank : int
        Rank r of every adapted matrix.
    scale : float
        Factor s of the update, alpha / r (or alpha / sqrt r).
    shapes : Mapping[str, tuple[int, int]]
        Module path -> (out, in) of every adapted linear map, in model order.
    basis : str
        How the frozen matrices are obtained: ``none``, ``seeded:<16 hex digits>`` or
        ``shipped:<sha256>``.
    base : str
        Fingerprint of the base model's architecture (config and adapted shapes).
    heads : int
        Parallel blocks of a matrix (RAVAN); 1 elsewhere.
    head : Mapping[str, tuple[int, int]]
        Module path -> (out, in) of an encoder's classification head, trained whole with its
        biases; empty for causal models.
    width : int
        Hidden size, for methods whose matrices belong to no module.
    """

    method: str
    rank: int
    scale: float
    shapes: Mapping[str, tuple[int, int]]
    basis: str
    base: str
    heads: int = 1
    head: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    width: int = 0

    def to_json(self) -> str:
        """Return the spec as canonical JSON."""
        values = dict(vars(self))
        for name in ("shapes", "head"):
            values[name] = {module: list(shape) for module, shape in values[name].items()}
        return json.dumps(values, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> AdapterSpec:
        """Read a spec written by :meth:`to_json`."""
        values = json.loads(text)
        for name in ("shapes", "head"):
            values[name] = {module: (int(o), int(i)) for module, (o, i) in values[name].items()}
        return AdapterSpec(**values)

    @property
    def digest(self) -> str:
        """Return the sha256 of the canonical JSON, as hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@dataclass(frozen=True)
class AdapterState:
    """Named float32 matrices of one adapter and the spec that gives them meaning.

    Keys are ``<module path>.<matrix name>`` in model order, such as
    ``model.layers.0.self_attn.q_proj.R``. The arrays are read-only.
    """

    spec: AdapterSpec
    tensors: Mapping[str, Matrix]

    def __post_init__(self) -> None:
        frozen: dict[str, Matrix] = {}
        for key, value in self.tensors.items():
            array = np.ascontiguousarray(value, dtype=np.float32)
            if array is value or array.base is not None:
                array = array.copy()
            array.flags.writeable = False
            frozen[key] = array
        object.__setattr__(self, "tensors", MappingProxyType(frozen))

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        """Return key -> shape, in order."""
        return {key: value.shape for key, value in self.tensors.items()}

    @property
    def size(self) -> int:
        """Return the number of scalars."""
        return sum(value.size for value in self.tensors.values())

    def with_tensors(self, tensors: Mapping[str, Matrix]) -> AdapterState:
        """Return a state of the same spec with other matrices."""
        return AdapterState(self.spec, tensors)

    def only(self, names: Collection[str]) -> AdapterState:
        """Return the state of the matrices with these names alone (``A``, ``R``, ...), in order."""
        return self.with_tensors(
            {key: value for key, value in self.tensors.items() if matrix_name(key) in names}
        )

    def updated(self, other: AdapterState) -> AdapterState:
        """Return this state with the other's matrices in the place of its own."""
        return self.with_tensors({**self.tensors, **other.tensors})

    def zeros(self) -> AdapterState:
        """Return a state of the same layout filled with zeros."""
        return self.with_tensors({key: np.zeros_like(value) for key, value in self.tensors.items()})


def matrix_name(key: str) -> str:
    """Return the matrix's name in a key.

    >>> matrix_name("model.layers.0.self_attn.q_proj.R")
    'R'
    """
    return key.rpartition(".")[2]


def require_same_spec(ours: AdapterSpec, theirs: AdapterSpec, *, site: str) -> None:
    """Refuse two specs that differ.

    Raises
    ------
    MismatchError
        Naming the first difference and the site.
    """
    left, right = vars(ours), vars(theirs)
    for name in ("method", "rank", "scale", "basis", "base", "heads", "width"):
        if left[name] != right[name]:
            raise MismatchError(f"site {site}: adapter {name} is {right[name]}, expected {left[name]}.")
    require_same_layout(ours.shapes, theirs.shapes, site=site)
    require_same_layout(ours.head, theirs.head, site=site)


def require_same_layout(ours: Layout, theirs: Layout, *, site: str) -> None:
    """Refuse two layouts that differ.

    Raises
    ------
    MismatchError
        Naming the first missing key, extra key, or differing shape, and the site.
    """
    for key, shape in ours.items():
        if key not in theirs:
            raise MismatchError(f"site {site}: matrix '{key}' is missing.")
        if tuple(theirs[key]) != tuple(shape):
            raise MismatchError(
                f"site {site}: matrix '{key}' has shape {tuple(theirs[key])}, expected {tuple(shape)}."
            )
    extra = next((key for key in theirs if key not in ours), None)
    if extra is not None:
        raise MismatchError(f"site {site}: unexpected matrix '{extra}'.")
