"""What the server sends a site for a round, and how it reads what comes back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedllm.adapters.layers import Factors
from fedllm.adapters.method import HEAD
from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.aggregation import RoundPlan
from fedllm.aggregation.lowrank import LowRank, truncate
from fedllm.aggregation.rule import start_for
from fedllm.config import Config
from fedllm.errors import RunError, WireError
from fedllm.federation.blobs import digest, join_factors, pack_factors, read_factors
from fedllm.federation.local import layout_of, restart_state, sends_changes, shared_names
from fedllm.federation.records import ADAPTER, Note, Parts
from fedllm.runs.folder import atomic_write
from fedllm.training.spec import site_spec
from fedllm.wire import decode, encode

#: What rules have folded into the base, beside an exported adapter's own matrices.
FOLDED_FILE = "fedllm_folded.safetensors"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A low-rank update that every site folds into its base.

    Attributes
    ----------
    rank : int
        Largest rank of a module.
    """

    digest: str
    payload: bytes
    rank: int


@dataclass(kw_only=True)
class Folded:
    """All updates folded into the base so far."""

    spec: AdapterSpec
    pieces: list[Piece] = field(default_factory=list)

    def add(self, found: Factors, *, cap: int) -> float:
        """Add an update; above the cap all are recompressed to it. Return the energy's share lost.

        Recompressed is the sum: the best approximation of that rank of each module.
        """
        self.pieces.append(_piece(found))
        if sum(piece.rank for piece in self.pieces) <= cap:
            return 0.0
        lost = whole = 0.0
        compressed = {}
        for module, (up, down) in self.factors().items():
            total = truncate(LowRank(up.astype(np.float64), down.astype(np.float64)))
            compressed[module] = (total.up[:, :cap].astype(np.float32), total.down[:cap].astype(np.float32))
            energies = (total.up**2).sum(axis=0)
            lost, whole = lost + energies[cap:].sum(), whole + energies.sum()
        self.pieces = [_piece(compressed)]
        return float(lost / whole) if whole > 0 else 0.0

    def factors(self) -> Factors:
        """Return their sum: module path -> (U, D)."""
        return join_factors([read_factors(piece.payload, self.spec) for piece in self.pieces])


def save_folded(folded: Folded, folder: Path) -> None:
    """Write what was folded into the base beside an adapter's matrices: a later run goes on from both.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    if folded.pieces:
        atomic_write(folder / FOLDED_FILE, _piece(folded.factors()).payload)


def load_folded(spec: AdapterSpec, folder: Path) -> Folded:
    """Return what :func:`save_folded` wrote; nothing where nothing was folded.

    Raises
    ------
    RunError
        If it is damaged, or not of the spec.
    """
    path = folder / FOLDED_FILE
    try:
        return Folded(spec=spec, pieces=[_piece(read_factors(path.read_bytes(), spec))])
    except FileNotFoundError:
        return Folded(spec=spec)
    except (OSError, WireError) as error:
        raise RunError(
            f"adapter.init: {path} cannot be used ({error}); give the adapter folder of a finished run."
        ) from None


class Sender:
    """Builds the down messages of one exchange; what several sites get is encoded once.

    Parameters
    ----------
    state : AdapterState
        The federation's adapter.
    held : Mapping[str, set[str]]
        Site -> digests of payloads it has.
    codec : str
        How its matrices travel.
    """

    def __init__(
        self,
        config: Config,
        state: AdapterState,
        folded: Folded,
        held: Mapping[str, set[str]],
        *,
        codec: str,
    ) -> None:
        self._config = config
        self._state = state
        self._folded = folded
        self._held = held
        self._codec = codec
        self._encoded: dict[tuple[int, tuple[str, ...]], bytes] = {}

    def message(self, site: str, rank: int, plan: RoundPlan) -> tuple[dict[str, Note], Parts]:
        """Return notes and payloads of a site's message."""
        spec = site_spec(self._state.spec, rank, self._config.adapter)
        names, held = shared_names(plan, spec), self._held.get(site, set())
        notes: dict[str, Note] = {}
        parts: dict[str, bytes] = {}
        if names and plan.resting(spec) and not plan.restart:
            groups = {}
            for name in names:
                payload = self._encode(spec, (name,))
                groups[name] = digest(payload)
                if groups[name] not in held:
                    parts[groups[name]] = payload
            notes["groups"] = json.dumps(groups, separators=(",", ":"))
        elif names:
            parts[ADAPTER] = self._encode(spec, names)
        if self._folded.pieces:
            notes["folded"] = [piece.digest for piece in self._folded.pieces]
            parts |= {p.digest: p.payload for p in self._folded.pieces if p.digest not in held}
        return notes, parts

    def _encode(self, spec: AdapterSpec, names: tuple[str, ...]) -> bytes:
        key = (spec.rank, names)
        if key not in self._encoded:
            start = start_for(self._state, spec).only(names)
            self._encoded[key] = encode(start, codec=self._codec)
        return self._encoded[key]


def read_update(
    config: Config, current: AdapterState, payload: bytes, *, rank: int, plan: RoundPlan, round: int
) -> AdapterState:
    """Return the matrices a site sent, as a state of its rank.

    Raises
    ------
    WireError
        If the payload is not what was agreed on.
    """
    spec = site_spec(current.spec, rank, config.adapter)
    sent = decode(payload, spec=spec, layout=layout_of(spec, plan.send), codec=config.wire.codec)
    if not sends_changes(config):
        return sent
    start = restart_state(config, spec, round) if plan.restart else start_for(current, spec)
    if plan.restart and spec.head:
        start = start.updated(current.only(HEAD))
    return sent.with_tensors({key: start.tensors[key] + value for key, value in sent.tensors.items()})


def _piece(found: Factors) -> Piece:
    payload = pack_factors(found)
    rank = max((up.shape[1] for up, _ in found.values()), default=0)
    return Piece(digest=digest(payload), payload=payload, rank=rank)
