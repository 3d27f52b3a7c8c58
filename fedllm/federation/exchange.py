"""Send messages and collect replies until all are there or a deadline passes."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedllm.errors import FedllmError, WireError
from fedllm.federation.records import Notes, Parts, text, unpack, wire_size

log = logging.getLogger(__name__)


class TimedGrid(Grid):
    """A grid that answers messages one after another, and knows how long each took."""

    @abstractmethod
    def seconds(self, message_id: str) -> float:
        """Return how long the answer to a message took."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A site as the server knows it.

    Attributes
    ----------
    node : int
        Flower's node id.
    index : int
        Which simulated site the node plays in a message; a real site ignores it.
    rank : int
        Adapter rank the site trains; 0 until it has joined.
    """

    name: str
    node: int
    index: int
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back from a peer, or why nothing usable did.

    Attributes
    ----------
    reason : str
        Empty for a good reply.
    seconds : float
        From sending to its arrival; where sites answer one after another, what its own answer took.
    """

    peer: Peer
    notes: Notes
    parts: Parts
    reason: str
    bytes_down: int
    bytes_up: int
    seconds: float


def exchange(
    grid: Grid,
    contents: Sequence[tuple[Peer, RecordDict]],
    *,
    kind: str,
    group: str,
    deadline: float,
) -> list[Reply]:
    """Send one message to each peer and return one reply each, in the order given.

    A peer that has not answered ``deadline`` seconds after sending is reported as such, and one whose
    message Flower did not take at once; replies are matched by the message they answer, since Flower
    reports a dead node's error under another node id.

    Parameters
    ----------
    kind : str
        Flower message type, such as ``train`` or ``query.hello``.
    group : str
        Label of the messages, the round number.
    """
    start = time.monotonic()
    messages = [
        Message(content, dst_node_id=peer.node, message_type=kind, group_id=group, ttl=deadline + 60)
        for peer, content in contents
    ]
    sizes = [wire_size(content) for _, content in contents]
    identifiers = list(grid.push_messages(messages))
    if len(identifiers) != len(contents):
        # a push that Flower refused as too large names no message
        identifiers = [""] * len(contents)
    # a message that it did not store, since its node is gone, has an empty name
    position: Mapping[str, int] = {name: index for index, name in enumerate(identifiers) if name}
    found: dict[int, tuple[Message | None, float]] = {}
    pause = 0.05
    while len(found) < len(position):
        waiting = [name for name, index in position.items() if index not in found]
        for answered, message in _pulled(grid, waiting):
            index = position.get(answered)
            if index is not None:
                passed = time.monotonic() - start
                found[index] = message, grid.seconds(answered) if isinstance(grid, TimedGrid) else passed
        if len(found) == len(position) or time.monotonic() - start > deadline:
            break
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)
    return [
        _reply(peer, found.get(index), bytes_down=sizes[index], deadline=deadline)
        if identifiers[index]
        else _undelivered(peer)
        for index, (peer, _) in enumerate(contents)
    ]


def _pulled(grid: Grid, waiting: Sequence[str]) -> list[tuple[str, Message | None]]:
    """Return what has arrived: the message answered, and the reply or None where it cannot be read.

    Flower deletes replies as it hands them out and then unpacks what sites made up, so that replies
    pulled together would be lost with a bad one among them.
    """
    found: list[tuple[str, Message | None]] = []
    for name in waiting:
        try:
            found += [(m.metadata.reply_to_message_id, m) for m in grid.pull_messages([name])]
        except httpx.HTTPError as error:
            # says nothing of the reply, which a later poll may find
            log.warning("a poll failed, and is repeated until the deadline: %s", error)
        except Exception:
            log.exception("a reply cannot be read")
            found.append((name, None))
    return found


def _undelivered(peer: Peer) -> Reply:
    reason = "the message could not be delivered: the node is gone, or Flower refused it as too large"
    return Reply(peer=peer, notes={}, parts={}, reason=reason, bytes_down=0, bytes_up=0, seconds=0.0)


def _reply(
    peer: Peer, found: tuple[Message | None, float] | None, *, bytes_down: int, deadline: float
) -> Reply:
    notes: Notes = {}
    parts: Parts = {}
    reason, size, seconds = "", 0, deadline
    if found is None:
        reason = f"no reply within {deadline:g} s"
    else:
        message, seconds = found
        if message is None:
            reason = "unreadable reply"
        elif message.has_error():
            reason = f"the site's process failed (Flower error code {message.error.code})"
        else:
            size = wire_size(message.content)
            try:
                notes, parts = unpack(message.content)
                reason = text(notes, "error")
            except (FedllmError, ValueError) as error:
                reason = str(error) if isinstance(error, WireError) else "unreadable reply"
    return Reply(
        peer=peer,
        notes=notes,
        parts=parts,
        reason=reason,
        bytes_down=bytes_down,
        bytes_up=size,
        seconds=seconds,
    )
