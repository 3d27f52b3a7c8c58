"""Adapter strategies: Flower strategies that send, check and aggregate adapter matrices only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedllm.adapters.state import AdapterState
from fedllm.aggregation import weighted_mean
from fedllm.errors import ConfigError, RunError
from fedllm.federation.exchange import Peer
from fedllm.federation.loop import Update, run_rounds
from fedllm.federation.records import pack
from fedllm.federation.run import ServerRun


class AdapterAveraging(Strategy):
    """Average the trained matrices of all valid replies.

    ``X <- sum_k p_k X_k`` for every trained matrix X, with p_k uniform or proportional to the
    sites' numbers of training records. In private runs it is uniform, and counts are not sent.

    Its own :meth:`start` replaces Flower's loop: it waits for a quorum and a deadline instead of
    for ever, sets bad replies aside and goes on, writes a checkpoint a round, and begins at any
    round.

    Parameters
    ----------
    run : ServerRun
        Settings, run folder, adapter spec and current state.
    """

    #: adapter methods the strategy is defined for; empty: any
    methods: ClassVar[tuple[str, ...]] = ()

    def __init__(self, run: ServerRun) -> None:
        if self.methods and run.spec.method not in self.methods:
            raise ConfigError(
                f"{type(self).__name__} is defined for adapter.method={' or '.join(self.methods)}, "
                f"not {run.spec.method}."
            )
        self.run = run

    def aggregate(self, current: AdapterState, updates: Sequence[Update]) -> AdapterState:
        """Return the next adapter from this round's updates, sorted by site name."""
        if self.run.config.strategy.weighting == "examples":
            counts = [update.examples for update in updates]
            missing = next((u.site for u in updates if not u.examples), None)
            if missing is not None:
                raise RunError(f"site {missing} sent no number of examples; use strategy.weighting=uniform.")
            weights = [float(count) for count in counts if count]
        else:
            weights = [1.0] * len(updates)
        return weighted_mean([update.state for update in updates], weights)

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
        return self._messages("train", round=server_round, evaluate=True)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one evaluate message a joined site."""
        return self._messages("evaluate", round=server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Not used: replies are checked and aggregated inside :meth:`start`."""
        raise RunError("AdapterAveraging runs its own loop; call start().")

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Not used: see :meth:`aggregate_train`."""
        raise RunError("AdapterAveraging runs its own loop; call start().")

    def summary(self) -> None:
        """Print the strategy in one line."""
        print(f"{type(self).__name__}: {self.run.spec.method}, rank {self.run.spec.rank}")

    def _messages(self, kind: str, **notes: int | bool) -> list[Message]:
        payload = self.run.payload()
        peers: list[Peer] = [self.run.peers[name] for name in sorted(self.run.peers)]
        return [
            Message(pack(self.run.notes(peer, **notes), payload), dst_node_id=peer.node, message_type=kind)
            for peer in peers
        ]
