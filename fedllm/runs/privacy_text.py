"""What a run's report says about privacy: the guarantee in its terms, and what it leaves open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedllm.config import Config, SitePrivacySettings

RELATION_WORDS = {
    "add-or-remove-one": "one unit is added or removed",
    "zero-out-one": "one unit is replaced by an empty one that contributes nothing",
    "replace-one": "one unit is replaced by any other",
}
NOISE_WORDS = {
    "gaussian": "Gaussian, from an AES-256 stream keyed by the operating system",
    "discrete-gaussian": "discrete Gaussian on a grid of integers, from an AES-256 stream keyed by the "
    "operating system",
}


@dataclass(frozen=True)
class PrivacyStatement:
    """Sentences, and a table of facts (empty when the run is not private)."""

    sentences: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]


def privacy_statement(
    config: Config,
    *,
    epsilons: Mapping[str, float | None],
    simulated: bool | None,
    whole_sites: float | None = None,
) -> PrivacyStatement:
    """State what a run protects: records (or units), whole sites, both, or nothing.

    Parameters
    ----------
    config : Config
        The settings of the run.
    epsilons : Mapping[str, float or None]
        Site -> epsilon it has spent over all its rounds; None while it has reported none.
    simulated : bool or None
        Whether the sites ran on one machine; None before the run has started.
    whole_sites : float or None
        Epsilon spent on whole sites; None while none was, or where that is not promised.
    """
    own = _records(config, epsilons=epsilons, simulated=simulated)
    if not config.site_privacy.enabled:
        return own
    return PrivacyStatement(own.sentences, (*own.facts, *_sites(config.site_privacy, whole_sites)))


def _sites(settings: SitePrivacySettings, spent: float | None) -> tuple[tuple[str, str], ...]:
    adaptive = f", adapted to quantile {settings.quantile:g}" if settings.quantile else ""
    said = "none spent yet" if spent is None else f"epsilon {spent:.2f}"
    return (
        (
            "Whole sites, a promise of its own",
            f"{said} at delta {settings.delta:g} over all rounds: what a site sent is replaced by nothing. "
            "It holds towards everyone who gets the adapter, and not towards the coordinator, who sees each "
            "site's update, nor for the metrics and byte counts in this folder.",
        ),
        (
            "How whole sites are protected",
            f"each change clipped to {settings.clipping_norm:g}{adaptive}, Gaussian noise on the sum, a "
            "fixed denominator",
        ),
    )


def _records(
    config: Config, *, epsilons: Mapping[str, float | None], simulated: bool | None
) -> PrivacyStatement:
    if not config.privacy.enabled:
        return PrivacyStatement(
            (
                "Single records are not protected by this run. They stay at their site, but adapter updates "
                "and metrics leave it without noise, and updates can reveal records to whoever sees them.",
                *_simulation(simulated),
            ),
            (),
        )
    privacy = config.privacy
    unit = "one record at a site"
    if config.data.unit:
        unit = f"all records of one '{config.data.unit}' at a site"
    spent = [f"{name}: {value:.2f}" for name, value in epsilons.items() if value is not None]
    noise = (
        f"{privacy.noise_multiplier:g}"
        if privacy.noise_multiplier
        else "derived by each site from its budget"
    )
    budget = f"epsilon {privacy.epsilon:g}" if privacy.epsilon else "each site's own policy"
    expected = config.train.batch_size * config.train.accumulation
    sampler = f"Poisson, {expected} units a step expected"
    if privacy.batch_cap:
        sampler += "; batches above a bound that a draw passes with probability delta/1000 are cut to it"
    heldout = (
        "metrics on held-out records, which the recipe declares public"
        if config.data.heldout_public
        else "nothing measured on private records: losses and metrics are withheld"
    )
    return PrivacyStatement(
        (
            "Each site clips and noises its gradients before an update leaves it. The guarantee holds "
            "towards the server, the other sites and everyone who gets the adapter.",
            *_simulation(simulated),
        ),
        (
            ("Unit of privacy", unit),
            ("Relation", RELATION_WORDS[privacy.relation]),
            ("Sampler", sampler),
            ("Noise", NOISE_WORDS[privacy.noise]),
            ("Accountant", "PLD (privacy loss distribution)"),
            ("Clipping norm", f"{privacy.clipping_norm:g}"),
            ("Noise multiplier", noise),
            ("Budget of the recipe", f"{budget}, delta {privacy.delta:g}"),
            (f"Epsilon spent at delta {privacy.delta:g}", ", ".join(spent) or "none reported yet"),
            ("Shown beside the update", heldout),
            ("Not sent", "the number of records, training losses, error texts with contents"),
            (
                "Not covered",
                "the list of labels, the prompt and all other settings; which sites take part, when they "
                "answer and how many bytes they send. A unit with records at several sites spends at each.",
            ),
        ),
    )


def _simulation(simulated: bool | None) -> tuple[str, ...]:
    match simulated:
        case True:
            return ("The sites were simulated: one machine held all records.",)
        case False:
            return ("The sites were real: separate machines that reported their own spending.",)
        case _:
            return ()
