"""What an aggregation rule is: its declarations, what sites do under it, and how updates combine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fedllm.adapters import METHODS
from fedllm.adapters.layers import Factors
from fedllm.adapters.method import HEAD
from fedllm.adapters.state import AdapterSpec, AdapterState, Matrix
from fedllm.aggregation.average import Mean
from fedllm.aggregation.lowrank import LowRank
from fedllm.errors import MismatchError
from fedllm.settings import StrategySettings

Branch = tuple[str, str, str]
Products = dict[Branch, LowRank]


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What a rule promises; the tables of the docs and of ``fedllm methods`` are made of these.

    Attributes
    ----------
    adapters : tuple[str, ...]
        Adapter methods the rule is defined for; empty: all.
    exact : str
        Whether the new global change is the weighted sum of the sites' changes.
    up, down : str
        Numbers a site sends and gets each round, in terms of rank r, sites K and an (m x n) matrix.
    noise_linear : bool
        Whether the noise of private sites enters the global change linearly.
    secure : bool
        Whether sums of what the sites send are all that the rule needs (secure aggregation).
    gauge_free : bool
        Whether ``(B G, G^-1 A)`` in the place of a site's (B, A) changes nothing.
    unequal_ranks : bool
        Whether sites may have ranks of their own.
    mean : bool
        Whether it is the plain mean of coordinates that mean the same at every site: then server
        optimisers and sparse updates are well-defined.
    personal : bool
        Whether sites keep some matrices to themselves; then there is no single global model.
    """

    name: str
    title: str
    paper: str
    adapters: tuple[str, ...]
    exact: str
    up: str
    down: str
    noise_linear: bool
    secure: bool
    gauge_free: bool
    unequal_ranks: bool
    mean: bool
    personal: bool = False


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """What every site does in one round, by matrix name; an encoder's head always trains.

    Attributes
    ----------
    train : tuple[str, ...]
        Matrices that train; the others stay as received.
    send : tuple[str, ...]
        Matrices that are sent.
    personal : tuple[str, ...]
        Matrices that stay at the site from round to round.
    restart : bool
        The site starts from a new seeded adapter; only what was folded into the base travels down.
    align : {"", "A", "B"}
        The factor that is turned towards the received one before sending.
    sketch : bool
        Whether the site sends sketches of its update, in two stages.
    """

    train: tuple[str, ...]
    send: tuple[str, ...]
    personal: tuple[str, ...] = ()
    restart: bool = False
    align: Literal["", "A", "B"] = ""
    sketch: bool = False

    def resting(self, spec: AdapterSpec) -> tuple[str, ...]:
        """Return the shared matrices that do not train; sites keep them instead of getting them anew."""
        return tuple(n for n in trained_names(spec) if n not in self.train and n not in self.personal)


@dataclass(frozen=True, kw_only=True)
class Update:
    """A valid reply of one site: what it sent, in its own rank, and its weight."""

    site: str
    state: AdapterState
    weight: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a round made.

    Attributes
    ----------
    state : AdapterState
        The next global adapter.
    folded : Factors or None
        Module path -> (U, D), float32, to fold into the frozen base at every site.
    """

    state: AdapterState
    folded: Factors | None = None


class Rule(ABC):
    """One aggregation rule; stateless.

    Parameters
    ----------
    settings : StrategySettings
        The recipe's ``[strategy]`` table.
    private : bool
        Whether sites train with differential privacy.
    """

    about: ClassVar[Declaration]

    def __init__(self, settings: StrategySettings, *, private: bool) -> None:
        self.settings = settings
        self.private = private

    def plan(self, spec: AdapterSpec, round: int) -> RoundPlan:
        """Return what sites do in a round, counted from 1; all matrices by default."""
        names = trained_names(spec)
        return RoundPlan(train=names, send=names)

    def changes(self, spec: AdapterSpec, round: int) -> tuple[str, ...]:
        """Return the shared matrices that a round changes; those that train by default."""
        return self.plan(spec, round).train

    def folded_rank(self, ranks: Sequence[int]) -> int:
        """Return the rank, at most, of what a round folds into the base, for estimates of bytes.

        Parameters
        ----------
        ranks : Sequence[int]
            Of every site's adapter.
        """
        return 0

    @abstractmethod
    def combine(self, current: AdapterState, updates: Iterable[Update], *, round: int) -> Outcome:
        """Return the outcome of a round.

        Parameters
        ----------
        current : AdapterState
            The adapter the round started from.
        updates : Iterable[Update]
            In the order of site names; consumed once, so that a rule which only sums holds one at
            a time.

        Raises
        ------
        RunError
            If there is no update.
        """


def trained_names(spec: AdapterSpec) -> tuple[str, ...]:
    """Return the names of all matrices that train under a spec, the head's among them."""
    return (*METHODS[spec.method].matrices(spec), *(HEAD if spec.head else ()))


def branches_of(spec: AdapterSpec) -> list[Branch]:
    """Return (module, up, down) of every product of a spec, in order."""
    return [(m, up, down) for m in spec.shapes for up, down in METHODS[spec.method].branches]


def product_of(state: AdapterState, branch: Branch) -> LowRank:
    """Return one branch's ``s B A``, the scale folded in."""
    module, up, down = branch
    scaled = state.spec.scale * state.tensors[f"{module}.{up}"].astype(np.float64)
    return LowRank(scaled, state.tensors[f"{module}.{down}"].astype(np.float64))


def products(state: AdapterState) -> Products:
    """Return every branch's ``s B A``."""
    return {branch: product_of(state, branch) for branch in branches_of(state.spec)}


def factors(spec: AdapterSpec, found: Products, *, current: AdapterState | None = None) -> dict[str, Matrix]:
    """Return products as matrices of a spec: padded or cut to its rank, the scale taken out of B.

    Parameters
    ----------
    current : AdapterState, optional
        Of the same spec. Where a product has nothing in a component, A keeps what it is there: with
        both factors zero both gradients vanish, and the component would never train again.
    """
    tensors: dict[str, Matrix] = {}
    for (module, up, down), term in found.items():
        padded = term.padded(spec.rank)
        ups, downs = padded.up[:, : spec.rank], padded.down[: spec.rank]
        if current is not None:
            empty = ~np.atleast_1d(ups.any(axis=0) | downs.any(axis=1))
            downs = np.where(empty[:, None], current.tensors[f"{module}.{down}"], downs)
        tensors[f"{module}.{up}"] = (ups / spec.scale).astype(np.float32)
        tensors[f"{module}.{down}"] = downs.astype(np.float32)
    return tensors


def start_for(current: AdapterState, spec: AdapterSpec) -> AdapterState:
    """Return the adapter a site of some rank starts from: the first components of the current one.

    Raises
    ------
    MismatchError
        If the method has no product to cut.
    """
    if spec == current.spec:
        return current
    if not METHODS[spec.method].branches:
        raise MismatchError(f"{METHODS[spec.method].title} has no ranks to cut.")
    found = {**factors(spec, products(current)), **current.only(HEAD).tensors}
    # payloads carry matrices in the spec's order
    return AdapterState(spec, {key: found[key] for key in METHODS[spec.method].trained_shapes(spec)})


def rest_mean(updates: Iterable[Update]) -> dict[str, Matrix]:
    """Return the weighted mean of what belongs to no product: an encoder's head, or nothing."""
    mean = Mean()
    for update in updates:
        mean.add(update.state.only(HEAD).tensors, update.weight)
    return mean.result()
