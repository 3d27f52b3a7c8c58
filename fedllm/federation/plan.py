"""Checks of a whole recipe that take several rooms."""

from __future__ import annotations

from fedllm.adapters import METHODS
from fedllm.aggregation import make_rule, require_compatible
from fedllm.config import Config
from fedllm.errors import ConfigError
from fedllm.federation.makebasis import WITH_CORE
from fedllm.models.load import load_config
from fedllm.models.shapes import count_positions
from fedllm.runs.tracking import require_trackers
from fedllm.training.spec import adapter_spec
from fedllm.wire import is_lossless, parse_codec


def check_recipe(config: Config) -> None:
    """Refuse combinations of adapter, rule, server optimiser, codec and privacy that cannot hold.

    Trackers that are not installed are refused too.

    Raises
    ------
    ConfigError
        Naming the settings and the reason.
    """
    for key, codec in (("wire.codec", config.wire.codec), ("wire.codec_down", config.wire.codec_down)):
        try:
            parse_codec(codec)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
    require_trackers(config)
    require_promises(config)
    _require_start(config)
    _require_positions(config)
    if config.data.labelled and config.model.kind == "causal":
        _require_window(config)


def as_run(config: Config) -> Config:
    """Return the settings that a recipe runs with in its mode: a baseline lacks what serves a federation.

    Without a federation no server optimiser steps, nothing is compressed, and pooled records train one
    adapter of ``adapter.rank``. A run folder holds these settings, so that its report names what was used.
    """
    if config.federation.mode == "federated":
        return config
    ranks = "" if config.federation.mode == "central" else config.adapter.site_ranks
    return config.replace(
        adapter__site_ranks=ranks,
        strategy__server_optimizer="none",
        strategy__server_lr=0.0,
        wire__codec="float32",
        wire__codec_down="float32",
    )


def _require_positions(config: Config) -> None:
    """Refuse texts longer than the positions a model has, or has learnt."""
    limit = count_positions(load_config(config.model), config.model.kind)
    written = config.evaluation.max_new_tokens if config.evaluation.generate else 0
    virtual = config.adapter.rank if config.adapter.method == "prompt" else 0
    if limit is None or config.train.max_length + written + virtual <= limit:
        return
    parts = [f"train.max_length={config.train.max_length}"]
    parts += [f"evaluation.max_new_tokens={written}"] if written else []
    parts += [f"adapter.rank={virtual} virtual tokens"] if virtual else []
    raise ConfigError(
        f"{' + '.join(parts)}: the model has {limit} positions; use {limit} tokens at most in all."
    )


def _require_window(config: Config) -> None:
    """Refuse prompts longer than a model's window: labels are scored with all of the prompt in sight."""
    window = load_config(config.model).get_text_config().to_dict().get("sliding_window")
    if window and config.train.max_length > window:
        raise ConfigError(
            f"train.max_length={config.train.max_length}: the model attends to {window} tokens in some "
            f"layers, and labels are scored with the whole prompt in sight; set it to {window} at most."
        )


def _require_start(config: Config) -> None:
    """Refuse an adapter to start from where sites would start from another one."""
    mode, adapter, strategy = config.federation.mode, config.adapter, config.strategy
    if mode == "local" and METHODS[adapter.method].has_basis and adapter.basis in WITH_CORE:
        raise ConfigError(
            f"adapter.basis={adapter.basis} brings a first R, and sites that share nothing "
            "(federation.mode=local) start from zero; use adapter.basis=seeded or public-svd."
        )
    if not adapter.init:
        return
    plan = make_rule(config).plan(adapter_spec(config), 1)
    if plan.restart:
        raise ConfigError(
            f"adapter.init: sites start anew every round with strategy.name={strategy.name}, and would "
            "ignore it; go on from it with a rule that does not restart, such as fedex or flexlora."
        )
    if plan.personal:
        kept = "federation.mode=local" if mode == "local" else f"strategy.name={strategy.name}"
        raise ConfigError(
            f"adapter.init: {kept} keeps {', '.join(plan.personal)} at the sites, which would start without "
            "it; go on from it with a federation whose rule shares all it trains, such as fedit or fedex."
        )


def require_promises(config: Config) -> None:
    """Refuse combinations under which a promise would not hold; a site asks this too, of any message.

    Raises
    ------
    ConfigError
        Naming the settings and the reason.
    """
    require_compatible(config)
    if config.site_privacy.at_sites and make_rule(config).about.personal:
        raise ConfigError(
            f"strategy.name={config.strategy.name} keeps matrices at the sites, which "
            "site_privacy.noise_at=sites does not hide and a site's metrics would tell of; use a "
            "rule that shares all it trains."
        )
    codec = config.wire.codec_down
    if not is_lossless(codec) and make_rule(config).plan(adapter_spec(config), 1).sketch:
        # a sketch is of the whole product and not of its change
        raise ConfigError(
            f"wire.codec_down={codec}: strategy.name={config.strategy.name} sends sketches of what a site "
            "received and trained together, so that what the codec left out would be lost to the federation; "
            "use wire.codec_down=float32."
        )
