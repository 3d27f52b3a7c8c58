"""The audit of a recipe's private path: what the plan promises against what the code does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from fedllm.aggregation import make_rule
from fedllm.config import Config
from fedllm.errors import ConfigError, FedllmError, PrivacyError
from fedllm.federation.counts import HELDOUT
from fedllm.federation.inprocess import reply_with
from fedllm.federation.plan import check_recipe
from fedllm.federation.records import text
from fedllm.federation.shares import training_shares
from fedllm.federation.site import real_site, training_config
from fedllm.privacy.accounting import ADD_OR_REMOVE, cross_check, epsilon, require_delta
from fedllm.privacy.audit import Check
from fedllm.privacy.entropy import SecureGenerator
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.plan import PrivacyPlan, make_plan, require_allowed
from fedllm.privacy.release import RELEASES
from fedllm.runs.events import read_events
from fedllm.runs.folder import RunFolder
from fedllm.runs.sites import SiteSummary, site_summaries
from fedllm.training.canaries import audit_mechanism
from fedllm.training.round import train_round
from fedllm.training.session import Session, SiteTokens, open_session, tokenise
from fedllm.training.spec import adapter_spec, basis_from_seed
from fedllm.training.steps import record_gradients

__all__ = ["Check", "Subject", "audit_mechanism", "run_checks", "static_checks", "subject"]

_DRAWS = 400
_NUMBERS = 40_000
_RARE = 1e-6
#: What a careless handler would add to a private reply.
_PRIVATE_VALUES = ("train_loss", "examples", "sample_rate", "noise_multiplier", "gradient_norm", "seconds")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What an audit looks at: one site as a private run would have it.

    Attributes
    ----------
    units : Mapping[str, int]
        Site -> number of units that delta is held against, of all sites that are known here.
    """

    config: Config
    units: Mapping[str, int]
    plan: PrivacyPlan
    session: Session
    tokens: SiteTokens


def subject(config: Config, policy: Path | None = None) -> Subject:
    """Return a recipe's first simulated site, or the real one of a policy, ready to train.

    Raises
    ------
    ConfigError
        If the recipe is not private, its adapter's frozen matrices come from records, or its records are
        at real sites alone.
    BudgetError
        If the policy does not allow the recipe.
    """
    check_recipe(config)
    if not config.privacy.enabled:
        raise ConfigError("privacy.enabled=false: there is nothing private to audit.")
    spec = adapter_spec(config)
    basis = basis_from_seed(spec)
    if basis is None:
        raise ConfigError(
            f"adapter.basis={config.adapter.basis}: audit the recipe with adapter.basis=seeded."
        )
    if policy is not None:
        site = real_site(policy, config)
        config, data, public = site.config, site.data(), site.policy.public_units
        plan = make_plan(config, units=len(data.units), site=data.name, public_units=public)
        require_allowed(plan, site.policy)
        units = {data.name: public or len(data.units)}
    elif config.data.source == "file" and not config.data.path:
        raise ConfigError("the records are at real sites: audit there, with --policy SITE.toml.")
    else:
        shares, config = training_shares(config), training_config(config)
        if not shares:
            raise ConfigError("federation.mode=base: nothing is trained, so there is nothing to audit.")
        data, units = shares[0], {one.name: len(one.units) for one in shares}
        plan = make_plan(config, units=len(data.units), site=data.name)
    return Subject(
        config=config,
        units=units,
        plan=plan,
        session=open_session(config, spec, basis),
        tokens=tokenise(data, config),
    )


def static_checks(found: Subject) -> list[Check]:
    """Return the lines of the static audit, in the order of a private step."""
    config, plan = found.config, found.plan
    train = make_rule(config).plan(found.session.spec, 1).train
    return [
        _delta(config, found.units),
        _accountant(plan, config),
        _sampler(plan),
        _own_loss(found, train),
        _sensitivity(plan),
        _noise_law(plan),
        _noise_source(plan),
        _trains(found, train),
        _leaving(config),
    ]


def _delta(config: Config, units: Mapping[str, int]) -> Check:
    """Check delta against the number of units of every site."""
    for site, count in units.items():
        try:
            require_delta(config.privacy.delta, records=count, site=site)
        except PrivacyError as error:
            return Check("delta", False, str(error))
    sites = "at all sites" if len(units) > 1 else f"at {next(iter(units))}"
    smallest = min(units.values())
    return Check("delta", True, f"delta={config.privacy.delta:g} is below 1/n {sites} (n >= {smallest})")


