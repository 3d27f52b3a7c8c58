"""Rules on LoRA's products ``s B A``: stacking, residuals, singular vectors, alignment."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
from typing_extensions import override

from fedllm.adapters.method import HEAD
from fedllm.adapters.state import AdapterSpec, AdapterState, Matrix
from fedllm.aggregation.average import Mean
from fedllm.aggregation.factors import centred_residual, factor_mean, fair, hetlora, rank_partitioned
from fedllm.aggregation.lowrank import LowRank, normalised, stack, truncate
from fedllm.aggregation.rule import (
    Branch,
    Declaration,
    Outcome,
    Products,
    RoundPlan,
    Rule,
    Update,
    branches_of,
    factors,
    product_of,
    rest_mean,
    trained_names,
)
from fedllm.aggregation.spectral import rebuild, refactor
from fedllm.errors import RunError

PRODUCTS = ("lora", "hydra")


class ProductRule(Rule):
    """A rule that works branch by branch on the sites' products."""

    @abstractmethod
    def merge(self, terms: Sequence[LowRank], weights: Sequence[float], *, rank: int) -> LowRank:
        """Return one branch's next product from the sites' ones."""

    @override
    def combine(self, current: AdapterState, updates: Iterable[Update], *, round: int) -> Outcome:
        held = list(updates)
        weights = [update.weight for update in held]
        tensors: dict[str, Matrix] = {**current.tensors, **rest_mean(held)}
        for branch, terms in by_branch(held):
            # one branch at a time in float64
            merged = {branch: self.merge(terms, weights, rank=current.spec.rank)}
            tensors |= factors(current.spec, merged, current=current)
        return Outcome(state=current.with_tensors(tensors))


class FedIT(ProductRule):
    """FedIT: the mean of A and the mean of B."""

    about = Declaration(
        name="fedit",
        title="FedIT",
        paper="arXiv 2305.05644",
        adapters=PRODUCTS,
        exact="no",
        up="r (m + n)",
        down="r (m + n)",
        noise_linear=False,
        secure=True,
        gauge_free=False,
        unequal_ranks=True,
        mean=False,
    )

    @override
    def merge(self, terms: Sequence[LowRank], weights: Sequence[float], *, rank: int) -> LowRank:
        return factor_mean(terms, weights)


class FlexLoRA(ProductRule):
    """FlexLoRA: the best truncation of the exact sum, cut to each site's rank."""

    about = Declaration(
        name="flexlora",
        title="FlexLoRA",
        paper="arXiv 2402.11505",
        adapters=PRODUCTS,
        exact="up to truncation",
        up="r_k (m + n)",
        down="r_k (m + n)",
        noise_linear=False,
        secure=False,
        gauge_free=True,
        unequal_ranks=True,
        mean=False,
    )

    @override
    def merge(self, terms: Sequence[LowRank], weights: Sequence[float], *, rank: int) -> LowRank:
        return truncate(stack(terms, normalised(weights)), rank=rank)


class RaFLoRA(FlexLoRA):
    """raFLoRA: as FlexLoRA, each rank component averaged over the sites that own it."""

    about = Declaration(
        name="raflora",
        title="raFLoRA",
        paper="arXiv 2602.13486",
        adapters=PRODUCTS,
        exact="no: components are reweighted",
        up="r_k (m + n)",
        down="r_k (m + n)",
        noise_linear=False,
        secure=False,
        gauge_free=True,
        unequal_ranks=True,
        mean=False,
    )

    @override
    def merge(self, terms: Sequence[LowRank], weights: Sequence[float], *, rank: int) -> LowRank:
        ordered = [truncate(term) for term in terms]
        return truncate(rank_partitioned(ordered, weights), rank=rank)


class HetLoRA(ProductRule):
    """HetLoRA: zero-padded factor means, weighted by the norm of each site's product."""

    about = Declaration(
        name="hetlora",
        title="HetLoRA",
        paper="arXiv 2401.06432",
        adapters=PRODUCTS,
        exact="no",
        up="r_k (m + n)",
        down="r_k (m + n)",
        noise_linear=False,
        secure=False,
        gauge_free=False,
        unequal_ranks=True,
        mean=False,
    )

    @override
    def merge(self, terms: Sequence[LowRank], weights: Sequence[float], *, rank: int) -> LowRank:
        return hetlora(terms)


