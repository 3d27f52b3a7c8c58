"""What a run's report says about privacy: the guarantee in its terms, and what it leaves open."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedllm.config import Config
from fedllm.runs.limits import Limit
from fedllm.runs.whole_sites import WholeSites, terms, towards

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


NOTHING_TRAINED = "Nothing was trained: no update left a site, and no privacy budget was spent."


@dataclass(frozen=True)
class PrivacyStatement:
    """What is promised, by whom it is kept, and what is not promised.

    Attributes
    ----------
    sentences : tuple of str
        The promise, or that there is none.
    facts : tuple of (name, value)
        Its terms; empty when nothing is promised.
    spent : tuple of (site, epsilon, delta, the recipe's budget, the site's own policy)
        What each site has spent; empty when records are not protected.
    unprotected : tuple of str
        What the promise leaves open.
    """

    sentences: tuple[str, ...]
    facts: tuple[tuple[str, str], ...] = ()
    spent: tuple[tuple[str, str, str, str, str], ...] = ()
    unprotected: tuple[str, ...] = ()


def best_guess(epsilon: float, delta: float) -> float:
    """Return how often somebody can tell at best whether a unit took part, when either is as likely.

    ``(exp(epsilon) + delta) / (1 + exp(epsilon))``; a coin toss has 0.5. The bound of a hypothesis test
    under (epsilon, delta): Kairouz, Oh and Viswanath 2015, "The composition theorem for differential
    privacy".

    >>> best_guess(0.0, 0.0), round(best_guess(1.0, 0.0), 3)
    (0.5, 0.731)
    """
    return (1 + delta * math.exp(-epsilon)) / (1 + math.exp(-epsilon))


def privacy_statement(
    config: Config,
    *,
    epsilons: Mapping[str, float | None],
    simulated: bool | None,
    whole_sites: WholeSites | None = None,
    limits: Mapping[str, Limit] | None = None,
    heldout: float | None = None,
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
    whole_sites : WholeSites or None
        Epsilon spent on whole sites; None while none was, or where that is not promised.
    limits : Mapping[str, Limit], optional
        Site -> what its own policy allows, where that is known here.
    heldout : float or None
        Largest epsilon of a site's private held-out records, where counts over them left with noise.
    """
    if config.federation.mode == "base":
        shown = ("The untuned base's metrics, where they are shown.", *_ALWAYS_OPEN)
        return PrivacyStatement((NOTHING_TRAINED, *_simulation(simulated)), unprotected=shown)
    own = (
        _records(config, epsilons=epsilons, simulated=simulated, limits=limits or {}, spent=heldout)
        if config.privacy.enabled
        else _no_promise(
            simulated,
            mode=config.federation.mode,
            hidden=config.site_privacy.at_sites,
            shown=config.data.heldout_public,
        )
    )
    if not config.site_privacy.enabled:
        return own
    promise, *how = terms(config)
    return replace(own, facts=(*own.facts, promise, *towards(config, whole_sites), *how))


#: Mode -> how a private run keeps its promise.
_KEPT = {
    "federated": "Each site clips and noises its gradients before an update leaves it. The guarantee holds "
    "towards the server, the other sites and everyone who gets the adapter.",
    "local": "Each site trains alone, and clips and noises its gradients: no update leaves it, and the "
    "guarantee holds towards everyone who gets its adapter.",
    "central": "The records of all sites are pooled for this baseline, so that nothing is hidden from where "
    "they are. There gradients are clipped and noised: the guarantee holds towards everyone who gets the "
    "adapter.",
}
#: Mode -> what happens to single records without a promise, and what is open then.
_OPEN = {
    "federated": (
        "Single records are not protected by this run. They stay at their site, but adapter updates "
        "and metrics leave it without noise, and updates can reveal records to whoever sees them.",
        "The records behind an update: whoever sees it, the coordinator first, may read parts of them.",
    ),
    "local": (
        "Single records are not protected by this run. They stay at their site and no update leaves it; "
        "metrics do, without noise.",
    ),
    "central": (
        "Single records are not protected by this run: those of all sites are pooled for this baseline.",
        "All records, from where they are pooled.",
    ),
}


