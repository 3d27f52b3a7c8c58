"""The private plan of one site in one run: one object binds sampler, clipping, noise and event."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from torch import Tensor

from fedllm.config import Config
from fedllm.errors import BudgetError, PrivacyError
from fedllm.privacy.accounting import (
    REPLACE,
    Spend,
    batch_cap,
    calibrate,
    epsilon,
    require_delta,
    within,
)
from fedllm.privacy.clipping import clipped_sum, grid_sum
from fedllm.privacy.entropy import SecureGenerator
from fedllm.privacy.ledger import Entry, Ledger, new_salt
from fedllm.privacy.noise import GRID_BITS, discrete_gaussian, gaussian
from fedllm.privacy.policy import SitePolicy
from fedllm.privacy.sampling import poisson_sample, random_subset


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """Everything a private step needs, so that its parts cannot disagree.

    Attributes
    ----------
    units : int
        Privacy units (records, or patients or customers) the batches are drawn from.
    sample_rate : float
        Probability that a step takes a unit.
    expected_batch : float
        What the noised sum is divided by; never the size of the batch drawn.
    cap : int
        Largest batch, 0: none. What is drawn beyond it is left out at random.
    relation : str
        What neighbouring data sets are; see :data:`fedllm.privacy.accounting.RELATIONS`.
    discrete : bool
        Sum and noise live on a grid of integers.
    public_units : int
        Number of units that the site makes public, from which all but ``units`` follows, so that nothing
        that leaves tells the true one; 0: the true one counts as public.
    """

    noise_multiplier: float
    clipping_norm: float
    units: int
    sample_rate: float
    expected_batch: float
    local_steps: int
    rounds: int
    delta: float
    relation: str
    cap: int = 0
    discrete: bool = False
    public_units: int = 0

    @property
    def sensitivity(self) -> float:
        """Return the largest change of the clipped sum between neighbours: C, or 2C if one is replaced."""
        return self.clipping_norm * (2 if self.relation == REPLACE else 1)

    @property
    def noise_deviation(self) -> float:
        """Return the standard deviation of the noise on the clipped sum."""
        return self.noise_multiplier * self.clipping_norm

    @property
    def gradient_deviation(self) -> float:
        """Return the standard deviation of the noise in the privatised gradient."""
        return self.noise_deviation / self.expected_batch

    def spend(self, *, rounds: int = 1) -> Spend:
        """Return the accounting event of some rounds."""
        return Spend(
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=self.local_steps * rounds,
            cap=self.cap,
            records=self.units if self.cap else 0,
        )

    def draw(self, generator: SecureGenerator) -> list[int]:
        """Return the units of a step, in order; there may be none."""
        drawn = poisson_sample(self.units, rate=self.sample_rate, generator=generator)
        return random_subset(drawn, size=self.cap, generator=generator) if self.cap else drawn

    def zeros(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Return the sum over no unit."""
        dtype = torch.int64 if self.discrete else torch.float32
        return {name: torch.zeros(tuple(shape), dtype=dtype) for name, shape in shapes.items()}

    def clip(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the clipped sum of per-unit gradients, shape (B, *shape), of all trained matrices.

        With a discrete plan it is in grid steps, as integers.
        """
        if self.discrete:
            return grid_sum(gradients, clipping_norm=self.clipping_norm, step=self._grid)
        return clipped_sum(gradients, clipping_norm=self.clipping_norm)

    def privatise(self, sums: Mapping[str, Tensor], generator: SecureGenerator) -> dict[str, Tensor]:
        """Return the step's gradient: (clipped sum + fresh noise) / expected batch, float64."""
        result = {}
        for name, value in sums.items():
            shape = tuple(value.shape)
            if self.discrete:
                noise = torch.from_numpy(discrete_gaussian(shape, generator=generator))
                total = (value.cpu() + noise).double() * self._grid
            else:
                drawn = gaussian(shape, deviation=self.noise_deviation, generator=generator)
                total = value.cpu().double() + torch.from_numpy(drawn)
            result[name] = total / self.expected_batch
        return result

    @property
    def _grid(self) -> float:
        return self.noise_deviation / float(2**GRID_BITS)


def make_plan(
    config: Config,
    *,
    units: int,
    site: str,
    public_units: int = 0,
    round: int = 1,
    spent: tuple[Spend, ...] = (),
    before: tuple[Spend, ...] = (),
) -> PrivacyPlan:
    """Derive a site's plan from the recipe and its own number of training units.

    Parameters
    ----------
    public_units : int
        From a site's policy: rate, noise and refusals follow from this number and not from ``units``.
    round : int
        The round about to start, from 1.
    spent : tuple[Spend, ...]
        What this run has booked at this site for rounds so far. If a crash made it book more than
        the finished rounds explain, the remaining rounds get more noise, so that the run still
        ends within ``privacy.epsilon``.
    before : tuple[Spend, ...]
        What it has booked beside its rounds, as for a basis: all rounds get more noise for that.

    Raises
    ------
    PrivacyError
        If delta is not below 1/n, or the batch is not smaller than the data set.
    """
    privacy, train, rounds = config.privacy, config.train, config.federation.rounds
    count = public_units or units
    require_delta(privacy.delta, records=count, site=site)
    batch = train.batch_size * train.accumulation
    if batch >= count:
        raise PrivacyError(
            f"site {site}: a batch of {batch} records (train.batch_size x train.accumulation) is not "
            "below its number of training records, so sampling cannot be private; use a smaller batch.",
            public=f"site {site}: the batch is too large for its number of records; use a smaller one.",
        )
    rate, steps = batch / count, train.local_steps
    cap = batch_cap(records=count, rate=rate, delta=privacy.delta) if privacy.batch_cap else 0
    sigma = privacy.noise_multiplier
    if not sigma:
        late = sum(spend.steps for spend in spent) > steps * (round - 1)
        sigma = calibrate(
            target=privacy.epsilon,
            delta=privacy.delta,
            sample_rate=rate,
            steps=steps * (rounds - round + 1 if late else rounds),
            prior=(*before, *(spent if late else ())),
            cap=cap,
            records=count if cap else 0,
            relation=privacy.relation,
        )
    return PrivacyPlan(
        noise_multiplier=sigma,
        clipping_norm=privacy.clipping_norm,
        units=units,
        sample_rate=rate,
        expected_batch=float(batch),
        local_steps=steps,
        rounds=rounds,
        delta=privacy.delta,
        relation=privacy.relation,
        cap=cap,
        discrete=privacy.noise == "discrete-gaussian",
        public_units=public_units,
    )


def basis_plan(config: Config, *, units: int, site: str, public_units: int = 0) -> PrivacyPlan:
    """Return the plan of one noised sum over about ``adapter.basis_records`` units (dp-gradient).

    Raises
    ------
    PrivacyError
        If delta is not below 1/n, or more records are expected than there are.
    """
    count = public_units or units
    require_delta(config.privacy.delta, records=count, site=site)
    expected = config.adapter.basis_records
    if expected >= count:
        raise PrivacyError(
            f"site {site}: adapter.basis_records={expected} is not below its number of training records.",
            public=f"site {site}: adapter.basis_records is too large for its number of records.",
        )
    return PrivacyPlan(
        noise_multiplier=config.adapter.basis_noise,
        clipping_norm=config.privacy.clipping_norm,
        units=units,
        sample_rate=expected / count,
        expected_batch=float(expected),
        local_steps=1,
        rounds=0,
        delta=config.privacy.delta,
        relation=config.privacy.relation,
        discrete=config.privacy.noise == "discrete-gaussian",
        public_units=public_units,
    )


def counts_plan(config: Config, *, counts: int) -> PrivacyPlan:
    """Return the plan of some counts over all held-out records, released once (Gaussian mechanism).

    A record adds at most one to each count: the clipping norm is the square root of their number. All
    records count, and nothing follows from how many there are.
    """
    return PrivacyPlan(
        noise_multiplier=config.evaluation.noise_multiplier,
        clipping_norm=counts**0.5,
        units=1,
        sample_rate=1.0,
        expected_batch=1.0,
        local_steps=1,
        rounds=1,
        delta=config.privacy.delta,
        relation=config.privacy.relation,
        discrete=config.privacy.noise == "discrete-gaussian",
    )


def whole_run(
    config: Config, *, units: int, site: str, public_units: int = 0, makes_basis: bool
) -> tuple[PrivacyPlan, tuple[Spend, ...]]:
    """Return a site's plan, and all that a run without interruption spends there.

    Parameters
    ----------
    makes_basis : bool
        Whether the site is the one that makes the basis for all, which dp-gradient spends for.
    """
    before: tuple[Spend, ...] = ()
    if makes_basis and config.adapter.basis == "dp-gradient":
        before = (basis_plan(config, units=units, site=site, public_units=public_units).spend(),)
    plan = make_plan(config, units=units, site=site, public_units=public_units, before=before)
    return plan, (*before, plan.spend(rounds=plan.rounds))


def require_allowed(plan: PrivacyPlan, policy: SitePolicy) -> None:
    """Refuse a plan that a site's policy forbids, whatever is left of its budget.

    Raises
    ------
    BudgetError
        If there is less noise than the policy's least, or its delta does not fit the number of units.
    """
    policy.require_noise(plan.noise_multiplier)
    policy.require_delta(plan.public_units or plan.units)


def authorise(
    plan: PrivacyPlan,
    *,
    policy: SitePolicy,
    ledger: Ledger,
    run: str,
    round: int,
    data: str,
    ahead: tuple[Spend, ...] = (),
) -> float:
    """Book one round if the site's policy and budget allow it, and return the run's epsilon after it.

    The projection covers the rounds still planned, so that a run which cannot be finished is
    refused at its start rather than in the middle. What counts as the same data set the policy and
    the records decide: nothing a server sends can open a fresh budget.

    Parameters
    ----------
    data : str
        Fingerprint of the training records. Spends on the same records count whatever name the
        policy had for them.
    ahead : tuple[Spend, ...]
        What the run will spend beside this plan's own rounds.

    Raises
    ------
    BudgetError
        If the projection exceeds the policy's largest epsilon; nothing is booked then.
    """
    require_allowed(plan, policy)
    # round 0 makes a basis and is no round of the plan's
    planned = (plan.spend(rounds=max(1, plan.rounds - round + 1)), *ahead)

    def ours(entries: Iterable[Entry]) -> list[Entry]:
        return [entry for entry in entries if entry.dataset == policy.dataset or entry.data == data]

    def require_room(entries: Sequence[Entry]) -> None:
        held = ours(entries)
        spent = [entry.spend for entry in held]
        limit = policy.max_epsilon * (1 + 1e-6)
        # what was promised under a stricter relation stays promised
        for relation in {plan.relation, *(entry.relation for entry in held)}:
            if not within([*spent, *planned], delta=policy.max_delta, limit=limit, relation=relation):
                projected, before = (
                    epsilon(total, delta=policy.max_delta, relation=relation)
                    for total in ([*spent, *planned], spent)
                )
                raise BudgetError(
                    f"site {policy.site}: budget exhausted. {before:.2f} of epsilon {policy.max_epsilon:g} "
                    f"is spent on this data set and the remaining rounds would bring it to {projected:.2f}.",
                    public=f"site {policy.site}: budget exhausted by what this run would spend.",
                )

    before = ledger.book(
        Entry(
            dataset=policy.dataset,
            data=data,
            run=run,
            round=round,
            clipping_norm=plan.clipping_norm,
            noise_multiplier=plan.noise_multiplier,
            sample_rate=plan.sample_rate,
            steps=plan.local_steps,
            cap=plan.cap,
            records=plan.spend().records,
            relation=plan.relation,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            salt=new_salt(),
        ),
        allowed=require_room,
    )
    own = [*(entry.spend for entry in ours(before) if entry.run == run), plan.spend()]
    return epsilon(own, delta=plan.delta, relation=plan.relation)
