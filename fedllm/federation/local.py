"""What surrounds a site's training in one round: what it starts from, and what it sends."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

import numpy as np

from fedllm.adapters import METHODS
from fedllm.adapters.layers import Factors
from fedllm.adapters.method import HEAD
from fedllm.adapters.state import AdapterSpec, AdapterState, Matrix, matrix_name
from fedllm.aggregation import RoundPlan, keeps_coordinates
from fedllm.aggregation.alignment import align
from fedllm.aggregation.rule import branches_of, factors, product_of, trained_names
from fedllm.aggregation.spectral import back_project, omega, sketch
from fedllm.config import Config
from fedllm.errors import WireError
from fedllm.federation.blobs import BlobStore, join_factors, read_factors
from fedllm.federation.memory import SiteMemory
from fedllm.federation.records import ADAPTER, Notes, Parts, text, texts
from fedllm.training.spec import basis_seed
from fedllm.wire import decode, encode, encode_with_feedback, is_lossless

log = logging.getLogger("fedllm.site")


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a site's round starts from.

    Attributes
    ----------
    shared : AdapterState
        The state without what is personal, as the server knows it.
    state : AdapterState
        The whole state to train.
    folded : Factors
        What rules have folded into the base.
    """

    shared: AdapterState
    state: AdapterState
    folded: Factors


def restart_state(config: Config, spec: AdapterSpec, round: int) -> AdapterState:
    """Return the new adapter that server and sites draw for a round (FLoRA, FLoRIST)."""
    seed = basis_seed(config)
    return METHODS[spec.method].initial_state(spec, seed=seed if round == 1 else f"{seed}/{round}")


def shared_names(plan: RoundPlan, spec: AdapterSpec) -> tuple[str, ...]:
    """Return the matrices that travel down, by name."""
    names = HEAD if plan.restart else trained_names(spec)
    return tuple(n for n in names if n in trained_names(spec) and n not in plan.personal)


