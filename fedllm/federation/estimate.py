"""What a recipe will cost, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.adapters import METHODS
from fedllm.config import Config
from fedllm.data.sites import simulated_site, site_names
from fedllm.federation.records import pack, wire_size
from fedllm.models.load import load_config
from fedllm.models.shapes import count_parameters
from fedllm.privacy.accounting import epsilon
from fedllm.privacy.plan import PrivacyPlan, make_plan
from fedllm.training.spec import adapter_spec
from fedllm.wire import encode

_BYTES_A_WEIGHT = {"4bit": 0.6, "8bit": 1.1}


@dataclass(frozen=True, kw_only=True)
class SiteEstimate:
    """One simulated site: its training records, plan and epsilon at the end."""

    name: str
    records: int
    plan: PrivacyPlan | None
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Cost of a recipe.

    Attributes
    ----------
    bytes_up, bytes_down : int
        Serialised bytes of one site in one round.
    one_off : int
        Bytes one site gets once (names and shapes, a shipped basis).
    memory_mib : int
        Weights, adapter, optimiser and one micro-batch's activations of one site, roughly.
    sites : tuple[SiteEstimate, ...]
        Empty where the records are known at real sites alone.
    """

    modules: int
    trained: int
    bytes_up: int
    bytes_down: int
    one_off: int
    memory_mib: int
    sites: tuple[SiteEstimate, ...]


def estimate(config: Config) -> Estimate:
    """Return what a run of a recipe will cost; reads the model's config, never its weights.

    Raises
    ------
    FedllmError
        If the recipe's model, data or privacy settings cannot be used.
    """
    spec = adapter_spec(config)
    state = METHODS[spec.method].initial_state(spec, seed="0")
    payload = encode(state, codec=config.wire.codec)
    up = wire_size(pack({"site": "site-0", "weights": "0" * 16, "loss": 0.0, "accuracy": 0.0}, payload))
    down = wire_size(pack({"config": str(config.changed()), "run": "0" * 12, "basis": spec.basis}, payload))
    one_off = wire_size(pack({"spec": spec.to_json()}))
    if spec.basis == "shipped:":
        one_off += 4 * spec.rank * sum(out + into for out, into in spec.shapes.values())
    sites: tuple[SiteEstimate, ...] = ()
    if config.data.source != "file" or config.data.path:
        names = site_names(config.data, sites=config.federation.sites)
        sites = tuple(_site(config, name, index) for index, name in enumerate(names))
    return Estimate(
        modules=len(spec.shapes),
        trained=state.size,
        bytes_up=up,
        bytes_down=down,
        one_off=one_off,
        memory_mib=_memory(config, state.size),
        sites=sites,
    )


def _site(config: Config, name: str, index: int) -> SiteEstimate:
    data = simulated_site(
        config.data,
        sites=config.federation.sites,
        seed=config.run.seed,
        index=index,
        fold=config.evaluation.fold,
    )
    if not config.privacy.enabled:
        return SiteEstimate(name=name, records=len(data.train), plan=None, epsilon=0.0)
    plan = make_plan(config, records=len(data.train), site=name)
    spent = epsilon([plan.spend(rounds=config.federation.rounds)], delta=plan.delta)
    return SiteEstimate(name=name, records=len(data.train), plan=plan, epsilon=spent)


def _memory(config: Config, trained: int) -> int:
    whole = load_config(config.model)
    model = whole.get_text_config()
    size = _BYTES_A_WEIGHT.get(config.model.quantization, 2.0 if config.model.dtype == "bfloat16" else 4.0)
    tokens = config.train.micro_batch * config.train.max_length
    # about 34 values of the hidden size a token and layer stay for the backward pass
    activations = 34 * tokens * model.hidden_size * model.num_hidden_layers * min(size, 4.0)
    per_example = 4 * trained * (config.train.micro_batch if config.privacy.enabled else 1)
    fixed = count_parameters(whole) * size + 16 * trained + 600 * 2**20
    return round(float(fixed + per_example + activations) / 2**20)
