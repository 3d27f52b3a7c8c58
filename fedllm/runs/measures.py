"""How metrics are named and written, and which of them a run is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from fedllm.config import Config


@dataclass(frozen=True)
class Metric:
    """How a metric is written: its name, what it is multiplied by, decimals, unit, and which end is good."""

    title: str
    scale: float = 100
    digits: int = 1
    unit: str = "%"
    best: str = "highest"

    @property
    def heading(self) -> str:
        """Return the head of its column."""
        return f"{self.title} {self.unit}".strip()

    def text(self, value: float) -> str:
        """Return a value with its unit.

        >>> METRICS["accuracy"].text(0.875), METRICS["loss"].text(2.0)
        ('87.5 %', '2.000')
        """
        return f"{self.number(value)} {self.unit}".strip()

    def number(self, value: float) -> str:
        """Return a value as it is shown, without its unit."""
        return f"{self.scale * value:.{self.digits}f}"

    def distance(self, value: float) -> str:
        """Return a difference of two values with its unit.

        >>> METRICS["accuracy"].distance(0.125), METRICS["loss"].distance(0.5)
        ('12.5 points', '0.500')
        """
        return f"{self.number(value)}{' points' if self.unit == '%' else ''}"

    def gain(self, value: float, other: float) -> float:
        """Return by how much a value is better than another; negative where it is worse."""
        return value - other if self.best == "highest" else other - value


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "accuracy": Metric("accuracy"),
        "macro_f1": Metric("macro-F1"),
        "exact_match": Metric("exact match"),
        "token_f1": Metric("token F1"),
        "rouge_l": Metric("ROUGE-L"),
        "loss": Metric("loss", scale=1, digits=3, unit="", best="lowest"),
    }
)

UNTUNED_BASE, UNTRAINED_HEAD = "untuned base", "untrained head"


def base_name(config: Config) -> str:
    """Return what a run without its adapter is called.

    An encoder's head is drawn at random and trained with the adapter: before, it says nothing of the base.
    """
    return UNTRAINED_HEAD if config.model.kind == "encoder" else UNTUNED_BASE


def judged_by(config: Config) -> dict[str, Metric]:
    """Return the metrics that say whether a run helped, the first one first of all.

    The first one, unless it is the loss, is what an evaluation's interval is of.
    """
    if config.data.labelled:
        return {name: METRICS[name] for name in ("accuracy", "macro_f1")}
    if config.train.objective == "dpo":
        return {"accuracy": replace(METRICS["accuracy"], title="share of pairs with a positive margin")}
    if config.evaluation.generate:
        # where a number is looked for in the answer, the words around it prove nothing
        extracted = config.evaluation.extract != "none"
        names = ("exact_match", "token_f1") if extracted else ("token_f1", "rouge_l")
        return {name: METRICS[name] for name in names}
    return {"loss": METRICS["loss"]}
