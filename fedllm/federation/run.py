"""The server's view of one run: settings, folder, adapter spec, and the sites that joined."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from flwr.serverapp import Grid
from safetensors.numpy import load_file, save, save_file

from fedllm.adapters import METHODS
from fedllm.adapters.basis import Basis, projections, require_same_basis
from fedllm.adapters.export import load_state
from fedllm.adapters.state import AdapterSpec, AdapterState, require_same_layout
from fedllm.config import Config
from fedllm.errors import FedllmError, MismatchError, RunError
from fedllm.federation.client import read_basis
from fedllm.federation.exchange import Peer, Reply, exchange
from fedllm.federation.records import Note, pack, text
from fedllm.runs.checkpoints import latest_checkpoint
from fedllm.runs.events import append_event, read_events
from fedllm.runs.folder import RunFolder
from fedllm.training.spec import adapter_spec, basis_from_seed, basis_seed
from fedllm.wire import encode

BASIS_FILE = "fedllm_basis.safetensors"


@dataclass(kw_only=True)
class ServerRun:
    """Everything the round loop needs; it never holds the base model's weights.

    Attributes
    ----------
    state : AdapterState
        The federation's current adapter.
    next_round : int
        The round to run next, from 1.
    peers : dict[str, Peer]
        Sites that joined, by name.
    weights : str
        Fingerprint of the base weights, learnt from the first accepted reply.
    """

    config: Config
    folder: RunFolder
    run_id: str
    spec: AdapterSpec
    basis: Basis | None
    seed: str
    state: AdapterState
    next_round: int = 1
    weights: str = ""
    simulated: bool = True
    peers: dict[str, Peer] = field(default_factory=dict)
    refused: dict[tuple[int, int], str] = field(default_factory=dict)
    holders: set[str] = field(default_factory=set)

    @property
    def quorum(self) -> int:
        """Return the number of valid replies a round needs."""
        return self.config.federation.quorum or (self.config.federation.sites + 1) // 2

    def notes(self, peer: Peer, **more: Note) -> dict[str, Note]:
        """Return what every message to a peer carries."""
        return {
            "config": json.dumps(self.config.changed(), separators=(",", ":")),
            "index": peer.index,
            "basis": self.spec.basis,
            "run": self.run_id,
            **more,
        }

    def payload(self) -> bytes:
        """Return the current adapter as the wire carries it."""
        return encode(self.state, codec=self.config.wire.codec)


def start_run(config: Config, folder: RunFolder) -> ServerRun:
    """Build a new run's state from the recipe and the model's shapes, or from ``adapter.init``.

    Raises
    ------
    MismatchError
        If the adapter of ``adapter.init`` is not of the recipe's form.
    """
    spec = adapter_spec(config)
    seed = basis_seed(config)
    state = METHODS[spec.method].initial_state(spec, seed=seed)
    if config.adapter.init:
        found, seed = load_state(Path(config.adapter.init))
        for name in ("method", "rank", "scale", "base"):
            if getattr(found.spec, name) != getattr(spec, name):
                raise MismatchError(
                    f"adapter.init: that adapter's {name} is {getattr(found.spec, name)}, the recipe's is "
                    f"{getattr(spec, name)}."
                )
        require_same_layout(state.layout, found.layout, site="adapter.init")
        spec, state = found.spec, found
    return ServerRun(
        config=config,
        folder=folder,
        run_id=uuid.uuid4().hex[:12],
        spec=spec,
        basis=_known_basis(
            spec, Path(config.adapter.init) if config.adapter.init else folder.checkpoints_dir
        ),
        seed=seed,
        state=state,
    )


def require_unfinished(folder: RunFolder) -> None:
    """Refuse a run that has nothing left to do.

    Raises
    ------
    RunError
        If it is finished.
    """
    if any(event["event"] == "run_finished" for event in read_events(folder)):
        raise RunError(f"{folder.path}: this run is finished; there is nothing to resume.")


def resume_run(config: Config, folder: RunFolder) -> ServerRun:
    """Take a run up again after its newest intact checkpoint.

    After the last round only the final evaluation and the export are left to do.
    """
    started = [event for event in read_events(folder) if event["event"] == "run_started"]
    run = start_run(config, folder)
    checkpoint, warnings = latest_checkpoint(folder)
    for warning in warnings:
        append_event(folder, "warning", text=warning)
    if started:
        run.run_id = str(started[0]["run_id"])
    if checkpoint is not None:
        run.state, run.spec = checkpoint.state, checkpoint.state.spec
        run.basis = _known_basis(run.spec, folder.checkpoints_dir)
        run.seed = checkpoint.extra["seed"]
        run.weights = checkpoint.extra["weights"]
        run.next_round = checkpoint.round + 1
    append_event(folder, "run_resumed", round=run.next_round)
    return run


def _known_basis(spec: AdapterSpec, folder: Path) -> Basis | None:
    basis = basis_from_seed(spec)
    path = folder / BASIS_FILE
    if basis is None and path.is_file():
        basis = Basis.from_tensors(load_file(path))
    return basis


def gather_sites(run: ServerRun, grid: Grid) -> None:
    """Greet nodes until all sites have joined, or a quorum has and ``join_wait`` is over.

    Raises
    ------
    RunError
        If fewer sites than the quorum joined, with each refusal's reason.
    """
    start = time.monotonic()
    sites = run.config.federation.sites
    while True:
        greet(run, grid)
        waited = time.monotonic() - start
        if len(run.peers) >= sites:
            return
        nodes = len(run.peers) + len(run.refused)
        if waited > run.config.federation.join_wait or nodes >= sites:
            if len(run.peers) >= run.quorum:
                return
            reasons = (
                "; ".join(sorted({reason.rstrip(".") for reason in run.refused.values()}))
                or "no SuperNode is connected"
            )
            raise RunError(f"{len(run.peers)} of {sites} sites joined, {run.quorum} are needed: {reasons}")
        time.sleep(0.5)


def greet(run: ServerRun, grid: Grid) -> None:
    """Ask nodes that are new who they are, and take in those whose adapter spec is the run's."""
    known = {peer.node for peer in run.peers.values()} | {node for node, _ in run.refused}
    nodes = sorted(set(grid.get_node_ids()))
    new = [node for node in nodes if node not in known]
    if not new:
        return
    taken = {peer.index for peer in run.peers.values()}
    free = [index for index in range(run.config.federation.sites) if index not in taken]
    replies = _hello(
        run, grid, [Peer(name=f"node {n}", node=n, index=i) for n, i in zip(new, free, strict=False)]
    )
    for reply in replies:
        _welcome(run, reply)
    if replies and all(reply.notes.get("simulated") is True for reply in replies if not reply.reason):
        # a simulation may have fewer nodes than sites: nodes are only workers there
        rest = free[len(replies) :]
        more = [Peer(name=f"site {i}", node=new[i % len(new)], index=i) for i in rest]
        for reply in _hello(run, grid, more):
            _welcome(run, reply)