def _accountant(plan: PrivacyPlan, config: Config) -> Check:
    """Compare the planned rounds' epsilon with the target, and three accountants with each other."""
    spend = plan.spend(rounds=plan.rounds)
    found = epsilon([spend], delta=plan.delta, relation=plan.relation)
    target = config.privacy.epsilon or math.inf
    peers = cross_check([spend], delta=plan.delta)
    agree = peers["PLD"] <= peers["PRV"] + 1e-3 <= peers["PLD"] * 1.03 + 0.05
    below = peers["PLD"] <= peers["RDP"] + 1e-3
    against = ", ".join(f"{name} {value:.3f}" for name, value in peers.items())
    detail = (
        f"epsilon {found:.3f} at delta {plan.delta:g} ({plan.relation}, Poisson at {plan.sample_rate:.4g}, "
        f"noise multiplier {plan.noise_multiplier:.3f}, {spend.steps} steps); {ADD_OR_REMOVE} by "
        f"accountant: {against}"
    )
    return Check("accountant", found <= target and agree and below, detail)


def _sampler(plan: PrivacyPlan) -> Check:
    """Draw batches and compare sizes and overlaps with what independent coins give."""
    generator = SecureGenerator()
    batches = [set(plan.draw(generator)) for _ in range(_DRAWS)]
    sizes = np.array([len(batch) for batch in batches])
    n, q = plan.units, plan.sample_rate
    overlaps = np.array([len(a & b) for a, b in pairwise(batches)])
    mean = _two_sided((sizes.mean() - n * q) / math.sqrt(n * q * (1 - q) / _DRAWS))
    spread = sizes.var(ddof=1) * (_DRAWS - 1) / (n * q * (1 - q))
    variance = 2 * min(stats.chi2.cdf(spread, _DRAWS - 1), stats.chi2.sf(spread, _DRAWS - 1))
    # overlaps of neighbouring pairs are nearly independent: twice the variance is ample
    shared = _two_sided((overlaps.mean() - n * q * q) / math.sqrt(2 * n * q * q / len(overlaps)))
    passed = bool(min(mean, variance, shared) > _RARE and (not plan.cap or sizes.max() <= plan.cap))
    detail = (
        f"{_DRAWS} batches of {sizes.mean():.1f} units in the mean ({n * q:.1f} expected), variance "
        f"{sizes.var(ddof=1):.1f} ({n * q * (1 - q):.1f}), {overlaps.mean():.2f} shared with the next "
        f"({n * q * q:.2f})"
    )
    return Check("sampler", passed, detail)


