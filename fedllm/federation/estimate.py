"""What a recipe will cost, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedllm.adapters import METHODS
from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.aggregation import Rule, make_rule
from fedllm.config import Config, site_ranks
from fedllm.data.sites import SiteData
from fedllm.federation.local import shared_names, sketch_layout
from fedllm.federation.plan import as_run, check_recipe
from fedllm.federation.records import ADAPTER, Note, pack, wire_size
from fedllm.federation.shares import training_shares
from fedllm.federation.site import training_config
from fedllm.models.dtype import base_dtype
from fedllm.models.load import load_config
from fedllm.models.shapes import count_parameters, count_quantised
from fedllm.privacy.accounting import epsilon
from fedllm.privacy.plan import PrivacyPlan, whole_run
from fedllm.training.spec import adapter_spec
from fedllm.wire import encode

#: Of a quantised layer, its scales included.
_BYTES_A_WEIGHT = {"4bit": 0.6, "8bit": 1.1}


@dataclass(frozen=True, kw_only=True)
class SiteEstimate:
    """One simulated site: its training records, plan and epsilon at the end."""

    name: str
    records: int
    plan: PrivacyPlan | None
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class BytesEstimate:
    """What a recipe's adapter costs on the wire, for one site of full rank.

    Attributes
    ----------
    modules, trained : int
        Adapted matrices; trained numbers, an encoder's head included.
    bytes_up, bytes_down : int
        Serialised bytes in one round after the first, in the mean.
    one_off : int
        Bytes it gets once (names and shapes, a shipped basis).
    """

    modules: int
    trained: int
    bytes_up: int
    bytes_down: int
    one_off: int


@dataclass(frozen=True, kw_only=True)
class Estimate(BytesEstimate):
    """Cost of a recipe.

    Attributes
    ----------
    memory_mib : int
        Weights, adapter, frozen matrices, optimiser and one micro-batch's activations of one site, roughly.
    sites : tuple[SiteEstimate, ...]
        Those that train: one where records are pooled, none for the untuned base or where the records are
        known at real sites alone.
    """

    memory_mib: int
    sites: tuple[SiteEstimate, ...]


def estimate(config: Config) -> Estimate:
    """Return what a run of a recipe will cost; reads the model's config, never its weights.

    Raises
    ------
    FedllmError
        If the recipe's model, data or privacy settings cannot be used.
    """
    found = estimate_bytes(config)
    sites: tuple[SiteEstimate, ...] = ()
    if config.data.source != "file" or config.data.path:
        shares, settings = training_shares(config), training_config(config)
        first = min((data.name for data in shares), default="")
        sites = tuple(_site(settings, data, makes_basis=data.name == first) for data in shares)
    return Estimate(**vars(found), memory_mib=_memory(config, found.trained), sites=sites)


def estimate_bytes(config: Config) -> BytesEstimate:
    """Return the bytes of a recipe's adapter, from the model's shapes alone.

    Raises
    ------
    FedllmError
        If the recipe's model or adapter settings cannot be used.
    """
    check_recipe(config)
    config = as_run(config)
    spec = adapter_spec(config)
    rule = make_rule(config)
    shapes = METHODS[spec.method].trained_shapes(spec)
    state = AdapterState(spec, {key: np.zeros(shape, np.float32) for key, shape in shapes.items()})
    # two rounds: what is kept from before is not sent again, and factors alternate
    rounds = [_round(config, rule, state, round) for round in (2, 3)]
    one_off = wire_size(pack({"spec": spec.to_json()}))
    if spec.basis == "shipped:":
        one_off += 4 * spec.rank * sum(out + into for out, into in spec.shapes.values())
    return BytesEstimate(
        modules=len(spec.shapes),
        trained=state.size,
        bytes_up=sum(up for up, _ in rounds) // len(rounds),
        bytes_down=sum(down for _, down in rounds) // len(rounds) + _folded(config, rule, spec),
        one_off=one_off,
    )


def break_even(ours: BytesEstimate, other: BytesEstimate) -> str:
    """Say from which round on one of two adapters has moved fewer bytes in all."""
    more = ours.one_off - other.one_off
    saved = other.bytes_up + other.bytes_down - ours.bytes_up - ours.bytes_down
    if saved == 0:
        return "Both move the same number of bytes a round."
    rounds = more / saved
    if rounds < 1:
        first = "This recipe" if saved > 0 else "The other one"
        return f"{first} moves fewer bytes from the first round on."
    first = "this recipe" if saved > 0 else "the other one"
    return f"Break-even after {rounds:.1f} rounds: from then on {first} has moved fewer bytes in all."


def _round(config: Config, rule: Rule, state: AdapterState, round: int) -> tuple[int, int]:
    """Return the serialised bytes a site of full rank sends and gets in one round, but for what is folded."""
    spec, plan = state.spec, rule.plan(state.spec, round)
    notes: dict[str, Note] = {"site": "site-0", "weights": "0" * 16, "loss": 0.0, "accuracy": 0.0}
    sent = state.only(plan.send)
    if plan.sketch:
        layouts = [sketch_layout(config, spec, name) for name in "YZ"]
        sent = AdapterState(spec, {k: np.zeros(v, np.float32) for part in layouts for k, v in part.items()})
    up = wire_size(pack(notes, {ADAPTER: encode(sent, codec=config.wire.codec)} if plan.send else {}))
    names = shared_names(plan, spec)
    if plan.resting(spec) and not plan.restart:
        # what the last round left as it was is kept at the site
        names = tuple(name for name in names if name in rule.changes(spec, round - 1))
    payload = encode(state.only(names), codec=config.wire.codec_down) if names else b""
    described: dict[str, Note] = {
        "config": str(config.changed()),
        "run": "0" * 12,
        "basis": spec.basis,
        "round": round,
    }
    down = wire_size(pack(described, {ADAPTER: payload}))
    if plan.sketch:
        basis = {k: np.zeros(v, np.float32) for k, v in sketch_layout(config, spec, "Q").items()}
        down += wire_size(pack({}, {ADAPTER: encode(AdapterState(spec, basis), codec="float32")}))
    return up, down


def _folded(config: Config, rule: Rule, spec: AdapterSpec) -> int:
    """Return the bytes of what is folded into the base that a site gets in one round, in the mean.

    Each round's update is sent alone until all of them pass the cap; then their sum, new every round, is.
    """
    ranks, cap = site_ranks(config), config.strategy.residual_cap
    each = rule.folded_rank([ranks[index % len(ranks)] for index in range(config.federation.asked)])
    alone = each * sum(out + into for out, into in spec.shapes.values())
    whole = sum(min(cap, out, into) * (out + into) for out, into in spec.shapes.values())
    # the first round gets nothing
    rounds = range(1, max(2, config.federation.rounds))
    return 4 * sum(alone if each * past <= cap else whole for past in rounds) // len(rounds)


def _site(config: Config, data: SiteData, *, makes_basis: bool) -> SiteEstimate:
    if not config.privacy.enabled:
        return SiteEstimate(name=data.name, records=len(data.train), plan=None, epsilon=0.0)
    plan, whole = whole_run(config, units=len(data.units), site=data.name, makes_basis=makes_basis)
    spent = epsilon(whole, delta=plan.delta, relation=plan.relation)
    return SiteEstimate(name=data.name, records=len(data.train), plan=plan, epsilon=spent)


def _memory(config: Config, trained: int) -> int:
    whole, kind = load_config(config.model), config.model.kind
    model, size = whole.get_text_config(), base_dtype(config.model).itemsize
    weights = float(size * count_parameters(whole, kind))
    if config.model.quantization != "none":
        weights -= (size - _BYTES_A_WEIGHT[config.model.quantization]) * count_quantised(whole, kind)
    # a preference is two rows
    rows = config.train.micro_batch * (2 if config.train.objective == "dpo" else 1)
    tokens = rows * config.train.max_length
    # about 34 values of the hidden size a token and layer stay for the backward pass; where layers are
    # computed again, their inputs stay, and all of one layer's
    layers = model.num_hidden_layers
    kept = 34 + layers if config.train.gradient_checkpointing else 34 * layers
    activations = kept * tokens * model.hidden_size * size
    per_example = 4 * trained * (rows if config.privacy.enabled else 1)
    spec = adapter_spec(as_run(config))
    # the model's copy, and the float32 one that the process keeps
    frozen = (size + 4) * METHODS[spec.method].frozen_size(spec)
    fixed = weights + frozen + 16 * trained + 600 * 2**20
    return round(float(fixed + per_example + activations) / 2**20)