class LoRAFAIR(ProductRule):
    """LoRA-FAIR in closed form: the mean of A, and the B that fits the mean of the products best."""

    about = Declaration(
        name="lora-fair",
        title="LoRA-FAIR",
        paper="arXiv 2411.14961",
        adapters=PRODUCTS,
        exact="projected on the mean A's rows",
        up="r (m + n)",
        down="r (m + n)",
        noise_linear=False,
        secure=False,
        gauge_free=False,
        unequal_ranks=False,
        mean=False,
    )

    @override
    def merge(self, terms: Sequence[LowRank], weights: Sequence[float], *, rank: int) -> LowRank:
        return fair(terms, weights)


class FedRot(FedIT):
    """FedRot-LoRA: sites turn their factors towards the received ones before they are averaged."""

    about = Declaration(
        name="fedrot",
        title="FedRot-LoRA",
        paper="arXiv 2602.23638",
        adapters=("lora",),
        exact="no, but nearer",
        up="r (m + n)",
        down="r (m + n)",
        noise_linear=False,
        secure=True,
        gauge_free=False,
        unequal_ranks=False,
        mean=False,
    )

    @override
    def plan(self, spec: AdapterSpec, round: int) -> RoundPlan:
        names = trained_names(spec)
        # in the first round every B started from zero: there is nothing to turn to
        return RoundPlan(train=names, send=names, align="" if round == 1 else "B" if round % 2 else "A")


class FedEx(ProductRule):
    """FedEx-LoRA: the mean factors, and what they miss folded into the base in factors."""

    about = Declaration(
        name="fedex",
        title="FedEx-LoRA",
        paper="arXiv 2410.09432",
        adapters=("lora",),
        exact="yes, until the folded rank passes its cap",
        up="r (m + n)",
        down="r (m + n) + (K - 1) r (m + n)",
        noise_linear=False,
        secure=False,
        gauge_free=False,
        unequal_ranks=False,
        mean=False,
    )

    @override
    def folded_rank(self, ranks: Sequence[int]) -> int:
        return (len(ranks) - 1) * max(ranks)

    @override
    def merge(self, terms: Sequence[LowRank], weights: Sequence[float], *, rank: int) -> LowRank:
        return factor_mean(terms, weights)

    @override
    def combine(self, current: AdapterState, updates: Iterable[Update], *, round: int) -> Outcome:
        held = list(updates)
        outcome = super().combine(current, held, round=round)
        weights = [update.weight for update in held]
        missing = {b[0]: _stored(centred_residual(terms, weights)) for b, terms in by_branch(held)}
        return Outcome(state=outcome.state, folded=missing if len(held) > 1 else None)


class FLoRA(ProductRule):
    """FLoRA: all sites' factors stacked and folded into the base; sites start anew each round."""

    about = Declaration(
        name="flora",
        title="FLoRA",
        paper="arXiv 2409.05976",
        adapters=("lora",),
        exact="yes, until the folded rank passes its cap",
        up="r_k (m + n)",
        down="(sum of r_k) (m + n)",
        noise_linear=False,
        secure=False,
        gauge_free=True,
        unequal_ranks=True,
        mean=False,
    )

    @override
    def plan(self, spec: AdapterSpec, round: int) -> RoundPlan:
        names = trained_names(spec)
        return RoundPlan(train=names, send=names, restart=True)

    @override
    def folded_rank(self, ranks: Sequence[int]) -> int:
        return sum(ranks)

    @override
    def merge(self, terms: Sequence[LowRank], weights: Sequence[float], *, rank: int) -> LowRank:
        return stack(terms, normalised(weights))

    @override
    def combine(self, current: AdapterState, updates: Iterable[Update], *, round: int) -> Outcome:
        held = list(updates)
        weights = [update.weight for update in held]
        sums = {
            branch[0]: _stored(self.merge(terms, weights, rank=current.spec.rank))
            for branch, terms in by_branch(held)
        }
        return Outcome(state=current.with_tensors({**current.tensors, **rest_mean(held)}), folded=sums)