def _hello(run: ServerRun, grid: Grid, peers: list[Peer]) -> list[Reply]:
    spec = run.spec.to_json()
    return exchange(
        grid,
        [(peer, pack(run.notes(peer, spec=spec))) for peer in peers],
        kind="query.hello",
        group="0",
        deadline=run.config.federation.deadline,
    )


def _welcome(run: ServerRun, reply: Reply) -> None:
    reason, name = reply.reason, ""
    try:
        name = text(reply.notes, "site", limit=80)
        if not reason:
            if not name:
                reason = "the site sent no name"
            elif name in run.peers and reply.notes.get("simulated") is not True:
                reason = f"site {name}: another node joined under this name"
            elif basis_from_seed(run.spec) is not None and run.basis is not None:
                sent = reply.notes.get("projections")
                values = tuple(float(value) for value in sent) if isinstance(sent, list) else ()
                require_same_basis(projections(run.basis, seed=run.spec.basis), values, site=name)
    except FedllmError as error:
        reason = str(error)
    if reason:
        run.refused[reply.peer.node, reply.peer.index] = reason
        append_event(run.folder, "warning", text=f"{name or reply.peer.name} was set aside: {reason}")
        return
    run.simulated = reply.notes.get("simulated") is True
    run.peers[name] = Peer(name=name, node=reply.peer.node, index=reply.peer.index)
    if reply.notes.get("has_basis") is True:
        run.holders.add(name)
    append_event(run.folder, "site_joined", site=name, node=reply.peer.node, simulated=run.simulated)


def ship_basis(run: ServerRun, grid: Grid) -> None:
    """Have one site make the public-svd basis where needed, and send it to those who lack it.

    The server never makes it: that would take the base model's weights.

    Raises
    ------
    RunError
        If no site could make it.
    """
    deadline = run.config.federation.deadline
    up = down = 0
    if run.basis is None:
        for name in sorted(run.peers):
            peer = run.peers[name]
            (reply,) = exchange(
                grid, [(peer, pack(run.notes(peer)))], kind="query.make_basis", group="0", deadline=deadline
            )
            up, down = up + reply.bytes_up, down + reply.bytes_down
            if not reply.reason and reply.payload is not None:
                run.basis = read_basis(reply.payload, run.spec)
                break
        if run.basis is None:
            raise RunError("no site could make the public-svd basis; see their logs.")
        spec = AdapterSpec(**{**vars(run.spec), "basis": f"shipped:{run.basis.digest}"})
        run.spec, run.state = spec, AdapterState(spec, run.state.tensors)
        run.folder.checkpoints_dir.mkdir(parents=True, exist_ok=True)
        save_file(run.basis.tensors, run.folder.checkpoints_dir / BASIS_FILE)
    lacking = [peer for name, peer in sorted(run.peers.items()) if name not in run.holders]
    if not lacking or not run.spec.basis.startswith("shipped:"):
        return
    payload = save(run.basis.tensors)
    contents = [(peer, pack(run.notes(peer), payload)) for peer in lacking]
    for reply in exchange(grid, contents, kind="query.keep_basis", group="0", deadline=deadline):
        up, down = up + reply.bytes_up, down + reply.bytes_down
        if reply.reason:
            append_event(
                run.folder, "warning", text=f"{reply.peer.name} did not take the basis: {reply.reason}"
            )
        else:
            run.holders.add(reply.peer.name)
    append_event(run.folder, "basis_shipped", bytes_up=up, bytes_down=down)
