"""The server's view of one run: settings, folder, adapter spec, and the sites that joined."""

from __future__ import annotations

import json
import math
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import RecordDict
from flwr.serverapp import Grid
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedllm.adapters import METHODS
from fedllm.adapters.basis import Basis
from fedllm.adapters.export import load_state
from fedllm.adapters.state import AdapterSpec, AdapterState, require_same_layout
from fedllm.aggregation import RoundPlan, Rule, ServerOptimizer, make_optimizer, make_rule
from fedllm.aggregation.lowrank import Matrix64
from fedllm.config import Config
from fedllm.errors import MismatchError, RunError, WireError
from fedllm.federation.exchange import Peer, Reply, exchange
from fedllm.federation.heads import LedgerHeads
from fedllm.federation.local import codec_down
from fedllm.federation.makebasis import WITH_CORE, read_basis
from fedllm.federation.outgoing import Folded, Piece, Sender, load_folded
from fedllm.federation.records import BASIS, Note, Parts, pack, text
from fedllm.runs.checkpoints import kept_extras, latest_checkpoint
from fedllm.runs.events import append_event, read_events
from fedllm.runs.folder import RunFolder, atomic_write, write_error
from fedllm.runs.manifest import versions
from fedllm.runs.tracking import Tracking
from fedllm.training.spec import adapter_spec, basis_from_seed, basis_seed

BASIS_FILE = "fedllm_basis.safetensors"
#: What a spec says of a basis that is shipped and not made yet.
SHIPPED = "shipped:"


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
