"""The round loop: send, collect, set aside what is bad, aggregate, checkpoint, go on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from flwr.serverapp import Grid
from safetensors.numpy import save

from fedllm.adapters import METHODS
from fedllm.adapters.export import save_peft_adapter, save_state
from fedllm.adapters.layers import Factors
from fedllm.adapters.state import AdapterState
from fedllm.aggregation import Outcome, RoundPlan, Update
from fedllm.aggregation.diagnostics import diagnose
from fedllm.aggregation.rule import branches_of, product_of, start_for, trained_names
from fedllm.config import Config
from fedllm.errors import FedllmError, RunError, WireError
from fedllm.federation.counts import noised_accuracies
from fedllm.federation.exchange import Peer, Reply, exchange
from fedllm.federation.greeting import gather_sites, greet, greet_again
from fedllm.federation.local import named_payloads, restart_state
from fedllm.federation.outgoing import read_update, save_folded
from fedllm.federation.records import ADAPTER, SITE_NOISE, Note, amounts, example_count, number, pack, text
from fedllm.federation.run import (
    BASIS_FILE,
    ServerRun,
    counted,
    drop_pieces,
    save_pieces,
    ship_basis,
)
from fedllm.federation.site_privacy import book_release, private_outcome
from fedllm.federation.sketches import second_stage, sketch_update
from fedllm.runs.checkpoints import Checkpoint, checkpoint_digest, save_checkpoint
from fedllm.runs.events import CURVE, INTERVAL, QUALITY, append_event
from fedllm.runs.folder import atomic_write
from fedllm.runs.metrics import write_metrics

MEASURED = (*QUALITY, "epsilon")


class Aggregator(Protocol):
    """What the loop asks of a strategy."""

    def aggregate(self, current: AdapterState, updates: Iterable[Update], *, round: int) -> Outcome:
        """Return a round's outcome from its updates, in the order of site names."""


def run_rounds(run: ServerRun, grid: Grid, strategy: Aggregator) -> None:
    """Run all rounds that are left, evaluate the result and export it; the untuned base is evaluated only.

    Raises
    ------
    RunError
        If too few sites joined, or a round had fewer valid replies than the quorum. Finished
        rounds stay on disk and the run can be resumed.
    """
    gather_sites(run, grid)
    if run.config.federation.mode == "base":
        _final_evaluation(run, grid)
        run.tracking.final(0)
        return
    ship_basis(run, grid)
    for round in range(run.next_round, run.config.federation.rounds + 1):
        greet(run, grid)
        if round > run.next_round:
            greet_again(run, grid)
        ship_basis(run, grid)
        _one_round(run, grid, strategy, round)
    _final_evaluation(run, grid)
    run.tracking.final(run.config.federation.rounds)
    _export(run)


