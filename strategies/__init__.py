"""Flower strategies of fedllm: what the server does each round."""

from fedllm.federation.run import ServerRun
from strategies.base import AdapterAveraging
from strategies.presets import FedIT, FedSB, FFALoRA

#: ``strategy.name`` -> class
STRATEGIES: dict[str, type[AdapterAveraging]] = {
    "average": AdapterAveraging,
    "fed-sb": FedSB,
    "fedit": FedIT,
    "ffa": FFALoRA,
}


def make(run: ServerRun) -> AdapterAveraging:
    """Return the strategy the run's settings name."""
    return STRATEGIES[run.config.strategy.name](run)


__all__ = ["STRATEGIES", "AdapterAveraging", "FFALoRA", "FedIT", "FedSB", "make"]
