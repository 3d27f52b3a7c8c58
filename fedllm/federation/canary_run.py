"""The one-run audit: a recipe's rounds with canaries among every site's records, and among the sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedllm.adapters import METHODS
from fedllm.aggregation import Update, make_rule
from fedllm.config import Config
from fedllm.data.sites import SiteData
from fedllm.errors import ConfigError
from fedllm.federation.plan import check_recipe
from fedllm.federation.shares import training_shares
from fedllm.federation.site import training_config
from fedllm.federation.site_canaries import SiteCanaries
from fedllm.privacy.accounting import epsilon
from fedllm.privacy.audit import Check, Scores, area_under_curve, best_one_run, epsilon_by_gaussian
from fedllm.privacy.plan import PrivacyPlan, make_plan
from fedllm.training.dirac import DiracCanaries
from fedllm.training.round import train_round
from fedllm.training.session import SiteTokens, open_session, tokenise
from fedllm.training.spec import adapter_spec, basis_from_seed, basis_seed


@dataclass(frozen=True, kw_only=True)
class OneRun:
    """What one run's canaries show about one site, or about whole sites.

    Attributes
    ----------
    subject : str
        The site, or "whole sites".
    theory : float
        Epsilon by the accountant.
    bound : float
        Lower bound of epsilon at 95 % confidence.
    area : float
        Area under the curve of the guesses.
    by_gaussian : float
        Lower bound that takes each canary's score for a Gaussian of its own: whole sites only, where
        every canary has a coordinate, and noise, of its own in every round.
    """

    subject: str
    theory: float
    bound: float
    canaries: int
    guesses: int
    correct: int
    area: float
    by_gaussian: float = 0.0

    @property
    def check(self) -> Check:
        """Return the line of the audit: no lower bound may exceed the theory."""
        gaussian = f" ({self.by_gaussian:.2f}, Gaussian trade-off)" if self.by_gaussian else ""
        detail = (
            f"{self.subject}: {self.correct} of {self.guesses} guesses about {self.canaries} canaries were "
            f"right (area under the curve {self.area:.3f}): epsilon is at least {self.bound:.2f}{gaussian} "
            f"at 95 %; the accountant says {self.theory:.2f}"
        )
        return Check("one run", max(self.bound, self.by_gaussian) <= self.theory, detail)

    @property
    def bounds(self) -> tuple[tuple[str, float, float], ...]:
        """Return the lower bounds beside the theory, by name, for the picture."""
        found = [(f"run, {self.subject}", self.theory, self.bound)]
        if self.by_gaussian:
            found.append((f"run, {self.subject}, Gaussian trade-off", self.theory, self.by_gaussian))
        return tuple(found)


def audit_one_run(config: Config, *, canaries: int = 1000) -> list[OneRun]:
    """Train a recipe's federation with canaries, and bound what it promises from below.

    Where records are private there are canaries among every site's records; where whole sites are,
    canary sites among the sites. About half of them take part. Sampling, clipping, noise, optimiser,
    schedule and aggregation are those of a run; the adapter is thrown away.

    Raises
    ------
    ConfigError
        If the recipe promises nothing, or its rule does more than average what sites send.
    """
    check_recipe(config)
    rule, spec = make_rule(config), adapter_spec(config)
    basis = basis_from_seed(spec)
    first = rule.plan(spec, 1)
    if not (config.privacy.enabled or config.site_privacy.enabled):
        raise ConfigError(
            "privacy.enabled=false, site_privacy.enabled=false: there is nothing private to audit."
        )
    if (
        basis is None
        or not rule.about.mean
        or first.personal
        or first.align
        or config.wire.codec != "float32"
    ):
        raise ConfigError(
            "the one-run audit covers seeded adapters and rules that average what sites send, uncompressed."
        )
    session = open_session(config, spec, basis)
    state = METHODS[spec.method].initial_state(spec, seed=basis_seed(config))
    shapes = {key: tuple(value.shape) for key, value in session.trainable(first.train).items()}
    shares, config = training_shares(config), training_config(config)
    if not shares:
        raise ConfigError("federation.mode=base: nothing is trained, so there is nothing to audit.")
    sites = [_watched(config, data, shapes, canaries) for data in shares]
    whole = SiteCanaries(config, shapes, count=canaries) if config.site_privacy.enabled else None
    for round in range(1, config.federation.rounds + 1):
        plan, updates = rule.plan(spec, round), []
        for site in sites:
            trained = train_round(
                session,
                site.tokens,
                config=config,
                state=state,
                round=round,
                plan=site.plan,
                train=plan.train,
                canaries=site.canaries,
            )
            updates.append(Update(site=site.tokens.name, state=trained.state, weight=1.0))
        if whole is None:
            state = rule.combine(state, updates, round=round).state
        else:
            state = whole.release(state, updates, plan=plan, round=round)
    results = [
        _result(
            site.tokens.name,
            epsilon(
                [site.plan.spend(rounds=site.plan.rounds)], delta=site.plan.delta, relation=site.plan.relation
            ),
            site.canaries.scores,
            site.canaries.included,
            delta=site.plan.delta,
        )
        for site in sites
        if site.plan is not None and site.canaries is not None
    ]
    if whole is not None:
        delta, scores, included = config.site_privacy.delta, whole.scores, whole.included
        found = _result("whole sites", whole.epsilon, scores, included, delta=delta)
        by_gaussian = epsilon_by_gaussian(scores[~included], scores[included], delta=delta)
        results.append(replace(found, by_gaussian=by_gaussian))
    return results


@dataclass(frozen=True, kw_only=True)
class _Watched:
    """A site that trains in the audit; plan and canaries where its records are private."""

    tokens: SiteTokens
    plan: PrivacyPlan | None
    canaries: DiracCanaries | None


def _watched(config: Config, data: SiteData, shapes: Mapping[str, Sequence[int]], canaries: int) -> _Watched:
    tokens = tokenise(data, config)
    if not config.privacy.enabled:
        return _Watched(tokens=tokens, plan=None, canaries=None)
    watched = DiracCanaries(
        shapes,
        count=canaries,
        clipping_norm=config.privacy.clipping_norm,
        expected_batch=float(config.train.batch_size * config.train.accumulation),
    )
    plan = make_plan(config, units=len(data.units) + len(watched.units), site=data.name)
    return _Watched(tokens=tokens, plan=plan, canaries=watched)


def _result(
    subject: str, theory: float, scores: Scores, included: npt.NDArray[np.bool_], *, delta: float
) -> OneRun:
    bound, guesses, correct = best_one_run(scores, included, delta=delta)
    return OneRun(
        subject=subject,
        theory=theory,
        bound=bound,
        canaries=len(scores),
        guesses=guesses,
        correct=correct,
        area=area_under_curve(scores[included], scores[~included]),
    )
