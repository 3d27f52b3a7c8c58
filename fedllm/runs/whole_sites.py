"""The promise for whole sites in plain words: what it comes to, and towards whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.config import Config

Rows = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class WholeSites:
    """Epsilon of whole sites over some rounds, by who looks.

    Attributes
    ----------
    outsiders : float
        Whoever gets the adapter alone.
    sites : float
        Another site that takes part.
    coordinator : float or None
        None: nothing is promised.
    """

    outsiders: float
    sites: float
    coordinator: float | None


def whole_sites_spent(events: Sequence[Mapping[str, Any]]) -> WholeSites | None:
    """Return what a run has spent on whole sites so far; None where it has spent nothing."""
    event = next((event for event in reversed(events) if event["event"] == "site_noise"), None)
    if event is None:
        return None
    outsiders, sites = event["epsilon"], event["epsilon_sites"]
    # older runs had their noise at the coordinator, where a site sees what outsiders see
    return WholeSites(
        outsiders=outsiders,
        sites=outsiders if sites is None else sites,
        coordinator=event["epsilon_coordinator"],
    )


def towards(config: Config, found: WholeSites | None) -> Rows:
    """Return who looks, and the epsilon that holds towards them; None: nothing was spent yet."""
    if config.site_privacy.at_sites:
        known = "it knows its own share of the noise"
        seen = "it sees each site's update apart, hidden by that site's share of the noise alone"
    else:
        known = "it knows what it sent, and nothing of the noise"
        seen = "it sees each site's update before it adds the noise"
    if found is None:
        outsiders = sites = "none spent yet"
    else:
        outsiders, sites = f"epsilon {found.outsiders:.2f}", f"epsilon {found.sites:.2f}"
    if not config.site_privacy.at_sites:
        coordinator = "no promise"
    elif found is None or found.coordinator is None:
        coordinator = "none spent yet"
    else:
        coordinator = f"epsilon {found.coordinator:.2f}"
    return (
        ("Towards whoever gets the adapter alone", outsiders),
        ("Towards another site of the run", f"{sites} ({known})"),
        ("Towards the coordinator", f"{coordinator} ({seen})"),
    )


def terms(config: Config) -> Rows:
    """Return what the epsilons of whole sites mean, how they are kept, and who is trusted."""
    settings, federation = config.site_privacy, config.federation
    adaptive = f", adapted to quantile {settings.quantile:g}" if settings.quantile else ""
    means = (
        f"delta {settings.delta:g}, over all {federation.rounds} rounds: what a site sent is replaced by "
        "nothing. That a site takes part, and when, is not hidden"
    )
    if not settings.at_sites:
        return (
            (
                "Whole sites, a promise of its own",
                f"{means}, nor are the run's metrics and byte counts.",
            ),
            (
                "How whole sites are protected",
                f"by the coordinator: each change clipped to {settings.clipping_norm:g}{adaptive}, Gaussian "
                "noise on the sum, a fixed denominator",
            ),
            ("Trusted with it", "the coordinator"),
        )
    return (
        (
            "Whole sites, a promise of its own",
            f"{means}, nor is what a site may send beside its update: its name, "
            + (
                "metrics on public held-out records, epsilon on its records."
                if config.privacy.enabled
                else "metrics on public held-out records."
            ),
        ),
        (
            "How whole sites are protected",
            f"by each site before it sends: it clips its change to {settings.clipping_norm:g} and adds its "
            f"share of Gaussian noise; {federation.needed} shares, the fewest replies that make a round "
            "count, add up to the whole noise; the coordinator only averages, over a fixed denominator",
        ),
        (
            "Trusted with it",
            "each site to add its share: one that leaves it out takes it from outsiders and other sites, and "
            "sites that tell each other theirs take those away; the coordinator to ask once a round",
        ),
    )