@dataclass
class Intake:
    """Turns replies into updates, one at a time and in the order of site names.

    Attributes
    ----------
    refusals : dict[str, str]
        Site -> why its reply was set aside.
    accepted : int
        Valid replies so far.
    """

    run: ServerRun
    round: int
    read: Callable[[Reply], AdapterState]
    refusals: dict[str, str] = field(default_factory=dict)
    accepted: int = 0

    def updates(self, replies: list[Reply]) -> Iterator[Update]:
        """Yield the valid updates; each reply becomes an event, and its payload is let go."""
        # one site with other weights must not set everybody else's aside
        self.run.weights = self.run.weights or common_weights(replies)
        replies.sort(key=lambda reply: reply.peer.name, reverse=True)
        while replies:
            reply = replies.pop()
            update = self._check(reply)
            if update is not None:
                self.accepted += 1
                yield update

    def require_quorum(self) -> None:
        """Refuse a round with fewer valid replies than needed.

        Raises
        ------
        RunError
            With each refusal's reason.
        """
        if self.accepted < self.run.quorum:
            reasons = "; ".join(sorted({reason.rstrip(".") for reason in self.refusals.values()}))
            raise RunError(
                f"round {self.round}: {self.accepted} of {self.accepted + len(self.refusals)} replies were "
                f"valid, {self.run.quorum} are needed: {reasons}"
            )

    def _check(self, reply: Reply) -> Update | None:
        reason, update = reply.reason, None
        released: dict[str, float | None] = dict.fromkeys(MEASURED)
        try:
            if reply.notes.get("site") == reply.peer.name:
                # what is set aside was booked and seen, too
                self.run.note_head(reply)
                released["epsilon"] = number(reply.notes, "epsilon")
            if not reason:
                update = self._update(reply)
                released = {name: number(reply.notes, name) for name in MEASURED}
        except FedllmError as error:
            reason, update = reason or str(error), None
        if reason and "shipped basis" in reason:
            self.run.holders.discard(reply.peer.name)
        if reason and "kept payload" in reason:
            self.run.kept.pop(reply.peer.name, None)
        append_event(
            self.run.folder,
            "site_reply",
            round=self.round,
            site=reply.peer.name,
            accepted=update is not None,
            reason=reason,
            bytes_up=reply.bytes_up,
            bytes_down=reply.bytes_down,
            seconds=reply.seconds,
            **released,
        )
        if update is None:
            self.refusals[reply.peer.name] = reason
        return update

    def _update(self, reply: Reply) -> Update:
        run, peer = self.run, reply.peer
        if text(reply.notes, "site") != peer.name:
            raise RunError(f"site {peer.name}: the reply carries another site's name.")
        weights = text(reply.notes, "weights", limit=64)
        if weights != run.weights:
            raise RunError(
                f"site {peer.name}: its base weights ({weights}) are not those of the others ({run.weights})."
            )
        weight = 1.0
        if run.config.strategy.weighting == "examples":
            weight = float(example_count(reply.notes))
        return Update(site=peer.name, state=self.read(reply), weight=weight)


def common_weights(replies: Sequence[Reply]) -> str:
    """Return the fingerprint of the base weights that most good replies name; on a tie the first by site."""
    named = []
    for reply in sorted(replies, key=lambda reply: reply.peer.name):
        with suppress(WireError):
            if not reply.reason:
                named.append(text(reply.notes, "weights", limit=64))
    return Counter(named).most_common(1)[0][0] if named else ""


def drawn_sites(config: Config, names: Iterable[str], *, round: int) -> list[str]:
    """Return who trains in a round, sorted: all, or as many as the recipe says.

    A pure function of seed, round and names, so that a resumed run asks the same sites. No privacy is
    claimed for sites or records that happen not to be drawn: the coordinator knows who was.
    """
    everyone = sorted(names)
    if config.federation.asked >= len(everyone):
        return everyone
    if config.federation.mode == "central":
        return everyone[:1]
    source = np.random.default_rng([config.run.seed, round])
    drawn = source.choice(len(everyone), size=config.federation.asked, replace=False)
    return [everyone[index] for index in sorted(drawn)]


def _one_round(run: ServerRun, grid: Grid, strategy: Aggregator, round: int) -> None:
    start = time.monotonic()
    peers = [run.peers[name] for name in drawn_sites(run.config, run.peers, round=round)]
    append_event(run.folder, "round_started", round=round, sites=[peer.name for peer in peers])
    every = run.config.evaluation.every
    due = every > 0 and (round - 1) % every == 0
    noise: dict[str, Note] = {}
    if run.config.site_privacy.at_sites:
        # sites draw their noise as soon as they are asked
        noise[SITE_NOISE] = book_release(run.config, run.folder, round=round, clipping_norm=run.clipping_norm)
    messages = run.messages(peers, round, evaluate=due, **noise)
    replies = exchange(
        grid,
        [(peer, pack(notes, parts)) for peer, notes, parts in messages],
        kind="train",
        group=str(round),
        deadline=run.config.federation.deadline,
    )
    for (peer, notes, _), reply in zip(messages, replies, strict=True):
        if not reply.reason:
            run.kept[peer.name] = named_payloads(notes)
    plan = run.plan(round)
    if plan.sketch:
        replies = second_stage(run, grid, replies, round)
    sent = sum(reply.bytes_up for reply in replies), sum(reply.bytes_down for reply in replies)
    intake = Intake(run=run, round=round, read=lambda reply: _read(run, reply, round))
    outcome = _combine(run, strategy, intake, replies)
    _require_finite(outcome.state.tensors, outcome.folded or {}, round=round)
    _advance(run, outcome, plan)
    # the server optimiser's step may overflow, too
    _require_finite({**run.state.tensors, **run.moments}, {}, round=round)
    _checkpoint(run, round)
    append_event(
        run.folder,
        "round_finished",
        round=round,
        accepted=intake.accepted,
        bytes_up=sent[0],
        bytes_down=sent[1],
        seconds=time.monotonic() - start,
    )
    write_metrics(run.folder)
    run.tracking.round(round)


