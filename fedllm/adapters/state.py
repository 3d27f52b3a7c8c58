"""The adapter state: what travels, what strategies aggregate, what checkpoints hold."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
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
        Factor s of the update, alpha / r.
    shapes : Mapping[str, tuple[int, int]]
        Module path -> (out, in) of every adapted linear map, in model order.
    basis : str
        How the frozen matrices are obtained: ``none``, ``seeded:<16 hex digits>`` or
        ``shipped:<sha256>``.
    base : str
        Fingerprint of the base model's architecture (config and adapted shapes).
    """

    method: str
    rank: int
    scale: float
    shapes: Mapping[str, tuple[int, int]]
    basis: str
    base: str

    def to_json(self) -> str:
        """Return the spec as canonical JSON."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["shapes"] = {module: list(shape) for module, shape in self.shapes.items()}
        return json.dumps(values, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> AdapterSpec:
        """Read a spec written by :meth:`to_json`."""
        values = json.loads(text)
        values["shapes"] = {module: (int(o), int(i)) for module, (o, i) in values["shapes"].items()}
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

    def zeros(self) -> AdapterState:
        """Return a state of the same layout filled with zeros."""
        return self.with_tensors({key: np.zeros_like(value) for key, value in self.tensors.items()})


def require_same_spec(ours: AdapterSpec, theirs: AdapterSpec, *, site: str) -> None:
    """Refuse two specs that differ.

    Raises
    ------
    MismatchError
        Naming the first difference and the site.
    """
    for name in ("method", "rank", "scale", "basis", "base"):
        left, right = getattr(ours, name), getattr(theirs, name)
        if left != right:
            raise MismatchError(f"site {site}: adapter {name} is {right}, expected {left}.")
    require_same_layout(ours.shapes, theirs.shapes, site=site)


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