def _own_loss(found: Subject, train: Sequence[str]) -> Check:
    """Compare gradients of records in one batch with those of each alone: none may see the others."""
    session = found.session
    if not found.tokens.train:
        return Check("loss of the record alone", False, "no record can be used; the log says why")
    trained = session.trainable(train)
    _shake(trained)
    ordered = sorted(found.tokens.train, key=lambda record: record.length)
    records = [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
    together = record_gradients(session, trained, records)
    alone = [record_gradients(session, trained, [record]) for record in records]
    worst = 0.0
    for row, single in enumerate(alone):
        difference = torch.cat([(together[key][row] - value[0]).flatten() for key, value in single.items()])
        size = torch.cat([value.flatten() for value in single.values()]).norm()
        worst = max(worst, float(difference.norm() / size.clamp_min(1e-12)))
    limit = 1e-3 if session.base.dtype == torch.float32 else 0.1
    detail = f"a record's gradient changes by {worst:.1e} of its norm when others join the batch"
    return Check("loss of the record alone", worst <= limit, detail)


def _sensitivity(plan: PrivacyPlan) -> Check:
    """Add hostile records to a batch and compare the change of the clipped sum with C."""
    source = torch.Generator().manual_seed(0)
    base = {
        name: torch.randn(5, *shape, generator=source) for name, shape in {"a": (3, 4), "b": (6,)}.items()
    }
    hostile = {
        "huge": 1e6,
        "of ordinary size": plan.clipping_norm,
        "tiny": 1e-9,
        "not a number": math.nan,
        "infinite": math.inf,
    }
    unit = plan.clip(base)
    grain = plan.noise_deviation / 2**24 if plan.discrete else 1.0
    worst, name = 0.0, ""
    for kind, size in hostile.items():
        extra = {key: torch.cat([value, torch.full_like(value[:1], size)]) for key, value in base.items()}
        change = plan.clip(extra)
        moved = math.sqrt(sum(float(((change[k] - unit[k]).double() * grain).square().sum()) for k in unit))
        if not moved <= worst:
            worst, name = moved, kind
    detail = (
        f"the clipped sum moves by at most {worst / plan.clipping_norm:.6f} C (a gradient that is {name})"
    )
    return Check("sensitivity", worst <= plan.clipping_norm * (1 + 1e-5), detail)


def _noise_law(plan: PrivacyPlan) -> Check:
    """Compare the noise in a privatised gradient with a Gaussian of the plan's deviation."""
    drawn = _noise(plan, SecureGenerator())
    scaled = drawn / plan.gradient_deviation
    spread = float((scaled**2).sum())
    variance = 2 * min(stats.chi2.cdf(spread, _NUMBERS), stats.chi2.sf(spread, _NUMBERS))
    law = float(stats.kstest(scaled, "norm").pvalue)
    detail = (
        f"deviation {drawn.std():.3e}, the plan has sigma C / batch = {plan.gradient_deviation:.3e}; "
        f"p-value of the law {law:.2g}"
    )
    return Check("noise", bool(min(variance, law) > _RARE), detail)


def _noise_source(plan: PrivacyPlan) -> Check:
    """Draw noise twice after seeding every generator of the experiment alike."""
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        draws.append(_noise(plan, SecureGenerator()))
    same = float(np.corrcoef(draws[0], draws[1])[0, 1])
    detail = f"noise of two sites with the experiment's seed correlates by {same:+.4f}"
    return Check("source of noise", abs(same) < 0.05, detail)


def _trains(found: Subject, train: Sequence[str]) -> Check:
    """Take one private step: every trained matrix moves, and nothing else."""
    config = replace(found.config, train=replace(found.config.train, local_steps=1))
    state = found.session.method.initial_state(found.session.spec, seed="0")
    try:
        train_round(
            found.session, found.tokens, config=config, state=state, round=1, plan=found.plan, train=train
        )
    except FedllmError as error:
        return Check("private path", False, str(error))
    return Check("private path", True, "one step moved every trained matrix, and no frozen weight")


def _leaving(config: Config) -> Check:
    """List what a reply may carry beside the update, and let a site answer with each value it may not."""
    public = config.data.heldout_public
    closed = [] if public else [name for name, release in RELEASES.items() if release.treatment == "public"]
    with TemporaryDirectory() as folder:
        inside = replace(
            config,
            run=replace(config.run, dir=folder),
            # pooled records have their steps already, and would get them again
            train=replace(config.train, local_steps=1),
            # noised counts of the recipe do not go with public records of a site's policy
            evaluation=replace(config.evaluation, noise_multiplier=0.0),
        )
        for name in [*_PRIVATE_VALUES, *closed]:
            answer = reply_with(inside, {name: 1.0})[0]
            if name in answer:
                return Check("what leaves", False, f"'{name}' left a site that was made to answer with it")
            reason = text(answer, "error")
            if f"'{name}' may not leave" not in reason:
                return Check("what leaves", False, f"'{name}' was not stopped for what it is, but: {reason}")
    names = [
        n for n, r in RELEASES.items() if r.treatment != "simulated" and (public or r.treatment != "public")
    ]
    extra = "metrics on held-out records, which the recipe declares public" if public else "no metrics"
    refused = f"{len(_PRIVATE_VALUES) + len(closed)} values that a site was made to answer with were stopped"
    return Check("what leaves", True, f"{refused}; beside the update {extra}; in all: {', '.join(names)}")


def _noise(plan: PrivacyPlan, generator: SecureGenerator) -> np.ndarray:
    released = plan.privatise(plan.zeros({"x": (_NUMBERS,)}), generator)["x"]
    return released.double().numpy()


def _shake(trained: dict[str, torch.nn.Parameter]) -> None:
    """Move off the start, where some matrices are zero and have no gradient."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.values():
            noise: Tensor = torch.randn(parameter.shape, generator=source)
            parameter.add_(0.02 * noise.to(parameter))


def _two_sided(z: float) -> float:
    return float(2 * stats.norm.sf(abs(z)))


def run_checks(folder: RunFolder, config: Config) -> list[Check]:
    """Return the lines about a run's own books: each simulated site's ledger against what it reported."""
    return [_ledger(folder, config, site) for site in site_summaries(read_events(folder)) if site.epsilon]


def _ledger(folder: RunFolder, config: Config, site: SiteSummary) -> Check:
    name = f"ledger of {site.name}"
    path = folder.site_dir(site.name) / "ledger.sqlite"
    if not path.is_file():
        return Check(name, None, "kept at the site: fedllm budget verify checks it there")
    try:
        entries = Ledger(path).entries()
    except PrivacyError as error:
        return Check(name, False, str(error))
    # records that are counted are not those that train, and have a budget of their own
    trained = [entry for entry in entries if not entry.dataset.endswith(HELDOUT)]
    counted = [entry for entry in entries if entry.dataset.endswith(HELDOUT)]
    passed, told = True, ""
    for rows, reported, what in ((trained, site.epsilon, ""), (counted, site.heldout_epsilon, " held out")):
        spends = [entry.spend for entry in rows]
        spent = epsilon(spends, delta=config.privacy.delta, relation=config.privacy.relation)
        passed &= spent <= (reported or 0.0) + 1e-6
        told += f"; epsilon{what} {spent:.3f}, reported {reported or 0.0:.2f}" if rows else ""
    return Check(name, passed, f"{len(entries)} spends, an unbroken chain{told}")