def _combine(run: ServerRun, strategy: Aggregator, intake: Intake, replies: list[Reply]) -> Outcome:
    """Aggregate the valid replies; without diagnostics a rule that only sums holds one at a time."""
    stream = intake.updates(replies)
    if run.config.site_privacy.enabled:
        held = list(stream)
        intake.require_quorum()
        outcome, run.clipping_norm = private_outcome(
            run.config,
            run.folder,
            run.state,
            held,
            plan=run.plan(intake.round),
            round=intake.round,
            clipping_norm=run.clipping_norm,
        )
        return outcome
    if run.config.strategy.diagnostics:
        held = list(stream)
        intake.require_quorum()
        _diagnose(run, held, intake.round)
        return strategy.aggregate(run.state, held, round=intake.round)
    try:
        outcome = strategy.aggregate(run.state, stream, round=intake.round)
    except RunError:
        # with too few replies the rule fails first, and says less
        intake.require_quorum()
        raise
    intake.require_quorum()
    return outcome


def _read(run: ServerRun, reply: Reply, round: int) -> AdapterState:
    plan, peer = run.plan(round), reply.peer
    if not plan.send:
        return run.state.only(())
    if plan.sketch:
        return sketch_update(run, reply)
    if ADAPTER not in reply.parts:
        raise WireError(f"site {peer.name}: the reply carries no adapter.")
    payload = reply.parts[ADAPTER]
    return read_update(run.config, run.state, payload, rank=peer.rank, plan=plan, round=round)


def _advance(run: ServerRun, outcome: Outcome, plan: RoundPlan) -> None:
    """Take a round's outcome in: the server optimiser's step, and what is folded into the base."""
    state = outcome.state
    if run.optimizer is not None:
        # matrices that train in turn have moments of their own
        scope = f"{'+'.join(plan.send)}|"
        new, moments = run.optimizer.step(
            {key: value.astype(np.float64) for key, value in run.state.only(plan.send).tensors.items()},
            {key: value.astype(np.float64) for key, value in state.only(plan.send).tensors.items()},
            {key.removeprefix(scope): v for key, v in run.moments.items() if key.startswith(scope)},
        )
        run.moments |= {f"{scope}{key}": value for key, value in moments.items()}
        state = state.with_tensors(
            {**state.tensors, **{key: value.astype(np.float32) for key, value in new.items()}}
        )
    run.state = state
    if outcome.folded is not None:
        lost = run.folded.add(outcome.folded, cap=run.config.strategy.residual_cap)
        if lost > 0:
            append_event(
                run.folder,
                "warning",
                text=f"what is folded into the base passed rank {run.config.strategy.residual_cap} and was "
                f"recompressed; {lost:.2%} of its energy was lost (strategy.residual_cap)",
            )


def _require_finite(tensors: Mapping[str, np.ndarray], folded: Factors, *, round: int) -> None:
    """Refuse what no later round could start from, before it is kept.

    Raises
    ------
    RunError
        Naming the round.
    """
    matrices = [*tensors.values(), *(matrix for pair in folded.values() for matrix in pair)]
    if not all(np.isfinite(matrix).all() for matrix in matrices):
        raise RunError(
            f"round {round}: the replies combine to NaN or infinity, so the round is not kept; checkpoints "
            "of earlier rounds are as they were. Look for a site with far too large updates, or lower "
            "train.lr or strategy.server_lr in a new run."
        )