def _no_promise(simulated: bool | None, *, mode: str, hidden: bool, shown: bool) -> PrivacyStatement:
    if hidden:
        public = "The held-out records: the recipe declares them public, and their metrics have no noise."
        return PrivacyStatement(
            (
                "Single records have no promise of their own in this run. They are hidden with their whole "
                "site: it clips its update and adds noise before the update leaves it.",
                *_simulation(simulated),
            ),
            unprotected=(*((public,) if shown else ()), *_ALWAYS_OPEN),
        )
    said, *opened = _OPEN[mode]
    return PrivacyStatement(
        (said, *_simulation(simulated)),
        unprotected=(
            *opened,
            "The records behind the finished adapter: whoever gets it may find out that one took part.",
            "Losses and metrics of each round, and how many records were scored.",
            *_ALWAYS_OPEN,
        ),
    )


_ALWAYS_OPEN = (
    "The list of labels, the prompt and all other settings: everybody who takes part sees them.",
    "Which sites take part, when they answer and how many bytes they send.",
)


def _records(
    config: Config,
    *,
    epsilons: Mapping[str, float | None],
    simulated: bool | None,
    limits: Mapping[str, Limit],
    spent: float | None,
) -> PrivacyStatement:
    privacy = config.privacy
    unit = "one record at a site"
    if config.data.unit:
        unit = f"all records of one '{config.data.unit}' at a site"
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
    shown = (
        ["metrics on held-out records, which the recipe declares public"]
        if config.data.heldout_public
        else []
    )
    if config.evaluation.noise_multiplier:
        shown.append(
            f"the accuracy on private held-out records, from counts with Gaussian noise (multiplier "
            f"{config.evaluation.noise_multiplier:g}); those records do not train"
        )
        if spent is not None:
            shown[-1] += f", and spend an epsilon of their own, {spent:.2f} at delta {privacy.delta:g}"
    heldout = "; at other sites ".join(shown) or (
        "nothing measured on private records: losses and metrics are withheld"
    )
    return PrivacyStatement(
        (_KEPT[config.federation.mode], *_simulation(simulated)),
        facts=(
            ("Unit of privacy", unit),
            ("Adjacency", RELATION_WORDS[privacy.relation]),
            ("Sampler", sampler),
            ("Noise", NOISE_WORDS[privacy.noise]),
            ("Accountant", "PLD (privacy loss distribution)"),
            ("Clipping norm", f"{privacy.clipping_norm:g}"),
            ("Noise multiplier", noise),
            ("Budget of the recipe", f"{budget}, delta {privacy.delta:g}"),
            ("Shown beside the update", heldout),
            ("Not sent", "the number of records, training losses, error texts with contents"),
        ),
        spent=tuple(
            (
                name,
                "none reported yet" if value is None else f"{value:.2f}",
                f"{privacy.delta:g}",
                f"{privacy.epsilon:g}" if privacy.epsilon else "not limited",
                _limit_words(limits.get(name)),
            )
            for name, value in epsilons.items()
        ),
        unprotected=(
            *_ALWAYS_OPEN,
            *(
                ("The held-out records: the recipe declares them public, and their metrics have no noise.",)
                if config.data.heldout_public
                else ()
            ),
            "How many units a site has, unless its policy makes another number public (public_units): "
            "sample rate, noise and refusals follow from it.",
            "A unit with records at several sites: it spends at each, at most the sum of the epsilons; "
            "`fedllm budget show` composes what sites' ledgers hold.",
            "What was learnt by trying other settings on private records: no epsilon here counts it.",
        ),
    )


def _limit_words(limit: Limit | None) -> str:
    if limit is None:
        return "kept at the site"
    epsilon = f"epsilon {limit.epsilon:g}" if limit.epsilon < math.inf else "any epsilon"
    return f"{epsilon}, delta {limit.delta:g}"


def _simulation(simulated: bool | None) -> tuple[str, ...]:
    match simulated:
        case True:
            return ("The sites were simulated: one machine held all records.",)
        case False:
            return ("The sites were real: separate machines that reported their own spending.",)
        case _:
            return ()
