"""The private plan of one site in one run: one object binds sampler, clipping, noise and event."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from fedllm.config import Config
from fedllm.errors import BudgetError, PrivacyError
from fedllm.privacy.accounting import Spend, calibrate, epsilon, require_delta, within
from fedllm.privacy.ledger import Entry, Ledger
from fedllm.privacy.policy import SitePolicy


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """Everything a private step needs, so that its parts cannot disagree.

    Attributes
    ----------
    sample_rate : float
        Expected batch size over the site's number of training records.
    expected_batch : float
        What the noised sum is divided by; never the size of the batch drawn.
    sensitivity : float
        Largest change of the clipped sum when one record is added or removed: C.
    """

    noise_multiplier: float
    clipping_norm: float
    sample_rate: float
    expected_batch: float
    local_steps: int
    rounds: int
    delta: float

    @property
    def sensitivity(self) -> float:
        """Return C."""
        return self.clipping_norm

    @property
    def noise_deviation(self) -> float:
        """Return the standard deviation of the noise on the clipped sum."""
        return self.noise_multiplier * self.sensitivity

    def spend(self, *, rounds: int = 1) -> Spend:
        """Return the accounting event of some rounds."""
        return Spend(
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=self.local_steps * rounds,
        )


def make_plan(
    config: Config, *, records: int, site: str, round: int = 1, spent: tuple[Spend, ...] = ()
) -> PrivacyPlan:
    """Derive a site's plan from the recipe and its own number of training records.

    Parameters
    ----------
    round : int
        The round about to start, from 1.
    spent : tuple[Spend, ...]
        What this run has booked at this site so far. If a crash made it book more than the
        finished rounds explain, the remaining rounds get more noise, so that the run still ends
        within ``privacy.epsilon``.

    Raises
    ------
    PrivacyError
        If delta is not below 1/n, or the batch is not smaller than the data set.
    """
    privacy, train, rounds = config.privacy, config.train, config.federation.rounds
    require_delta(privacy.delta, records=records, site=site)
    batch = train.batch_size * train.accumulation
    if batch >= records:
        raise PrivacyError(
            f"site {site}: a batch of {batch} records (train.batch_size x train.accumulation) is not "
            "below its number of training records, so sampling cannot be private; use a smaller batch."
        )
    rate, steps = batch / records, train.local_steps
    sigma = privacy.noise_multiplier
    if not sigma:
        sigma = calibrate(target=privacy.epsilon, delta=privacy.delta, sample_rate=rate, steps=steps * rounds)
        if sum(spend.steps for spend in spent) > steps * (round - 1):
            sigma = calibrate(
                target=privacy.epsilon,
                delta=privacy.delta,
                sample_rate=rate,
                steps=steps * (rounds - round + 1),
                prior=spent,
            )
    return PrivacyPlan(
        noise_multiplier=sigma,
        clipping_norm=privacy.clipping_norm,
        sample_rate=rate,
        expected_batch=float(batch),
        local_steps=steps,
        rounds=rounds,
        delta=privacy.delta,
    )


def basis_plan(config: Config, *, records: int, site: str) -> PrivacyPlan:
    """Return the plan of one noised sum over about ``adapter.basis_records`` records (dp-gradient).

    Raises
    ------
    PrivacyError
        If delta is not below 1/n, or more records are expected than there are.
    """
    require_delta(config.privacy.delta, records=records, site=site)
    expected = config.adapter.basis_records
    if expected >= records:
        raise PrivacyError(
            f"site {site}: adapter.basis_records={expected} is not below its number of training records."
        )
    return PrivacyPlan(
        noise_multiplier=config.adapter.basis_noise,
        clipping_norm=config.privacy.clipping_norm,
        sample_rate=expected / records,
        expected_batch=float(expected),
        local_steps=1,
        rounds=0,
        delta=config.privacy.delta,
    )


def authorise(plan: PrivacyPlan, *, policy: SitePolicy, ledger: Ledger, run: str, round: int) -> float:
    """Book one round if the site's policy and budget allow it, and return the run's epsilon after it.

    The projection covers the rounds still planned, so that a run which cannot be finished is
    refused at its start rather than in the middle. The data set's name comes from the policy
    alone: nothing a server sends can open a fresh budget.

    Raises
    ------
    BudgetError
        If the projection exceeds the policy's largest epsilon; nothing is booked then.
    """
    policy.require_noise(plan.noise_multiplier)
    entries = ledger.entries(dataset=policy.dataset)
    spent = [entry.spend for entry in entries]
    planned = [*spent, plan.spend(rounds=plan.rounds - round + 1)]
    if not within(planned, delta=policy.max_delta, limit=policy.max_epsilon * (1 + 1e-6)):
        projected, held = (epsilon(total, delta=policy.max_delta) for total in (planned, spent))
        raise BudgetError(
            f"site {policy.site}: budget exhausted. {held:.2f} of epsilon {policy.max_epsilon:g} is spent "
            f"on this data set and the remaining rounds would bring it to {projected:.2f}."
        )
    ledger.book(
        Entry(
            dataset=policy.dataset,
            run=run,
            round=round,
            clipping_norm=plan.clipping_norm,
            noise_multiplier=plan.noise_multiplier,
            sample_rate=plan.sample_rate,
            steps=plan.local_steps,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
    )
    return epsilon([*(e.spend for e in entries if e.run == run), plan.spend()], delta=plan.delta)
