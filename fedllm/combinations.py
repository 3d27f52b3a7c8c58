"""Settings that contradict each other, refused before anything starts.

What takes more than the settings to tell is refused in :mod:`fedllm.federation.plan`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedllm.errors import ConfigError

if TYPE_CHECKING:
    from fedllm.config import Config
    from fedllm.settings import PrivacySettings, SitePrivacySettings

#: Most noised steps of a run, so that its accounting takes less than a minute and 2 GB.
MOST_STEPS = 100_000


def require_together(config: Config) -> None:
    """Refuse combinations that cannot hold, each with the reason.

    Raises
    ------
    ConfigError
        Naming the settings and what to do.
    """
    privacy, data, federation = config.privacy, config.data, config.federation
    if privacy.enabled:
        _require_one_budget("privacy", privacy)
        steps = federation.rounds * config.site_steps
        if steps > MOST_STEPS:
            raise ConfigError(
                f"federation.rounds x train.local_steps: {steps:,} private steps at a site cannot be "
                f"accounted for; {MOST_STEPS:,} at most."
            )
        if not 0 < privacy.delta < 1:
            raise ConfigError(f"privacy.delta: must lie between 0 and 1, got {privacy.delta}.")
        if privacy.batch_cap and privacy.relation != "zero-out-one":
            raise ConfigError(
                "privacy.batch_cap: capped batches are accounted under privacy.relation=zero-out-one alone."
            )
        if config.strategy.weighting == "examples":
            raise ConfigError(
                "strategy.weighting=examples: example counts depend on private records and are not "
                "sent in a private run; use uniform."
            )
    if config.evaluation.noise_multiplier and not (
        privacy.enabled and data.labelled and not data.heldout_public
    ):
        raise ConfigError(
            "evaluation.noise_multiplier: counts of right labels on private held-out records; it needs "
            "privacy.enabled=true, data.heldout_public=false and a data.task with labels."
        )
    if config.train.gradient_checkpointing and privacy.enabled and privacy.engine == "opacus":
        raise ConfigError(
            "train.gradient_checkpointing: Opacus' hooks see a layer's activations twice and give wrong "
            "gradients; use privacy.engine=own."
        )
    if config.train.optimizer == "adam-bc" and not privacy.enabled:
        raise ConfigError("train.optimizer=adam-bc corrects for noise; it needs privacy.enabled=true.")
    if data.source == "hub" and not data.name:
        raise ConfigError("data.name: source=hub needs the name of a Hugging Face data set.")
    if data.partition == "column" and not data.site:
        raise ConfigError("data.site: partition=column needs the column that names a record's site.")
    if "{text}" not in data.prompt:
        raise ConfigError("data.prompt: must contain {text}, the place of the record's text.")
    if config.model.kind == "causal" and bool(data.pair) != ("{pair}" in data.prompt):
        raise ConfigError("data.pair and data.prompt: name the column and put {pair} where its text goes.")
    if config.evaluation.generate and (data.task != "generate" or config.train.objective == "dpo"):
        raise ConfigError(
            "evaluation.generate: labels and pairs of answers are scored by their probability, nothing is "
            "written; it goes with data.task=generate and train.objective=sft."
        )
    if config.evaluation.extract != "none" and not config.evaluation.generate:
        raise ConfigError(
            f"evaluation.extract={config.evaluation.extract} is about written answers; set "
            "evaluation.generate=true."
        )
    if federation.sites_per_round > federation.sites:
        raise ConfigError(
            f"federation.sites_per_round: {federation.sites_per_round} cannot be drawn from "
            f"{federation.sites} sites."
        )
    if federation.quorum > federation.drawn:
        raise ConfigError(
            f"federation.quorum: {federation.quorum} replies cannot come from {federation.drawn} sites."
        )
    _check_options(config)
    _check_objective(config)
    _check_site_privacy(config)
    _check_model_and_adapter(config)


def _require_one_budget(section: str, settings: PrivacySettings | SitePrivacySettings) -> None:
    if (settings.epsilon > 0) == (settings.noise_multiplier > 0):
        raise ConfigError(
            f"{section}.epsilon, {section}.noise_multiplier: give exactly one of them (the other "
            "is derived); set the unused one to 0."
        )


def _check_options(config: Config) -> None:
    data = config.data
    if data.task != "choose":
        if data.options or "{options}" in data.prompt:
            raise ConfigError(
                f"data.options, {{options}} in data.prompt: data.task={data.task} reads none; use choose."
            )
        return
    if not [name for name in data.options.split(",") if name.strip()]:
        raise ConfigError(
            "data.options: data.task=choose needs the column of each record's options, or one column an "
            "option, separated by commas."
        )
    if data.labels:
        raise ConfigError("data.labels: data.task=choose has letters for labels; leave it empty.")
    if data.source not in ("file", "hub"):
        raise ConfigError(f"data.options: data.source={data.source} has no options; use file or hub.")
    if data.partition == "dirichlet":
        raise ConfigError(
            "data.partition=dirichlet mixes labels, and the letters of data.task=choose name no kind of "
            "record; use iid or column."
        )


def _check_objective(config: Config) -> None:
    data = config.data
    if config.train.objective == "sft":
        if data.rejected:
            raise ConfigError("data.rejected: train.objective=sft reads no rejected answers; use dpo.")
        return
    if config.model.kind == "encoder":
        raise ConfigError(
            "train.objective=dpo compares the probabilities of two answers, and an encoder writes none; use "
            "model.kind=causal."
        )
    if not data.rejected:
        raise ConfigError("data.rejected: train.objective=dpo needs the column of the rejected answers.")
    if data.task != "generate":
        raise ConfigError(
            "train.objective=dpo learns from pairs of texts, not from labels; use data.task=generate."
        )


def _check_site_privacy(config: Config) -> None:
    sites = config.site_privacy
    if not sites.enabled:
        return
    _require_one_budget("site_privacy", sites)
    if config.federation.rounds > MOST_STEPS:
        raise ConfigError(
            f"federation.rounds={config.federation.rounds}: so many releases cannot be accounted for; "
            f"{MOST_STEPS:,} at most."
        )
    if not (0 < sites.delta < 1 and sites.quantile < 1):
        raise ConfigError("site_privacy: delta and quantile must lie below 1, delta above 0.")
    if config.strategy.weighting == "examples":
        raise ConfigError("strategy.weighting=examples: site_privacy needs equal weights; use uniform.")
    if config.federation.mode != "federated":
        raise ConfigError(f"federation.mode={config.federation.mode}: site_privacy needs a federation.")
    if config.adapter.basis in ("gradient", "dp-gradient"):
        raise ConfigError(
            f"adapter.basis={config.adapter.basis}: the site that makes the basis would publish what its own "
            "records point to, which site_privacy does not cover; use seeded, public-svd or public-gradient."
        )
    if sites.noise_at == "sites":
        _check_noise_at_sites(config)


def _check_noise_at_sites(config: Config) -> None:
    if config.site_privacy.quantile:
        raise ConfigError(
            "site_privacy.quantile: with noise_at=sites nobody counts how many changes were within the norm; "
            "set it to 0 (a fixed clipping_norm)."
        )
    if config.wire.codec != "float32":
        raise ConfigError(
            f"wire.codec={config.wire.codec}: with site_privacy.noise_at=sites updates are mostly noise, "
            "which does not compress, and what a codec leaves out would be kept without it; use float32."
        )


def _check_model_and_adapter(config: Config) -> None:
    adapter, data = config.adapter, config.data
    if adapter.basis != "seeded" and adapter.method != "fed-sb":
        raise ConfigError(f"adapter.basis={adapter.basis} applies to adapter.method=fed-sb only.")
    if adapter.rslora and not adapter.alpha:
        raise ConfigError(
            "adapter.rslora: scales by adapter.alpha, and 0 leaves the scale at 1; set adapter.alpha, or "
            "adapter.rslora=false."
        )
    if adapter.method == "dora" and config.model.quantization == "8bit":
        raise ConfigError(
            "adapter.method=dora: bitsandbytes loses an 8-bit base's scales when DoRA reads its norm; use "
            "model.quantization=4bit or none."
        )
    if (
        adapter.basis in ("gradient", "dp-gradient", "public-gradient")
        and config.model.quantization != "none"
    ):
        raise ConfigError(
            f"adapter.basis={adapter.basis}: a quantised base has no weight gradients; use "
            "model.quantization=none."
        )
    if adapter.basis == "gradient":
        if config.privacy.enabled:
            raise ConfigError(
                "adapter.basis=gradient: singular vectors of private gradients would be published, which no "
                "epsilon of this run covers; use seeded, public-svd, public-gradient or dp-gradient."
            )
        if not adapter.allow_private_basis:
            raise ConfigError(
                "adapter.basis=gradient publishes singular vectors of one site's private gradients; say "
                "adapter.allow_private_basis=true if that is meant."
            )
    if adapter.basis == "dp-gradient" and not config.privacy.enabled:
        raise ConfigError("adapter.basis=dp-gradient needs privacy.enabled=true, which accounts for it.")
    if config.model.pooling == "mean" and config.model.kind != "encoder":
        raise ConfigError("model.pooling=mean is for classification heads; set model.kind=encoder.")
    if config.model.kind == "encoder":
        if data.task != "classify":
            raise ConfigError(f"model.kind=encoder classifies; data.task={data.task} needs a causal model.")
        if not data.labels.strip("| ") and (data.labels or data.source in ("file", "hub")):
            raise ConfigError(
                "data.labels: an encoder's head has one row a label, and server and sites have to agree on "
                "them; list all labels separated by |."
            )
        if adapter.method == "prompt":
            raise ConfigError("adapter.method=prompt is for causal models (model.kind=causal).")
    if adapter.dropout and config.privacy.enabled:
        raise ConfigError(
            "adapter.dropout: its masks follow from run.seed, so that one record more changes what is "
            "dropped for all others, which no epsilon covers; leave it at 0 in private runs."
        )
    if adapter.dropout and adapter.method in ("ia3", "prompt"):
        raise ConfigError(f"adapter.dropout: adapter.method={adapter.method} has none.")
