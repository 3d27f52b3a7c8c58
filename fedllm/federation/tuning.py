"""Choosing among settings privately: what the choice costs (Papernot and Steinke, arXiv 2110.03620)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.config import Config
from fedllm.errors import ConfigError
from fedllm.federation.shares import training_shares
from fedllm.federation.site import training_config
from fedllm.privacy.accounting import ADD_OR_REMOVE, epsilon, selected_epsilon
from fedllm.privacy.entropy import SecureGenerator
from fedllm.privacy.plan import make_plan

#: Settings that decide what a run costs: candidates share them.
COSTLY = (
    "train.batch_size",
    "train.accumulation",
    "train.local_steps",
    "federation.rounds",
    "federation.sites",
    "federation.sites_per_round",
    "federation.mode",
)


@dataclass(frozen=True, kw_only=True)
class TuningCost:
    """What a private choice costs at one site.

    Attributes
    ----------
    one : float
        Epsilon of one run.
    selected : float
        Towards those who get the chosen adapter alone and do not learn how many runs there were.
    composed : float
        Towards the coordinator and the other sites, who saw every run; this is what a ledger books.
    """

    site: str
    one: float
    selected: float
    composed: float


def draw_runs(*, candidates: int, mean: float) -> list[int]:
    """Return the candidate of every run: their number is geometric on 1, 2, ..., each is drawn uniformly.

    The number must not depend on records, and is kept from those who get the adapter.

    Raises
    ------
    ConfigError
        If the mean is not a finite number.
    """
    if not math.isfinite(mean):
        raise ConfigError(f"--mean: {mean} runs cannot be expected; give a finite number, such as 3.")
    generator = SecureGenerator()
    first = float(generator.uniform(1)[0])
    count = 1 if mean <= 1 else 1 + math.floor(math.log1p(-first) / math.log1p(-1 / mean))
    return [int(value) % candidates for value in generator.words(count)]


def require_tunable(configs: Sequence[Config]) -> None:
    """Refuse candidates whose choice could not be accounted.

    Raises
    ------
    ConfigError
        If one is not private, the score would come from private records, or candidates differ in what
        they cost.
    """
    first = configs[0]
    for config in configs:
        if not (config.privacy.enabled and config.data.heldout_public):
            raise ConfigError(
                "fedllm tune needs privacy.enabled=true and data.heldout_public=true: the score has to come "
                "from public records."
            )
        if config.privacy.relation != ADD_OR_REMOVE or config.privacy.batch_cap:
            raise ConfigError(
                f"fedllm tune accounts for privacy.relation={ADD_OR_REMOVE} without privacy.batch_cap alone."
            )
        if config.adapter.basis == "dp-gradient":
            raise ConfigError("fedllm tune does not account for adapter.basis=dp-gradient.")
        if not config.data.labelled:
            raise ConfigError("fedllm tune chooses by accuracy, and data.task=generate has none.")
        flat, other = config.to_flat(), first.to_flat()
        costly = [
            k for k in flat if k in COSTLY or (k.startswith("privacy.") and k != "privacy.clipping_norm")
        ]
        differing = next((key for key in costly if flat[key] != other[key]), "")
        if differing or config.data != first.data:
            raise ConfigError(
                f"candidates differ in {differing or 'their data'}, which changes what a run costs; only "
                "settings that cost nothing, such as train.lr, can be chosen."
            )


def tuning_cost(config: Config, *, mean: float, runs: int) -> list[TuningCost]:
    """Return what a choice among equally private runs costs every simulated site that trains.

    Parameters
    ----------
    mean : float
        Expected number of runs.
    runs : int
        Number of runs made.
    """
    costs = []
    settings = training_config(config)
    for data in training_shares(config):
        plan = make_plan(settings, units=len(data.units), site=data.name)
        whole = plan.spend(rounds=plan.rounds)
        costs.append(
            TuningCost(
                site=data.name,
                one=epsilon([whole], delta=plan.delta, relation=plan.relation),
                selected=selected_epsilon(whole, mean=mean, delta=plan.delta),
                composed=epsilon([whole] * runs, delta=plan.delta, relation=plan.relation),
            )
        )
    return costs
