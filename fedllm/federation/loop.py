"""The round loop: send, collect, set aside what is bad, aggregate, checkpoint, go on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flwr.serverapp import Grid
from safetensors.numpy import save_file

from fedllm.adapters.export import save_peft_adapter
from fedllm.adapters.state import AdapterState
from fedllm.errors import FedllmError, RunError
from fedllm.federation.exchange import Peer, Reply, exchange
from fedllm.federation.records import number, pack, text
from fedllm.federation.run import BASIS_FILE, ServerRun, gather_sites, greet, ship_basis
from fedllm.runs.checkpoints import Checkpoint, checkpoint_digest, save_checkpoint
from fedllm.runs.events import append_event
from fedllm.runs.metrics import write_metrics
from fedllm.wire import decode


@dataclass(frozen=True, kw_only=True)
class Update:
    """A valid reply of one site.

    Attributes
    ----------
    examples : float or None
        The site's number of training records; None in private runs, where it stays home.
    """

    site: str
    state: AdapterState
    examples: float | None


class Aggregator(Protocol):
    """What the loop asks of a strategy."""

    def aggregate(self, current: AdapterState, updates: Sequence[Update]) -> AdapterState:
        """Return the next adapter from this round's updates, sorted by site name."""


def run_rounds(run: ServerRun, grid: Grid, strategy: Aggregator) -> None:
    """Run all rounds that are left, evaluate the result and export it.

    Raises
    ------
    RunError
        If too few sites joined, or a round had fewer valid replies than the quorum. Finished
        rounds stay on disk and the run can be resumed.
    """
    gather_sites(run, grid)
    ship_basis(run, grid)
    for round in range(run.next_round, run.config.federation.rounds + 1):
        greet(run, grid)
        ship_basis(run, grid)
        _one_round(run, grid, strategy, round)
    _final_evaluation(run, grid)
    if run.basis is not None:
        save_peft_adapter(
            run.state, run.basis, run.folder.adapter_dir, base_model=run.config.model.name, seed=run.seed
        )
        if run.spec.basis.startswith("shipped:"):
            save_file(run.basis.tensors, run.folder.adapter_dir / BASIS_FILE)


def _one_round(run: ServerRun, grid: Grid, strategy: Aggregator, round: int) -> None:
    start = time.monotonic()
    peers = [run.peers[name] for name in sorted(run.peers)]
    append_event(run.folder, "round_started", round=round, sites=[peer.name for peer in peers])
    payload = run.payload()
    every = run.config.evaluation.every
    due = every > 0 and (round - 1) % every == 0
    contents = [(peer, pack(run.notes(peer, round=round, evaluate=due), payload)) for peer in peers]
    replies = exchange(
        grid, contents, kind="train", group=str(round), deadline=run.config.federation.deadline
    )
    updates, refusals = [], {}
    for reply in replies:
        update = _accept(run, reply, round)
        if isinstance(update, Update):
            updates.append(update)
        else:
            refusals[reply.peer.name] = update
    if len(updates) < run.quorum:
        reasons = "; ".join(sorted({reason.rstrip(".") for reason in refusals.values()}))
        raise RunError(
            f"round {round}: {len(updates)} of {len(peers)} replies were valid, {run.quorum} are needed: "
            f"{reasons}"
        )
    run.state = strategy.aggregate(run.state, sorted(updates, key=lambda update: update.site))
    checkpoint = Checkpoint(round=round, state=run.state, extra={"seed": run.seed, "weights": run.weights})
    path = save_checkpoint(run.folder, checkpoint)
    append_event(
        run.folder,
        "checkpoint_saved",
        round=round,
        file=path.name,
        sha256=checkpoint_digest(checkpoint),
    )
    append_event(
        run.folder,
        "round_finished",
        round=round,
        accepted=len(updates),
        bytes_up=sum(reply.bytes_up for reply in replies),
        bytes_down=sum(reply.bytes_down for reply in replies),
        seconds=time.monotonic() - start,
    )
    write_metrics(run.folder)


def _accept(run: ServerRun, reply: Reply, round: int) -> Update | str:
    """Check one reply, record it as an event, and return its update, or why it has none."""
    reason, update, measured = (
        reply.reason,
        None,
        dict.fromkeys(("loss", "accuracy", "macro_f1", "epsilon")),
    )
    released: dict[str, float | None] = dict(measured)
    try:
        if not reason:
            update = _checked(run, reply)
            released = {name: number(reply.notes, name) for name in measured}
    except FedllmError as error:
        reason, update = str(error), None
    if reason and "shipped basis" in reason:
        run.holders.discard(reply.peer.name)
    append_event(
        run.folder,
        "site_reply",
        round=round,
        site=reply.peer.name,
        accepted=update is not None,
        reason=reason,
        bytes_up=reply.bytes_up,
        bytes_down=reply.bytes_down,
        seconds=reply.seconds,
        **released,
    )
    return update or reason


def _checked(run: ServerRun, reply: Reply) -> Update:
    peer: Peer = reply.peer
    if text(reply.notes, "site") != peer.name:
        raise RunError(f"site {peer.name}: the reply carries another site's name.")
    if reply.payload is None:
        raise RunError(f"site {peer.name}: the reply carries no adapter.")
    weights = text(reply.notes, "weights", limit=64)
    run.weights = run.weights or weights
    if weights != run.weights:
        raise RunError(
            f"site {peer.name}: its base weights ({weights}) are not those of the others ({run.weights})."
        )
    state = decode(reply.payload, spec=run.spec, layout=run.state.layout)
    examples = None if run.config.privacy.enabled else number(reply.notes, "examples")
    return Update(site=peer.name, state=state, examples=examples)


def _final_evaluation(run: ServerRun, grid: Grid) -> None:
    """Have every site compare the finished adapter with the untuned base."""
    peers = [run.peers[name] for name in sorted(run.peers)]
    payload = run.payload()
    replies = exchange(
        grid,
        [(peer, pack(run.notes(peer), payload)) for peer in peers],
        kind="evaluate",
        group=str(run.config.federation.rounds),
        deadline=run.config.federation.deadline,
    )
    for reply in replies:
        try:
            if reply.reason:
                raise RunError(reply.reason)
            for stage, prefix in (("base", "base_"), ("final", "")):
                append_event(
                    run.folder,
                    "evaluated",
                    stage=stage,
                    site=reply.peer.name,
                    records=int(number(reply.notes, "records") or 0),
                    accuracy=number(reply.notes, f"{prefix}accuracy"),
                    macro_f1=number(reply.notes, f"{prefix}macro_f1"),
                    loss=number(reply.notes, f"{prefix}loss"),
                    majority_accuracy=number(reply.notes, "majority_accuracy"),
                    majority_macro_f1=number(reply.notes, "majority_macro_f1"),
                )
        except FedllmError as error:
            append_event(run.folder, "warning", text=f"{reply.peer.name}: no final evaluation ({error})")
