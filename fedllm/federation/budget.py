"""A site's budget: what is spent, what a recipe would spend, and what is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.config import Config
from fedllm.data.sites import SiteData
from fedllm.errors import ConfigError
from fedllm.federation.counts import COUNTS
from fedllm.federation.shares import training_shares
from fedllm.federation.site import real_site, simulated_policy, training_config
from fedllm.privacy.accounting import Spend, cross_check, epsilon, within
from fedllm.privacy.ledger import Entry, Ledger
from fedllm.privacy.plan import PrivacyPlan, counts_plan, require_allowed, whole_run
from fedllm.privacy.policy import SitePolicy, load_policy

_MOST_ROUNDS = 10_000


@dataclass(frozen=True, kw_only=True)
class Book:
    """One site's ledger and the limits it stands under."""

    policy: SitePolicy
    ledger: Ledger

    def datasets(self) -> list[str]:
        """Return the data sets something was spent on, in order."""
        return list(dict.fromkeys(entry.dataset for entry in self.ledger.entries()))

    def entries(self, dataset: str) -> tuple[Entry, ...]:
        """Return what counts against a data set's budget: all spends on its records."""
        own = self.ledger.entries(dataset=dataset)
        records = {entry.data for entry in own}
        return tuple(e for e in self.ledger.entries() if e.dataset == dataset or e.data in records)

    def spent(self, entries: Sequence[Entry]) -> float:
        """Return the epsilon of some spends at the policy's delta, under the strictest of their relations."""
        return spent(entries, delta=self.policy.max_delta)


def spent(entries: Sequence[Entry], *, delta: float) -> float:
    """Return the epsilon of some spends, under the strictest of the relations they were booked for."""
    relations = {entry.relation for entry in entries}
    return max(
        (epsilon([e.spend for e in entries], delta=delta, relation=relation) for relation in relations),
        default=0.0,
    )


def shared_epsilon(books: Sequence[Book]) -> tuple[float, float] | None:
    """Return epsilon, and its delta, of a unit with records at all of these sites; None for one site.

    Such a unit takes part in every site's steps, and each site draws its own batches and noise: what they
    spent composes. For units at one site only the largest of the sites' epsilons stands.
    """
    if len(books) < 2:
        return None
    delta = max(book.policy.max_delta for book in books)
    return spent([entry for book in books for entry in book.ledger.entries()], delta=delta), delta


def open_books(path: Path) -> list[Book]:
    """Return the books of a site policy, or of all simulated sites of a run folder.

    Raises
    ------
    ConfigError
        If there is no ledger.
    PrivacyError
        If one is damaged.
    """
    if path.is_dir():
        policies = sorted(path.glob("sites/*/policy.toml"))
        found = [(load_policy(file), file.parent / "ledger.sqlite") for file in policies]
    else:
        policy = load_policy(path)
        found = [(policy, Path(policy.state_dir) / "ledger.sqlite")]
    books = [Book(policy=policy, ledger=Ledger(file)) for policy, file in found if file.is_file()]
    if not books:
        raise ConfigError(f"{path}: no ledger there; nothing has been spent.")
    return books


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a recipe would spend at one site.

    Attributes
    ----------
    held : tuple[Spend, ...]
        What was spent on the same records before, and a basis that the recipe makes of them.
    run : tuple[Spend, ...]
        What the recipe spends, over all its rounds.
    before, epsilon : float
        Epsilon of what was spent before, and of the recipe alone.
    peers : dict[str, float]
        The recipe's epsilon by accountant, see :func:`fedllm.privacy.accounting.cross_check`.
    """

    policy: SitePolicy
    plan: PrivacyPlan
    held: tuple[Spend, ...]
    run: tuple[Spend, ...]
    before: float
    epsilon: float
    peers: dict[str, float]


def planned_sites(config: Config, policy: Path | None) -> list[Planned]:
    """Return what a recipe would spend at a real site, or at each simulated one that trains.

    A basis of private records is made by one site. A real site may be the one; of the simulated it is the
    first.

    Raises
    ------
    BudgetError
        If the policy does not allow the recipe.
    """
    if config.federation.mode == "base":
        return []
    if policy is not None:
        site = real_site(policy, config)
        # a plan writes nothing: the ledger belongs to whom the SuperNode runs as
        ledger = site.ledger() if site.has_ledger else None
        return [_planned(site.config, site.policy, site.data(), ledger, makes_basis=True)]
    shares, settings = training_shares(config), training_config(config)
    first = min(data.name for data in shares)
    return [
        _planned(settings, simulated_policy(data.name, config), data, None, makes_basis=data.name == first)
        for data in shares
    ]


def _planned(
    config: Config, policy: SitePolicy, data: SiteData, ledger: Ledger | None, *, makes_basis: bool
) -> Planned:
    plan, whole = whole_run(
        config,
        units=len(data.units),
        site=policy.site,
        public_units=policy.public_units,
        makes_basis=makes_basis,
    )
    require_allowed(plan, policy)
    if makes_basis and config.adapter.basis == "dp-gradient":
        policy.require_noise(config.adapter.basis_noise)
    entries = ledger.entries(dataset=policy.dataset, data=data.fingerprint) if ledger is not None else ()
    return Planned(
        policy=policy,
        plan=plan,
        held=(*(entry.spend for entry in entries), *whole[:-1]),
        run=whole,
        before=spent(entries, delta=policy.max_delta),
        epsilon=epsilon(whole, delta=plan.delta, relation=plan.relation),
        peers=cross_check(whole, delta=plan.delta),
    )


def planned_shared(config: Config, sites: Sequence[Planned]) -> float:
    """Return what a recipe spends of a unit with records at all of these sites."""
    spends = [spend for site in sites for spend in site.run]
    return epsilon(spends, delta=config.privacy.delta, relation=config.privacy.relation)


def counts_epsilon(config: Config) -> float | None:
    """Return what noised counts over private held-out records spend of those, None if there are none."""
    if not config.evaluation.noise_multiplier:
        return None
    plan = counts_plan(config, counts=len(COUNTS))
    return epsilon([plan.spend()], delta=plan.delta, relation=plan.relation)


def rounds_left(held: Sequence[Spend], spend: Spend, *, policy: SitePolicy, relation: str) -> int:
    """Return how many rounds of a spend the policy's budget allows beside others, at most 10,000."""

    def allowed(rounds: int) -> bool:
        more = Spend(**{**vars(spend), "steps": spend.steps * rounds})
        return within([*held, more], delta=policy.max_delta, limit=policy.max_epsilon, relation=relation)

    if not allowed(1):
        return 0
    low, high = 1, 2
    while high < _MOST_ROUNDS and allowed(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low
