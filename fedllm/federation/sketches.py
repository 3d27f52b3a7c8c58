"""FedASK's second stage: the server's orthonormal basis goes out, the projected updates come back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from flwr.serverapp import Grid

from fedllm.adapters.method import HEAD
from fedllm.adapters.state import AdapterState
from fedllm.aggregation import Mean
from fedllm.aggregation.spectral import range_of
from fedllm.errors import FedllmError, WireError
from fedllm.federation.exchange import Reply, exchange
from fedllm.federation.local import layout_of, sketch_layout
from fedllm.federation.records import ADAPTER, example_count, pack
from fedllm.federation.run import ServerRun
from fedllm.wire import decode, encode

PROJECTED, BASIS = "projected", "basis"


def second_stage(run: ServerRun, grid: Grid, replies: list[Reply], round: int) -> list[Reply]:
    """Send the common range of all sketches and return the replies of both stages as one each.

    A site that answers the first stage alone is set aside; the range of more updates than are summed
    holds theirs too.
    """
    mean = Mean()
    good = []
    for reply in sorted(replies, key=lambda reply: reply.peer.name):
        try:
            if not reply.reason:
                mean.add(_sketch(run, reply).tensors, _weight(run, reply))
                good.append(reply)
        except FedllmError as error:
            replies[replies.index(reply)] = replace(reply, reason=str(error))
    if not good:
        return replies
    summed = mean.result64()
    spec = run.spec
    basis = AdapterState(
        spec,
        {f"{m}.Q": range_of(summed[f"{m}.Y"]).astype(np.float32) for m in spec.shapes},
    )
    payload = encode(basis, codec="float32")
    contents = [(reply.peer, pack(run.notes(reply.peer, round=round), {ADAPTER: payload})) for reply in good]
    second = exchange(
        grid, contents, kind="query.project", group=str(round), deadline=run.config.federation.deadline
    )
    answers = {reply.peer.name: reply for reply in second}
    return [_joined(reply, answers.get(reply.peer.name), payload) for reply in replies]


def sketch_update(run: ServerRun, reply: Reply) -> AdapterState:
    """Return what :class:`fedllm.aggregation.FedASK` combines: Z, the server's Q, and the head.

    Raises
    ------
    WireError
        If a stage is missing or damaged.
    """
    if PROJECTED not in reply.parts:
        raise WireError(f"site {reply.peer.name}: the reply carries no projected update.")
    spec, codec = run.spec, run.config.wire.codec
    back = decode(reply.parts[PROJECTED], spec=spec, layout=sketch_layout(run.config, spec, "Z"), codec=codec)
    basis = decode(reply.parts[BASIS], spec=spec, layout=sketch_layout(run.config, spec, "Q"))
    head = _sketch(run, reply).only(HEAD)
    return AdapterState(spec, {**back.tensors, **basis.tensors, **head.tensors})


def _sketch(run: ServerRun, reply: Reply) -> AdapterState:
    layout = {**sketch_layout(run.config, run.spec, "Y"), **layout_of(run.spec, HEAD)}
    if ADAPTER not in reply.parts:
        raise WireError(f"site {reply.peer.name}: the reply carries no sketch.")
    return decode(reply.parts[ADAPTER], spec=run.spec, layout=layout, codec=run.config.wire.codec)


def _weight(run: ServerRun, reply: Reply) -> float:
    if run.config.strategy.weighting == "uniform":
        return 1.0
    return float(example_count(reply.notes))


def _joined(first: Reply, second: Reply | None, basis: bytes) -> Reply:
    if second is None:
        return first
    parts = {**first.parts, BASIS: basis}
    if ADAPTER in second.parts:
        parts[PROJECTED] = second.parts[ADAPTER]
    return replace(
        first,
        parts=parts,
        reason=first.reason or second.reason,
        bytes_up=first.bytes_up + second.bytes_up,
        bytes_down=first.bytes_down + second.bytes_down,
        seconds=first.seconds + second.seconds,
    )
