"""How sites join a run: who is asked, who is taken in, and who is set aside with the reason."""

from __future__ import annotations

import time
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass

from flwr.serverapp import Grid

from fedllm.adapters.basis import projections, require_same_basis
from fedllm.aggregation import RULES
from fedllm.errors import FedllmError, MismatchError, RunError, WireError
from fedllm.federation.exchange import Peer, Reply
from fedllm.federation.records import Notes, numbers, pack, text, whole
from fedllm.federation.run import ServerRun, counted
from fedllm.privacy.policy import SITE_NAMES, names_a_site
from fedllm.runs.events import append_event
from fedllm.training.spec import basis_from_seed

#: Seconds a node gets to say who it is, where the run waits less for sites to join.
HELLO_SECONDS = 300.0
#: The same, for nodes that have not answered before.
HELLO_AGAIN_SECONDS = 10.0


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
    if not names_a_site(name):
        raise MismatchError(f"the name that the site sent cannot name one: {SITE_NAMES}")
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
