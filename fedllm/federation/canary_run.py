"""The one-run audit: a recipe's rounds with canaries among every site's records."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.adapters import METHODS
from fedllm.aggregation import Update, make_rule
from fedllm.config import Config
from fedllm.data.sites import simulated_sites
from fedllm.errors import ConfigError
from fedllm.federation.plan import check_recipe
from fedllm.privacy.accounting import epsilon
from fedllm.privacy.audit import Check, area_under_curve, best_one_run
from fedllm.privacy.plan import PrivacyPlan, make_plan
from fedllm.training.dirac import DiracCanaries
from fedllm.training.round import train_round
from fedllm.training.session import open_session, tokenise
from fedllm.training.spec import adapter_spec, basis_from_seed, basis_seed


@dataclass(frozen=True, kw_only=True)
class OneRun:
    """What one run's canaries show about one site.

    Attributes
    ----------
    theory : float
        The site's epsilon by the accountant.
    bound : float
        Lower bound of epsilon at 95 % confidence.
    area : float
        Area under the curve of the guesses.
    """

    site: str
    theory: float
    bound: float
    canaries: int
    guesses: int
    correct: int
    area: float

    @property
    def check(self) -> Check:
        """Return the line of the audit."""
        detail = (
            f"{self.site}: {self.correct} of {self.guesses} guesses about {self.canaries} canaries were "
            f"right (area under the curve {self.area:.3f}): epsilon is at least {self.bound:.2f} at "
            f"95 %; the accountant says {self.theory:.2f}"
        )
        return Check("one run", self.bound <= self.theory, detail)


def audit_one_run(config: Config, *, canaries: int = 1000) -> list[OneRun]:
    """Train a recipe's federation with canaries at every site, and bound each site's epsilon from below.

    Sampling, clipping, noise, optimiser, schedule and aggregation are those of a run; the adapter is
    thrown away. About half of the canaries are among a site's records, and count as such.

    Raises
    ------
    ConfigError
        If the recipe is not private, or its rule does more than average what sites send.
    """
    check_recipe(config)
    rule, spec = make_rule(config), adapter_spec(config)
    basis = basis_from_seed(spec)
    first = rule.plan(spec, 1)
    if not config.privacy.enabled:
        raise ConfigError("privacy.enabled=false: there is nothing private to audit.")
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
    sites = {}
    for data in simulated_sites(config.data, sites=config.federation.sites, seed=config.run.seed):
        watched = DiracCanaries(
            shapes,
            count=canaries,
            clipping_norm=config.privacy.clipping_norm,
            expected_batch=float(config.train.batch_size * config.train.accumulation),
        )
        plan = make_plan(config, units=len(data.units) + len(watched.units), site=data.name)
        sites[data.name] = tokenise(data, config), plan, watched
    for round in range(1, config.federation.rounds + 1):
        train, updates = rule.plan(spec, round).train, []
        for name, (tokens, plan, watched) in sites.items():
            trained = train_round(
                session,
                tokens,
                config=config,
                state=state,
                round=round,
                plan=plan,
                train=train,
                canaries=watched,
            )
            updates.append(Update(site=name, state=trained.state, weight=1.0))
        state = rule.combine(state, updates, round=round).state
    return [_result(name, plan, watched) for name, (_, plan, watched) in sites.items()]


def _result(name: str, plan: PrivacyPlan, watched: DiracCanaries) -> OneRun:
    theory = epsilon([plan.spend(rounds=plan.rounds)], delta=plan.delta, relation=plan.relation)
    bound, guesses, correct = best_one_run(watched.scores, watched.included, delta=plan.delta)
    return OneRun(
        site=name,
        theory=theory,
        bound=bound,
        canaries=len(watched.scores),
        guesses=guesses,
        correct=correct,
        area=area_under_curve(watched.scores[watched.included], watched.scores[~watched.included]),
    )