class FLoRIST(FLoRA):
    """FLoRIST: FLoRA's sum, cut where the singular values hold a share of the energy."""

    about = Declaration(
        name="florist",
        title="FLoRIST",
        paper="arXiv 2506.09199",
        adapters=("lora",),
        exact="up to truncation by energy",
        up="r_k (m + n)",
        down="p (m + n), p from the energy kept",
        noise_linear=False,
        secure=False,
        gauge_free=True,
        unequal_ranks=True,
        mean=False,
    )

    @override
    def merge(self, terms: Sequence[LowRank], weights: Sequence[float], *, rank: int) -> LowRank:
        return truncate(stack(terms, normalised(weights)), energy=self.settings.energy)


class FedSVD(Rule):
    """FedSVD: sites train B; the server gives B A an orthonormal A again, which is free under DP."""

    about = Declaration(
        name="fedsvd",
        title="FedSVD",
        paper="arXiv 2505.12805",
        adapters=("lora",),
        exact="yes",
        up="r m",
        down="r (m + n)",
        noise_linear=True,
        secure=True,
        gauge_free=False,
        unequal_ranks=False,
        mean=False,
    )

    @override
    def plan(self, spec: AdapterSpec, round: int) -> RoundPlan:
        names = ("B", *(HEAD if spec.head else ()))
        return RoundPlan(train=names, send=names)

    @override
    def changes(self, spec: AdapterSpec, round: int) -> tuple[str, ...]:
        return trained_names(spec)

    @override
    def combine(self, current: AdapterState, updates: Iterable[Update], *, round: int) -> Outcome:
        mean = Mean()
        for update in updates:
            mean.add(update.state.tensors, update.weight)
        averaged = mean.result64()
        tensors: dict[str, Matrix] = dict(current.tensors)
        for module in current.spec.shapes:
            again = refactor(averaged.pop(f"{module}.B"), current.tensors[f"{module}.A"].astype(np.float64))
            tensors[f"{module}.B"] = again.up.astype(np.float32)
            tensors[f"{module}.A"] = again.down.astype(np.float32)
        tensors |= {key: value.astype(np.float32) for key, value in averaged.items()}
        return Outcome(state=current.with_tensors(tensors))


class FedASK(Rule):
    """FedASK: two sums of sketches give the best rank-r factors of the exact sum.

    The updates of :meth:`combine` hold Z and the server's own Q beside the head. Private sites
    train B alone, so that the noise stays linear.
    """

    about = Declaration(
        name="fedask",
        title="FedASK",
        paper="arXiv 2507.09990",
        adapters=("lora",),
        exact="up to truncation, if the sketch is wide enough",
        up="(r + p) (m + n), in two stages",
        down="r (m + n) + (r + p) m",
        noise_linear=True,
        secure=True,
        gauge_free=True,
        unequal_ranks=False,
        mean=False,
    )

    @override
    def plan(self, spec: AdapterSpec, round: int) -> RoundPlan:
        names = trained_names(spec)
        trained = tuple(name for name in names if name != "A") if self.private else names
        return RoundPlan(train=trained, send=trained, sketch=True)

    @override
    def changes(self, spec: AdapterSpec, round: int) -> tuple[str, ...]:
        return trained_names(spec)

    @override
    def combine(self, current: AdapterState, updates: Iterable[Update], *, round: int) -> Outcome:
        mean = Mean()
        for update in updates:
            mean.add(update.state.tensors, update.weight)
        sums = mean.result64()
        found: Products = {}
        for module in current.spec.shapes:
            basis, back = sums.pop(f"{module}.Q"), sums.pop(f"{module}.Z")
            # the paper balances B and A themselves, without their scale
            term = rebuild(basis, back / current.spec.scale, rank=current.spec.rank)
            found[module, "B", "A"] = LowRank(current.spec.scale * term.up, term.down)
        rest = {key: value.astype(np.float32) for key, value in sums.items()}
        new = factors(current.spec, found, current=current)
        return Outcome(state=current.with_tensors({**current.tensors, **new, **rest}))


def by_branch(updates: Sequence[Update]) -> Iterable[tuple[Branch, list[LowRank]]]:
    """Yield every branch with the sites' products; one branch at a time is held in float64."""
    if not updates:
        raise RunError("cannot aggregate 0 states.")
    for branch in branches_of(updates[0].state.spec):
        yield branch, [product_of(update.state, branch) for update in updates]


def _stored(term: LowRank) -> tuple[Matrix, Matrix]:
    return term.up.astype(np.float32), term.down.astype(np.float32)
