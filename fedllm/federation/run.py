"""The server's view of one run: settings, folder, adapter spec, and the sites that joined."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import RecordDict
from flwr.serverapp import Grid
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedllm.adapters import METHODS
from fedllm.adapters.basis import Basis, projections, require_same_basis
from fedllm.adapters.export import load_state
from fedllm.adapters.state import AdapterSpec, AdapterState, require_same_layout
from fedllm.aggregation import RULES, RoundPlan, Rule, ServerOptimizer, make_optimizer, make_rule
from fedllm.aggregation.lowrank import Matrix64
from fedllm.config import Config
from fedllm.errors import FedllmError, MismatchError, RunError, WireError
from fedllm.federation.exchange import Peer, Reply, exchange
from fedllm.federation.heads import LedgerHeads
from fedllm.federation.local import codec_down
from fedllm.federation.makebasis import WITH_CORE, read_basis
from fedllm.federation.outgoing import Folded, Piece, Sender, load_folded
from fedllm.federation.records import BASIS, Note, Notes, Parts, numbers, pack, text, whole
from fedllm.runs.checkpoints import kept_extras, latest_checkpoint
from fedllm.runs.events import append_event, read_events
from fedllm.runs.folder import RunFolder, atomic_write, write_error
from fedllm.runs.manifest import versions
from fedllm.runs.tracking import Tracking
from fedllm.training.spec import adapter_spec, basis_from_seed, basis_seed

BASIS_FILE = "fedllm_basis.safetensors"
#: What a spec says of a basis that is shipped and not made yet.
SHIPPED = "shipped:"
#: Seconds a node gets to say who it is, where the run waits less for sites to join.
HELLO_SECONDS = 300.0
#: The same, for nodes that have not answered before.
HELLO_AGAIN_SECONDS = 10.0


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
        Fingerprint of the base weights, the one that most replies of the first round named.
    moments : dict[str, ndarray]
        What the server optimiser remembers.
    folded : Folded
        What the rule has folded into the base.
    data : dict[str, str]
        Site -> fingerprint of its training records, where the site tells it.
    kept : dict[str, set[str]]
        Site -> digests of the payloads it has.
    tags : dict[str, str]
        Site -> what names its privacy ledger; remembered together with the site's name, so that no site
        can speak for another's.
    clipping_norm : float
        The largest norm of a site's change in the next round, where whole sites are private.
    tracking : Tracking
        Where finished rounds are shown beside the run's own files.
    refused : dict[tuple[int, int], str]
        (node, index) -> why its site did not join.
    pending : dict[tuple[int, int], str]
        Those of ``refused`` that are asked again: (node, index) -> the site whose name the node gave while
        another one held it; empty where it has not answered at all, and may do so later.
    """

    config: Config
    folder: RunFolder
    run_id: str
    spec: AdapterSpec
    basis: Basis | None
    seed: str
    state: AdapterState
    rule: Rule
    optimizer: ServerOptimizer | None
    folded: Folded
    tracking: Tracking
    moments: dict[str, Matrix64] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    kept: dict[str, set[str]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    next_round: int = 1
    clipping_norm: float = 0.0
    weights: str = ""
    simulated: bool = True
    peers: dict[str, Peer] = field(default_factory=dict)
    refused: dict[tuple[int, int], str] = field(default_factory=dict)
    pending: dict[tuple[int, int], str] = field(default_factory=dict)
    holders: set[str] = field(default_factory=set)

    @property
    def heads(self) -> LedgerHeads:
        """Return what is known of the sites' privacy ledgers."""
        return LedgerHeads(self.folder.path)

    def ledger_of(self, site: str) -> str:
        """Return under what a site's privacy ledger is remembered."""
        return f"{site}/{self.tags[site]}"

    @property
    def quorum(self) -> int:
        """Return the number of valid replies a round needs."""
        return self.config.federation.needed

    def notes(self, peer: Peer, **more: Note) -> dict[str, Note]:
        """Return what every message to a peer carries."""
        return {
            "config": json.dumps(self.config.changed(), separators=(",", ":")),
            "index": peer.index,
            "basis": self.spec.basis,
            "run": self.run_id,
            **more,
        }

    def plan(self, round: int) -> RoundPlan:
        """Return what sites do in a round."""
        return self.rule.plan(self.spec, round)

    def messages(
        self, peers: list[Peer], round: int, **more: Note
    ) -> list[tuple[Peer, dict[str, Note], Parts]]:
        """Return each peer's message for a round: notes and payloads."""
        codec, plan = codec_down(self.config, round), self.plan(round)
        sender = Sender(self.config, self.state, self.folded, self.kept, codec=codec)
        found = []
        for peer in peers:
            notes, parts = sender.message(peer.name, peer.rank, plan)
            found.append((peer, self.notes(peer, round=round, **notes, **self.seen(peer), **more), parts))
        return found

    def seen(self, peer: Peer) -> dict[str, Note]:
        """Return the newest hash of a site's ledger, where the run is private."""
        if not self.config.privacy.enabled:
            return {}
        return {"ledger": self.heads.seen(self.ledger_of(peer.name), simulated=self.simulated)}

    def note_head(self, reply: Reply) -> None:
        """Remember the hash of a site's ledger that its reply names, even if nothing else of it is used."""
        head = text(reply.notes, "ledger", limit=64)
        self.heads.note(self.ledger_of(reply.peer.name), head, simulated=self.simulated)


def start_run(config: Config, folder: RunFolder) -> ServerRun:
    """Build a new run's state from the recipe and the model's shapes, or from ``adapter.init``.

    Raises
    ------
    MismatchError
        If the adapter of ``adapter.init`` is not of the recipe's form.
    RunError
        If it is damaged or not whole.
    """
    spec = adapter_spec(config)
    seed = basis_seed(config)
    state, folded = METHODS[spec.method].initial_state(spec, seed=seed), Folded(spec=spec)
    if config.adapter.init:
        found, seed = load_state(Path(config.adapter.init))
        for name in ("method", "rank", "scale", "base"):
            if getattr(found.spec, name) != getattr(spec, name):
                raise MismatchError(
                    f"adapter.init: that adapter's {name} is {getattr(found.spec, name)}, the recipe's is "
                    f"{getattr(spec, name)}."
                )
        require_same_layout(state.layout, found.layout, site="adapter.init")
        spec, state, folded = found.spec, found, load_folded(found.spec, Path(config.adapter.init))
    basis = _known_basis(spec, Path(config.adapter.init) if config.adapter.init else folder.checkpoints_dir)
    if config.adapter.init and basis is not None and spec.basis.startswith(SHIPPED):
        # where a resume after the first round looks for it
        _keep_basis(folder, basis)
    return ServerRun(
        clipping_norm=config.site_privacy.clipping_norm,
        rule=make_rule(config),
        optimizer=make_optimizer(config),
        folded=folded,
        config=config,
        folder=folder,
        tracking=Tracking(folder),
        run_id=uuid.uuid4().hex[:12],
        spec=spec,
        basis=basis,
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
    checkpoint, warnings = latest_checkpoint(folder)
    # a checkpoint holds all that a run goes on from; what it began from may be gone or another one by now
    run = start_run(config if checkpoint is None else config.replace(adapter__init=""), folder)
    run.config = config
    for warning in warnings:
        append_event(folder, "warning", text=warning)
    started = [event for event in read_events(folder) if event["event"] == "run_started"]
    if started:
        run.run_id = str(started[0]["run_id"])
    if run.basis is not None and run.spec.basis == SHIPPED:
        # the basis was made, and no round was finished with it
        _take_basis(run, run.basis)
    if checkpoint is not None:
        run.state, run.spec = checkpoint.state, checkpoint.state.spec
        run.basis = _known_basis(run.spec, folder.checkpoints_dir)
        run.moments = {key: value.astype("float64") for key, value in checkpoint.moments.items()}
        run.folded = Folded(spec=run.spec, pieces=_load_pieces(folder, checkpoint.extra.get("folded", "[]")))
        run.seed = checkpoint.extra["seed"]
        run.weights = checkpoint.extra["weights"]
        run.clipping_norm = float(checkpoint.extra["clipping_norm"])
        run.next_round = checkpoint.round + 1
    if not started:
        announce(run)
    append_event(folder, "run_resumed", round=run.next_round, versions=versions())
    return run


def announce(run: ServerRun) -> None:
    """Write down that a run has begun, and under which id its sites keep what is theirs."""
    append_event(
        run.folder,
        "run_started",
        run_id=run.run_id,
        sites=run.config.federation.sites,
        rounds=run.config.federation.rounds,
        config=run.config.changed(),
        versions=versions(),
    )


def _known_basis(spec: AdapterSpec, folder: Path) -> Basis | None:
    """Return the basis of a seed or a file; None where it is still to be made.

    Raises
    ------
    RunError
        If the spec names a basis that is not there: another one would not fit what was trained, and
        making it may cost privacy.
    """
    basis, path = basis_from_seed(spec), folder / BASIS_FILE
    if basis is not None:
        return basis
    try:
        basis = Basis.from_tensors(load_file(path))
    except FileNotFoundError:
        if spec.basis == SHIPPED:
            return None
        raise RunError(f"{path} is missing, and the adapter was trained with it; restore it.") from None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise RunError(f"{path} cannot be read ({type(error).__name__}); restore it.") from None
    if spec.basis not in (SHIPPED, f"{SHIPPED}{basis.digest}"):
        raise RunError(f"{path} is not the basis that the adapter was trained with; restore it.")
    return basis


def _keep_basis(folder: RunFolder, basis: Basis) -> None:
    atomic_write(folder.checkpoints_dir / BASIS_FILE, save(basis.tensors))


def _take_basis(run: ServerRun, basis: Basis) -> None:
    """Name a shipped basis in the run's spec, and start from the R that came with it."""
    run.basis = basis
    run.spec = AdapterSpec(**{**vars(run.spec), "basis": f"{SHIPPED}{basis.digest}"})
    start = {f"{module}.R": core for module, core in basis.core.items()}
    run.state = AdapterState(run.spec, {**run.state.tensors, **start})
    run.folded = Folded(spec=run.spec)


def save_pieces(run: ServerRun) -> str:
    """Write what was folded into the base beside the checkpoints, and return its list as JSON."""
    for piece in run.folded.pieces:
        path = run.folder.checkpoints_dir / f"folded-{piece.digest}.safetensors"
        if not path.is_file():
            atomic_write(path, piece.payload)
    return json.dumps([[piece.digest, piece.rank] for piece in run.folded.pieces])


def drop_pieces(folder: RunFolder) -> None:
    """Remove what was folded into the base in rounds whose checkpoints are gone.

    Raises
    ------
    RunError
        If a file cannot be removed.
    """
    kept = {name for extra in kept_extras(folder) for name, _ in json.loads(extra.get("folded", "[]"))}
    for path in folder.checkpoints_dir.glob("folded-*.safetensors"):
        if path.stem.removeprefix("folded-") not in kept:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise write_error(path, error) from None


def _load_pieces(folder: RunFolder, listed: str) -> list[Piece]:
    pieces = []
    for name, rank in json.loads(listed):
        path = folder.checkpoints_dir / f"folded-{name}.safetensors"
        try:
            pieces.append(Piece(digest=name, payload=path.read_bytes(), rank=rank))
        except OSError as error:
            raise RunError(f"{path}: cannot be read ({error.strerror}); the run cannot go on.") from None
    return pieces


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
        # a refused node may have been asked for several simulated sites
        nodes = len(run.peers) + len({node for node, _ in run.refused})
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
    connected = set(grid.get_node_ids())
    new = [node for node in sorted(connected) if node not in known]
    if not new:
        return
    free = _free_seats(run, connected)
    patience = max(run.config.federation.join_wait, HELLO_SECONDS)
    replies = _hello(run, grid, _seated(new, free), patience=patience)
    for reply in replies:
        _welcome(run, reply, connected)
    good = [reply for reply in replies if not reply.reason]
    if good and all(reply.notes.get("simulated") is True for reply in good):
        # a simulation may have fewer nodes than sites: nodes are only workers there
        rest = free[len(replies) :]
        more = [Peer(name=f"site {i}", node=new[i % len(new)], index=i) for i in rest]
        for reply in _hello(run, grid, more, patience=patience):
            _welcome(run, reply, connected)


def greet_again(run: ServerRun, grid: Grid) -> None:
    """Ask those who have not answered once more, and who gave the name of a site whose node has gone.

    What else a site said itself is not asked for again. They have had time to get ready, so that a round
    waits less for them than the start did.
    """
    connected = set(grid.get_node_ids())
    gone = {"", *(name for name, peer in run.peers.items() if peer.node not in connected)}
    again = sorted(seat for seat, name in run.pending.items() if seat[0] in connected and name in gone)
    peers = _seated([node for node, _ in again], _free_seats(run, connected))
    for seat in again[: len(peers)]:
        del run.pending[seat], run.refused[seat]
    if peers:
        patience = max(run.config.federation.join_wait, HELLO_AGAIN_SECONDS)
        for reply in _hello(run, grid, peers, patience=patience):
            _welcome(run, reply, connected)


def _free_seats(run: ServerRun, connected: Set[int]) -> list[int]:
    """Return the seats of no site, or of one whose node has gone."""
    taken = {peer.index for peer in run.peers.values() if peer.node in connected}
    return [index for index in range(run.config.federation.sites) if index not in taken]


def _seated(nodes: list[int], seats: list[int]) -> list[Peer]:
    """Return a peer a node, as far as there are seats."""
    return [Peer(name=f"node {n}", node=n, index=i) for n, i in zip(nodes, seats, strict=False)]


def _hello(run: ServerRun, grid: Grid, peers: list[Peer], *, patience: float) -> list[Reply]:
    spec = run.spec.to_json()
    contents = [(peer, pack(run.notes(peer, spec=spec))) for peer in peers]
    return counted(run, grid, contents, stage="hello", kind="query.hello", round=0, patience=patience)


def counted(
    run: ServerRun,
    grid: Grid,
    contents: list[tuple[Peer, RecordDict]],
    *,
    stage: str,
    kind: str,
    round: int,
    patience: float = math.inf,
) -> list[Reply]:
    """Exchange messages outside training, and record their bytes as events.

    Parameters
    ----------
    patience : float
        Seconds to wait where the recipe's deadline is longer.
    """
    deadline = min(run.config.federation.deadline, patience)
    replies = exchange(grid, contents, kind=kind, group=str(round), deadline=deadline)
    for reply in replies:
        append_event(
            run.folder,
            "traffic",
            stage=stage,
            round=round,
            site=str(reply.notes.get("site", reply.peer.name))[:80],
            bytes_up=reply.bytes_up,
            bytes_down=reply.bytes_down,
        )
    return replies


@dataclass(frozen=True, kw_only=True)
class _Hello:
    """What a site says of itself."""

    name: str
    rank: int
    projections: tuple[float, ...]
    data: str
    ledger_tag: str


def _read_hello(run: ServerRun, notes: Notes) -> _Hello:
    """Return a good reply's notes, every one of them checked before any is used.

    Raises
    ------
    WireError
        If one is not of the agreed form.
    """
    return _Hello(
        name=text(notes, "site", limit=80),
        rank=whole(notes, "rank", largest=run.spec.rank),
        projections=numbers(notes, "projections"),
        data=text(notes, "data", limit=64),
        ledger_tag=text(notes, "ledger_tag", limit=16),
    )


def _require_fitting(run: ServerRun, hello: _Hello, connected: Set[int], *, simulated: bool) -> None:
    """Refuse a site that cannot take part.

    A site may come back from another node once its own has gone: Flower gives a SuperNode without a key
    a new id at each start.

    Raises
    ------
    MismatchError
        Saying why.
    """
    name, rank = hello.name, hello.rank
    if not name:
        raise MismatchError("the site sent no name")
    if name in run.peers and run.peers[name].node in connected:
        raise MismatchError(f"site {name}: another node joined under this name")
    if name in run.peers and hello.ledger_tag != run.tags[name]:
        raise MismatchError(f"site {name}: it came back with another privacy ledger")
    if name not in run.peers and len(run.peers) >= run.config.federation.sites:
        raise MismatchError(f"site {name}: all sites of the run have joined")
    if run.peers and simulated is not run.simulated:
        raise MismatchError(f"site {name}: simulated and real sites do not train together")
    # a baseline takes the sites that its recipe's own rule takes
    about = RULES[run.config.strategy.name].about
    if rank < 1 or (rank < run.spec.rank and not about.unequal_ranks):
        raise MismatchError(f"site {name}: trains rank {rank}, and {about.title} needs {run.spec.rank}")
    if basis_from_seed(run.spec) is not None and run.basis is not None:
        require_same_basis(projections(run.basis, seed=run.spec.basis), hello.projections, site=name)


def _welcome(run: ServerRun, reply: Reply, connected: Set[int]) -> None:
    """Take a site in, or set its node aside with the reason, whatever it sent."""
    simulated = reply.notes.get("simulated") is True
    try:
        if reply.reason:
            raise MismatchError(reply.reason)
        hello = _read_hello(run, reply.notes)
        _require_fitting(run, hello, connected, simulated=simulated)
    except FedllmError as error:
        _refuse(run, reply, str(error))
        return
    name = hello.name
    run.simulated = simulated
    run.peers[name] = Peer(name=name, node=reply.peer.node, index=reply.peer.index, rank=hello.rank)
    run.data[name] = hello.data
    run.tags[name] = hello.ledger_tag
    # what a site was sent may have gone with its node
    run.kept.pop(name, None)
    run.holders.discard(name)
    if reply.notes.get("has_basis") is True:
        run.holders.add(name)
    append_event(run.folder, "site_joined", site=name, node=reply.peer.node, simulated=run.simulated)


def _refuse(run: ServerRun, reply: Reply, reason: str) -> None:
    name = ""
    with suppress(WireError):
        name = text(reply.notes, "site", limit=80)
    seat = reply.peer.node, reply.peer.index
    run.refused[seat] = reason
    if not reply.notes or name in run.peers:
        run.pending[seat] = name
    append_event(run.folder, "warning", text=f"{name or reply.peer.name} was set aside: {reason}")


def ship_basis(run: ServerRun, grid: Grid) -> None:
    """Have one site make the basis where no seed gives it, and send it to those who lack it.

    The server never makes it: that would take the base model's weights.

    Raises
    ------
    RunError
        If no site could make it.
    """
    with_core = run.config.adapter.basis in WITH_CORE
    if run.basis is None:
        for name in sorted(run.peers):
            peer = run.peers[name]
            asked = [(peer, pack(run.notes(peer, **run.seen(peer))))]
            (reply,) = counted(run, grid, asked, stage="basis", kind="query.make_basis", round=0)
            try:
                run.note_head(reply)
                if reply.reason or BASIS not in reply.parts:
                    raise WireError(reply.reason or "no payload")
                _take_basis(run, read_basis(reply.parts[BASIS], run.spec, with_core=with_core))
                break
            except (WireError, MismatchError) as error:
                append_event(run.folder, "warning", text=f"{name} made no basis: {error}")
        if run.basis is None:
            raise RunError(f"no site could make the {run.config.adapter.basis} basis; see the warnings.")
        _keep_basis(run.folder, run.basis)
    lacking = [peer for name, peer in sorted(run.peers.items()) if name not in run.holders]
    if not lacking or not run.spec.basis.startswith(SHIPPED):
        return
    payload = save(run.basis.tensors)
    contents = [(peer, pack(run.notes(peer), {BASIS: payload})) for peer in lacking]
    for reply in counted(run, grid, contents, stage="basis", kind="query.keep_basis", round=0):
        if reply.reason:
            append_event(
                run.folder, "warning", text=f"{reply.peer.name} did not take the basis: {reply.reason}"
            )
        else:
            run.holders.add(reply.peer.name)
