"""Which simulated sites train in a recipe's mode, and on which records."""

from __future__ import annotations

from fedllm.config import Config
from fedllm.data.sites import SiteData, simulated_site, simulated_sites, site_names


def training_shares(config: Config) -> list[SiteData]:
    """Return the records of every simulated site that trains, in order.

    Pooled records train at the first site by name, and the untuned base trains at none.

    Raises
    ------
    DataError
        If the records cannot be used or shared as asked.
    """
    sites, seed, fold = config.federation.sites, config.run.seed, config.evaluation.fold
    if config.federation.mode == "base":
        return []
    if config.federation.mode == "central":
        names = site_names(config.data, sites=sites)
        first = names.index(min(names))
        return [simulated_site(config.data, sites=sites, seed=seed, index=first, fold=fold, pooled=True)]
    return list(simulated_sites(config.data, sites=sites, seed=seed, fold=fold))
