"""A run in one process: the same messages and handlers, with no Ray and no SuperLink."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedllm.config import Config
from fedllm.federation.client import answering, client_app
from fedllm.federation.exchange import TimedGrid
from fedllm.federation.records import Notes, Parts, pack, unpack
from fedllm.federation.server import serve
from fedllm.runs.events import read_events
from fedllm.runs.folder import RunFolder
from fedllm.runs.sites import SiteSummary, site_summaries
from fedllm.settings import Scalar


class InProcessGrid(TimedGrid):
    """Delivers each message to the ClientApp at once, one node a site."""

    def __init__(self, app: ClientApp, *, nodes: int) -> None:
        self._app = app
        self._contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={"simulated": True},
                state=RecordDict(),
                run_config={},
            )
            for node in range(1, nodes + 1)
        }
        self._replies: dict[str, Message] = {}
        self._seconds: dict[str, float] = {}
        self._sent = 0
        # outside a Flower process nobody has set who is speaking
        TaskIdentity.run_id = 1
        TaskIdentity.node_id = 0
        TaskIdentity.task_id = 1

    @property
    def run(self) -> Run:
        """Not available: there is no SuperLink behind this grid."""
        raise NotImplementedError

    def set_run(self, run: Run) -> None:
        """Do nothing: there is one run."""

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer each message right away and return their ids."""
        identifiers = []
        for message in messages:
            self._sent += 1
            identifier = str(self._sent)
            message.metadata.__dict__["_message_id"] = identifier
            start = time.monotonic()
            self._replies[identifier] = self._app(message, self._contexts[message.metadata.dst_node_id])
            self._seconds[identifier] = time.monotonic() - start
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to the given messages."""
        return [self._replies.pop(name) for name in list(message_ids) if name in self._replies]

    def seconds(self, message_id: str) -> float:
        """Return how long a site took for its answer."""
        return self._seconds[message_id]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and return their replies."""
        return self.pull_messages(self.push_messages(messages))


@dataclass(frozen=True)
class RunResult:
    """What a finished run left.

    Attributes
    ----------
    folder : RunFolder
        The run folder: report, metrics, adapter, checkpoints.
    """

    folder: RunFolder

    @property
    def sites(self) -> list[SiteSummary]:
        """Return what the run was for each site: scores, epsilon, bytes; None where withheld.

        Raises
        ------
        RunError
            If the folder's events cannot be read.
        """
        return site_summaries(read_events(self.folder))


def run(config: Config) -> RunResult:
    """Run a recipe's sites and server one after another in this process.

    Raises
    ------
    FedllmError
        If a setting, the data or the model cannot be used, or the run failed.

    Examples
    --------
    >>> import fedllm
    >>> config = fedllm.Config.from_flat({"model.name": "tiny-llama", "federation.rounds": 1})
    >>> fedllm.run(config).folder.report_file.name  # doctest: +SKIP
    'report.html'
    """
    return run_values(config.to_flat(), sites=config.federation.sites)


def run_values(values: Mapping[str, Scalar], *, sites: int) -> RunResult:
    """Run flat settings as :func:`run` does; ``run.resume`` among them goes on with a folder."""
    return RunResult(serve(values, InProcessGrid(client_app(), nodes=sites)))


def reply_with(config: Config, notes: Notes, parts: Parts = MappingProxyType({})) -> tuple[Notes, Parts]:
    """Return what leaves a simulated site whose handler answers with these notes and payloads."""
    app = ClientApp()
    app.query("asked")(answering(lambda *_: (dict(notes), dict(parts))))
    grid = InProcessGrid(app, nodes=1)
    content = pack({"config": json.dumps(config.changed()), "index": 0})
    (reply,) = grid.send_and_receive([grid.create_message(content, "query.asked", 1, "0")])
    return unpack(reply.content)
