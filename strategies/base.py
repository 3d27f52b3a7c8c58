"""Adapter strategies: Flower strategies that send, check and aggregate adapter matrices only."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedllm.adapters.state import AdapterState
from fedllm.aggregation import Outcome, Update
from fedllm.errors import RunError
from fedllm.federation.loop import run_rounds
from fedllm.federation.records import pack
from fedllm.federation.run import ServerRun


class AdapterStrategy(Strategy):
    """Aggregate the valid replies of every round by the run's rule.

    A strategy is a schedule, an aggregation rule, a server optimiser, a codec and a privacy setting;
    this one is the synchronous schedule, the other parts come from the recipe. Its own :meth:`start`
    replaces Flower's loop: it waits for a quorum and a deadline instead of for ever, sets bad replies
    aside and goes on, writes a checkpoint a round, and begins at any round.

    Override :meth:`aggregate` for a rule of your own.

    Parameters
    ----------
    run : ServerRun
        Settings, run folder, adapter spec and current state.
    """

    def __init__(self, run: ServerRun) -> None:
        self.run = run

    def aggregate(self, current: AdapterState, updates: Iterable[Update], *, round: int) -> Outcome:
        """Return a round's outcome from its updates, in the order of site names."""
        return self.run.rule.combine(current, updates, round=round)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds that are left; the arguments after ``grid`` come from the run's settings."""
        run_rounds(self.run, grid, self)
        return Result()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one train message a joined site, the current adapter inside."""
        return self._messages("train", server_round, evaluate=True)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one evaluate message a joined site."""
        return self._messages("evaluate", server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Not used: replies are checked and aggregated inside :meth:`start`."""
        raise RunError(f"{type(self).__name__} runs its own loop; call start().")

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Not used: see :meth:`aggregate_train`."""
        raise RunError(f"{type(self).__name__} runs its own loop; call start().")

    def summary(self) -> None:
        """Print the strategy in one line."""
        print(f"{self.run.rule.about.title}: {self.run.spec.method}, rank {self.run.spec.rank}")

    def _messages(self, kind: str, round: int, **notes: bool) -> list[Message]:
        peers = [self.run.peers[name] for name in sorted(self.run.peers)]
        return [
            Message(pack(found, parts), dst_node_id=peer.node, message_type=kind)
            for peer, found, parts in self.run.messages(peers, round, **notes)
        ]
