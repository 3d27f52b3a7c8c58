"""Rules that average coordinates which mean the same at every site."""

from __future__ import annotations

from collections.abc import Iterable

from typing_extensions import override

from fedllm.adapters.method import HEAD
from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.aggregation.average import Mean
from fedllm.aggregation.rule import Declaration, Outcome, RoundPlan, Rule, Update, trained_names


class Average(Rule):
    """The weighted mean of every trained matrix."""

    about = Declaration(
        name="average",
        title="Averaging",
        paper="arXiv 1602.05629",
        adapters=(),
        exact="as the adapter allows",
        up="all trained",
        down="all trained",
        noise_linear=False,
        secure=True,
        gauge_free=False,
        unequal_ranks=False,
        mean=True,
    )

    @override
    def combine(self, current: AdapterState, updates: Iterable[Update], *, round: int) -> Outcome:
        mean = Mean()
        for update in updates:
            mean.add(update.state.tensors, update.weight)
        return Outcome(state=current.with_tensors({**current.tensors, **mean.result()}))


class FFALoRA(Average):
    """FFA-LoRA: the mean of B with A frozen."""

    about = Declaration(
        name="ffa",
        title="FFA-LoRA",
        paper="arXiv 2403.12313",
        adapters=("ffa",),
        exact="yes",
        up="r m",
        down="r m",
        noise_linear=True,
        secure=True,
        gauge_free=False,
        unequal_ranks=False,
        mean=True,
    )


class FedSB(Average):
    """Fed-SB: the mean of R, since ``sum_k p_k B R_k A = B (sum_k p_k R_k) A``."""

    about = Declaration(
        name="fed-sb",
        title="Fed-SB",
        paper="arXiv 2502.15436",
        adapters=("fed-sb",),
        exact="yes",
        up="r^2",
        down="r^2, once r (m + n) or 8 bytes",
        noise_linear=True,
        secure=True,
        gauge_free=False,
        unequal_ranks=False,
        mean=True,
    )


class RAVAN(Average):
    """RAVAN: the mean of every head's H_i."""

    about = Declaration(
        name="ravan",
        title="RAVAN",
        paper="arXiv 2506.05568",
        adapters=("ravan",),
        exact="yes",
        up="h r^2",
        down="h r^2, once 8 bytes",
        noise_linear=True,
        secure=True,
        gauge_free=False,
        unequal_ranks=False,
        mean=True,
    )


class RoLoRA(Average):
    """RoLoRA: odd rounds train and average B, even rounds A; the other factor rests."""

    about = Declaration(
        name="rolora",
        title="RoLoRA",
        paper="arXiv 2502.01755",
        adapters=("lora",),
        exact="yes, every round",
        up="r m or r n in turn",
        down="r m or r n in turn",
        noise_linear=True,
        secure=True,
        gauge_free=False,
        unequal_ranks=False,
        mean=True,
    )

    @override
    def plan(self, spec: AdapterSpec, round: int) -> RoundPlan:
        names = ("B" if round % 2 else "A", *(HEAD if spec.head else ()))
        return RoundPlan(train=names, send=names)


class FedSA(Average):
    """FedSA-LoRA: A is shared and averaged, B stays at its site; there is no single global model."""

    about = Declaration(
        name="fedsa",
        title="FedSA-LoRA",
        paper="arXiv 2410.01463",
        adapters=("lora",),
        exact="yes on A; B is personal",
        up="r n",
        down="r n",
        noise_linear=True,
        secure=True,
        gauge_free=False,
        unequal_ranks=False,
        mean=True,
        personal=True,
    )

    @override
    def plan(self, spec: AdapterSpec, round: int) -> RoundPlan:
        names = trained_names(spec)
        return RoundPlan(train=names, send=tuple(name for name in names if name != "B"), personal=("B",))


class Local(Rule):
    """The baseline without a federation: every site keeps all it trains."""

    about = Declaration(
        name="local",
        title="Local only",
        paper="",
        adapters=(),
        exact="nothing is shared",
        up="0",
        down="0",
        noise_linear=True,
        secure=True,
        gauge_free=True,
        unequal_ranks=True,
        mean=False,
        personal=True,
    )

    @override
    def plan(self, spec: AdapterSpec, round: int) -> RoundPlan:
        names = trained_names(spec)
        return RoundPlan(train=names, send=(), personal=names)

    @override
    def combine(self, current: AdapterState, updates: Iterable[Update], *, round: int) -> Outcome:
        for _ in updates:
            pass
        return Outcome(state=current)