def _diagnose(run: ServerRun, updates: Sequence[Update], round: int) -> None:
    """Log how the sites' products relate, where the method has products and they were sent."""
    plan, branches = run.plan(round), branches_of(run.spec)
    if (
        not run.config.strategy.diagnostics
        or not branches
        or plan.sketch
        or plan.personal
        or len(updates) < 2
    ):
        return
    specs = [update.state.spec for update in updates]
    starts = [restart_state(run.config, s, round) if plan.restart else start_for(run.state, s) for s in specs]
    names = trained_names(run.spec)
    whole = [start.updated(update.state.only(names)) for start, update in zip(starts, updates, strict=True)]
    reference = start_for(run.state, run.spec)
    found = diagnose(
        [{"/".join(branch): product_of(state, branch) for branch in branches} for state in whole],
        [update.weight for update in updates],
        {"/".join(branch): product_of(reference, branch) for branch in branches},
    )
    append_event(
        run.folder,
        "diagnosed",
        round=round,
        aggregation_error=found.aggregation_error,
        rank_energy=found.rank_energy,
        cosine=found.cosine,
    )


def _checkpoint(run: ServerRun, round: int) -> None:
    extra = {
        "seed": run.seed,
        "weights": run.weights,
        "folded": save_pieces(run),
        "clipping_norm": repr(run.clipping_norm),
    }
    checkpoint = Checkpoint(round=round, state=run.state, extra=extra, moments=run.moments)
    path = save_checkpoint(run.folder, checkpoint)
    drop_pieces(run.folder)
    digest = checkpoint_digest(checkpoint)
    append_event(run.folder, "checkpoint_saved", round=round, file=path.name, sha256=digest)


def _final_evaluation(run: ServerRun, grid: Grid) -> None:
    """Have every site compare the finished adapter with the untuned base."""
    peers: list[Peer] = [run.peers[name] for name in sorted(run.peers)]
    last, done = run.config.federation.rounds + 1, 0
    mode = run.config.federation.mode
    stages = {"base": "base_"} | ({} if mode == "base" else {"final": ""})
    contents = [(peer, pack(notes, parts)) for peer, notes, parts in run.messages(peers, last)]
    replies = counted(run, grid, contents, stage="evaluation", kind="evaluate", round=last)
    run.weights = run.weights or common_weights(replies)
    for reply in replies:
        try:
            if reply.notes.get("site") == reply.peer.name:
                run.note_head(reply)
            if reply.reason:
                raise RunError(reply.reason)
            notes = reply.notes | noised_accuracies(
                reply.notes, noise_multiplier=run.config.evaluation.noise_multiplier
            )
            alone = {"elsewhere": "elsewhere_"} if "elsewhere_records" in notes and mode == "local" else {}
            for stage, prefix in (stages | alone).items():
                append_event(
                    run.folder,
                    "evaluated",
                    stage=stage,
                    site=reply.peer.name,
                    records=int(number(notes, f"{prefix}records") or 0),
                    majority_accuracy=number(notes, "majority_accuracy"),
                    majority_macro_f1=number(notes, "majority_macro_f1"),
                    calibration=amounts(notes, f"{prefix}calibration", length=CURVE),
                    epsilon=number(notes, "epsilon"),
                    heldout_epsilon=number(notes, "heldout_epsilon"),
                    **{name: number(notes, f"{prefix}{name}") for name in (*QUALITY, *INTERVAL)},
                )
            done += 1
        except FedllmError as error:
            append_event(run.folder, "warning", text=f"{reply.peer.name}: no final evaluation ({error})")
    if done < run.quorum:
        raise RunError(
            f"the final evaluation: {done} of {len(peers)} sites answered, {run.quorum} are needed; all "
            "rounds are finished and kept"
        )


def _export(run: ServerRun) -> None:
    """Write the adapter: as PEFT knows it where the server can, else its matrices alone."""
    folder = run.folder.adapter_dir
    save_state(run.state, folder, seed=run.seed)
    save_folded(run.folded, folder)
    personal = run.plan(run.config.federation.rounds).personal
    if run.basis is not None and not personal and METHODS[run.spec.method].export != "base":
        name, folded = run.config.model.called, run.folded.factors()
        save_peft_adapter(run.state, run.basis, folder, base_model=name, folded=folded)
    if run.basis is not None and run.spec.basis.startswith("shipped:"):
        atomic_write(folder / BASIS_FILE, save(run.basis.tensors))
