"""Pure functions on adapter states: means, exact products, server optimisers, diagnostics."""

from __future__ import annotations

from fedllm.adapters import METHODS
from fedllm.aggregation.average import Mean, weighted_mean
from fedllm.aggregation.means import RAVAN, Average, FedSA, FedSB, FFALoRA, Local, RoLoRA
from fedllm.aggregation.optimizers import OPTIMIZERS, ServerOptimizer
from fedllm.aggregation.products import (
    FedASK,
    FedEx,
    FedIT,
    FedRot,
    FedSVD,
    FlexLoRA,
    FLoRA,
    FLoRIST,
    HetLoRA,
    LoRAFAIR,
    RaFLoRA,
)
from fedllm.aggregation.rule import Declaration, Outcome, RoundPlan, Rule, Update
from fedllm.choices import add_choice
from fedllm.config import Config, site_ranks
from fedllm.errors import ConfigError
from fedllm.settings import STRATEGIES

#: Registry of aggregation rules by ``strategy.name``; a new rule adds one line here.
RULES: dict[str, type[Rule]] = {
    rule.about.name: rule
    for rule in (
        Average,
        FedIT,
        FFALoRA,
        RoLoRA,
        FedSB,
        RAVAN,
        FedSA,
        FLoRA,
        FedEx,
        FlexLoRA,
        FLoRIST,
        RaFLoRA,
        HetLoRA,
        LoRAFAIR,
        FedRot,
        FedSVD,
        FedASK,
    )
}


def register(rule: type[Rule]) -> None:
    """Let this process run a rule from outside the package as ``strategy.name=<its declared name>``.

    Server and sites both ask the rule what is trained and sent, so that both have to register it.
    Registering a name again replaces what it stood for.

    Raises
    ------
    ConfigError
        If the name is one of the package's, or is not made of lower-case words and hyphens.
    """
    add_choice("strategy.name", rule.about.name, shipped=STRATEGIES)
    RULES[rule.about.name] = rule


def make_rule(config: Config) -> Rule:
    """Return the rule of a recipe; of the baselines, ``local`` shares nothing, and ``central`` everything."""
    rule = RULES[config.strategy.name]
    if config.federation.mode == "local":
        rule = Local
    elif config.federation.mode == "central" and rule.about.personal:
        # one site trains for all: what it kept to itself the others would never get
        rule = Average
    return rule(config.strategy, private=config.privacy.enabled)


def make_optimizer(config: Config) -> ServerOptimizer | None:
    """Return the server optimiser of a recipe, None where the mean itself is the next adapter."""
    name = config.strategy.server_optimizer
    if name == "none":
        return None
    options: dict[str, float | str] = {}
    if config.strategy.server_lr:
        options["lr"] = config.strategy.server_lr
    if name == "fedhyper":
        options = {"form": config.strategy.server_form}
    return OPTIMIZERS[name](**options)


def keeps_coordinates(config: Config) -> bool:
    """Return whether an entry of a matrix means the same from site to site and from round to round.

    Then sparse updates, error feedback and the federation's last change are well-defined.
    """
    return RULES[config.strategy.name].about.mean or config.strategy.name == "fedit"


def require_compatible(config: Config) -> None:
    """Refuse combinations of adapter, rule, server optimiser and codec that cannot hold.

    Raises
    ------
    ConfigError
        Naming the settings and the reason.
    """
    about, adapter, strategy = RULES[config.strategy.name].about, config.adapter, config.strategy
    method = METHODS[adapter.method]
    if about.adapters and adapter.method not in about.adapters:
        raise ConfigError(
            f"strategy.name={strategy.name} is defined for adapter.method={' or '.join(about.adapters)}, "
            f"not {adapter.method}."
        )
    if set(site_ranks(config)) != {adapter.rank} and not about.unequal_ranks:
        able = ", ".join(name for name, rule in RULES.items() if rule.about.unequal_ranks)
        raise ConfigError(
            f"adapter.site_ranks: strategy.name={strategy.name} needs one rank at all sites; {able} do not."
        )
    # a mean of any adapter's matrices is as well-defined as the adapter's are
    well_defined = about.mean and (about.adapters or not method.factored)
    if strategy.server_optimizer != "none" and not well_defined:
        factors = "momentum on A and B apart is not well-defined, since (B G, G^-1 A) is the same update"
        other = f"it works on a plain mean, which strategy.name={strategy.name} is not"
        raise ConfigError(
            f"strategy.server_optimizer={strategy.server_optimizer}: "
            f"{factors if method.factored else other}; use it with fed-sb, ravan, ffa, rolora or fedsa."
        )
    if strategy.server_lr and strategy.server_optimizer in ("none", "fedhyper"):
        raise ConfigError(
            f"strategy.server_lr: strategy.server_optimizer={strategy.server_optimizer} has no learning rate."
        )
    if strategy.name == "hetlora" and strategy.weighting == "examples":
        raise ConfigError(
            "strategy.weighting=examples: strategy.name=hetlora weighs sites by the norm of their update and "
            "reads no counts; use uniform."
        )
    if "topk" in config.wire.codec_down and not method.zero_is_base:
        raise ConfigError(
            f"wire.codec_down={config.wire.codec_down}: a zero of adapter.method={adapter.method} is not 'no "
            "change of the base', so that zeros for what is left out would destroy the model; use int8 or "
            "bfloat16."
        )
    for key, codec in (("codec", config.wire.codec), ("codec_down", config.wire.codec_down)):
        if "topk" in codec and not keeps_coordinates(config):
            raise ConfigError(
                f"wire.{key}={codec}: strategy.name={strategy.name} multiplies the matrices that travel, "
                "and factors with holes are no approximation of a product; use int8 or bfloat16."
            )
    if config.train.fedhyper != "none" and not keeps_coordinates(config):
        raise ConfigError(
            f"train.fedhyper: strategy.name={strategy.name} gives sites coordinates of another meaning every "
            "round, so the federation's last change says nothing about the next."
        )
    if config.site_privacy.enabled and not about.mean:
        able = ", ".join(name for name, rule in RULES.items() if rule.about.mean)
        raise ConfigError(
            f"site_privacy: strategy.name={strategy.name} does more than average what sites send, and "
            f"clipping bounds averages only; use {able}."
        )
    if config.privacy.enabled and not method.private:
        able = ", ".join(name for name, other in METHODS.items() if other.private)
        raise ConfigError(
            f"adapter.method={adapter.method} has no per-example gradients, so it cannot train privately; "
            f"{able} can."
        )


__all__ = [
    "OPTIMIZERS",
    "RULES",
    "Declaration",
    "Mean",
    "Outcome",
    "RoundPlan",
    "Rule",
    "ServerOptimizer",
    "Update",
    "keeps_coordinates",
    "make_optimizer",
    "make_rule",
    "register",
    "require_compatible",
    "weighted_mean",
]