def layout_of(spec: AdapterSpec, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return key -> shape of the matrices with these names."""
    shapes = METHODS[spec.method].trained_shapes(spec)
    return {key: shape for key, shape in shapes.items() if matrix_name(key) in names}


def codec_down(config: Config, round: int) -> str:
    """Return how the adapter of a round travels down; at the end it is scored as it is exported, exactly."""
    return config.wire.codec_down if round <= config.federation.rounds else "float32"


def sketch_width(config: Config, spec: AdapterSpec) -> int:
    """Return the columns of FedASK's sketch."""
    return spec.rank + config.strategy.oversampling


def receive(
    config: Config,
    spec: AdapterSpec,
    plan: RoundPlan,
    notes: Notes,
    parts: Parts,
    *,
    round: int,
    store: BlobStore,
    memory: SiteMemory,
) -> Start:
    """Put together what a round starts from: sent now, kept from before, personal, or drawn anew.

    Raises
    ------
    MismatchError, RunError, WireError
        If something is missing or damaged.
    """
    groups = _groups(notes)
    folded = texts(notes, "folded")
    blobs = store.take([*groups.values(), *folded], parts)
    names = shared_names(plan, spec)
    if plan.restart:
        start = restart_state(config, spec, round)
    else:
        start = METHODS[spec.method].initial_state(spec, seed=basis_seed(config))
    codec = codec_down(config, round)
    for name, digest in groups.items():
        if name not in names:
            raise WireError(f"the server sent a matrix '{name[:20]}' that is not shared.")
        start = start.updated(decode(blobs[digest], spec=spec, layout=layout_of(spec, (name,)), codec=codec))
    if names and not groups:
        if ADAPTER not in parts:
            raise WireError("the message carries no adapter.")
        layout = layout_of(spec, names)
        start = start.updated(decode(parts[ADAPTER], spec=spec, layout=layout, codec=codec))
    state = start
    if plan.personal:
        kept = memory.require("personal", spec, before=round)
        if kept is None and round > 1:
            log.warning(
                "no matrices of its own are kept: the site trains for the first time, or they are gone"
            )
        state = start if kept is None else start.updated(kept)
    return Start(
        shared=start, state=state, folded=join_factors([read_factors(blobs[d], spec) for d in folded])
    )


def finish(
    config: Config,
    plan: RoundPlan,
    start: Start,
    trained: AdapterState,
    *,
    round: int,
    memory: SiteMemory,
) -> dict[str, bytes]:
    """Keep what is personal and return what is sent of a trained state."""
    if plan.personal:
        memory.save("personal", round, trained.only(plan.personal))
    if plan.sketch:
        memory.save("pending", round, trained)
        return {ADAPTER: encode(_sketches(config, trained, round), codec=config.wire.codec)}
    if plan.align:
        trained = _aligned(config, plan, start.state, trained)
    if not plan.send:
        return {}
    sent, codec = trained.only(plan.send), config.wire.codec
    if not sends_changes(config):
        return {ADAPTER: encode(sent, codec=codec)}
    delta = difference(sent, start.shared)
    if is_lossless(codec) or not (config.wire.error_feedback and keeps_coordinates(config)):
        return {ADAPTER: encode(delta, codec=codec)}
    # matrices that train in turn have memories of their own
    name = f"feedback-{'+'.join(sorted(plan.send))}"
    held = memory.load(name, trained.spec, round=0, before=round)
    before = None if held is None or held.layout != delta.layout else delta.with_tensors(held.tensors)
    payload, left = encode_with_feedback(delta, before, codec=codec)
    memory.save(name, round, left)
    return {ADAPTER: payload}


def sends_changes(config: Config) -> bool:
    """Return whether sites send their changes in the place of the trained matrices.

    What a codec loses on the way down must not come back as the federation's weights, and on the way up
    it should be lost of the change alone.
    """
    return not (is_lossless(config.wire.codec) and is_lossless(config.wire.codec_down))


def difference(state: AdapterState, start: AdapterState) -> AdapterState:
    """Return the change of every matrix of a state against where it started."""
    return state.with_tensors({key: value - start.tensors[key] for key, value in state.tensors.items()})


def projected(config: Config, pending: AdapterState, basis: AdapterState) -> AdapterState:
    """Return FedASK's second message: every module's ``Z = A^T (B^T Q)``."""
    return AdapterState(
        pending.spec,
        {
            f"{branch[0]}.Z": back_project(
                product_of(pending, branch), basis.tensors[f"{branch[0]}.Q"].astype(np.float64)
            ).astype(np.float32)
            for branch in branches_of(pending.spec)
        },
    )


def sketch_layout(config: Config, spec: AdapterSpec, name: str) -> dict[str, tuple[int, ...]]:
    """Return key -> shape of FedASK's messages: Y and Q (out, width), Z (in, width)."""
    width = sketch_width(config, spec)
    sides = {"Y": 0, "Q": 0, "Z": 1}
    layout: dict[str, tuple[int, ...]] = {}
    for module, shape in spec.shapes.items():
        rows = shape[sides[name]]
        # Q has no more columns than rows, and Z one a column of Q
        columns = width if name == "Y" else min(width, shape[0])
        layout[f"{module}.{name}"] = (rows, columns)
    return layout


def _sketches(config: Config, trained: AdapterState, round: int) -> AdapterState:
    """Return FedASK's first message: every module's ``Y = B (A Omega)``, and the head."""
    spec, width = trained.spec, sketch_width(config, trained.spec)
    found: dict[str, Matrix] = {}
    for branch in branches_of(spec):
        module = branch[0]
        test = omega(f"{basis_seed(config)}/{round}/{module}", spec.shapes[module][1], width)
        found[f"{module}.Y"] = sketch(product_of(trained, branch), test).astype(np.float32)
    return AdapterState(spec, {**found, **trained.only(HEAD).tensors})


def _aligned(config: Config, plan: RoundPlan, start: AdapterState, trained: AdapterState) -> AdapterState:
    turned = {
        branch: align(
            product_of(trained, branch),
            product_of(start, branch),
            factor="A" if plan.align == "A" else "B",
            softness=config.strategy.softness,
        )
        for branch in branches_of(trained.spec)
    }
    return trained.updated(trained.with_tensors(factors(trained.spec, turned)))


def named_payloads(notes: Notes) -> set[str]:
    """Return the digests of all payloads a message builds on; a site keeps these and no others."""
    return {*_groups(notes).values(), *texts(notes, "folded")}


def _groups(notes: Notes) -> dict[str, str]:
    """Return matrix name -> digest of the groups a message names."""
    try:
        found = json.loads(text(notes, "groups", limit=10_000) or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise WireError("the note 'groups' is not readable.")
    return {str(key): str(value) for key, value in found.items()}
