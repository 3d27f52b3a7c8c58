"""What a site does with each kind of message."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors import SafetensorError
from safetensors.numpy import load, load_file, save, save_file

from fedllm.adapters import METHODS
from fedllm.adapters.basis import Basis, projections, svd_basis
from fedllm.adapters.state import AdapterSpec, AdapterState, require_same_layout, require_same_spec
from fedllm.config import Config
from fedllm.errors import FedllmError, MismatchError, WireError
from fedllm.evaluation.metrics import majority
from fedllm.federation.records import Note, pack, unpack
from fedllm.federation.site import Site, identify, public_reason, use_threads
from fedllm.models.load import load_base
from fedllm.privacy.plan import PrivacyPlan, authorise, make_plan
from fedllm.training.round import evaluate, train_round
from fedllm.training.session import Session, SiteTokens, open_session, tokenise
from fedllm.training.spec import adapter_spec, basis_from_seed
from fedllm.wire import decode, encode

log = logging.getLogger("fedllm.site")
Answer = tuple[dict[str, Note], bytes | None]


def client_app() -> ClientApp:
    """Return the Flower ClientApp of a site."""
    app = ClientApp()
    app.query("hello")(_answering(_hello))
    app.query("make_basis")(_answering(_make_basis))
    app.query("keep_basis")(_answering(_keep_basis))
    app.train()(_answering(_train))
    app.evaluate()(_answering(_evaluate))
    return app


def _answering(
    handler: Callable[[Site, dict[str, Note], bytes | None], Answer],
) -> Callable[[Message, Context], Message]:
    """Turn a handler into one that always replies: an error becomes a note without records' text."""

    def answer(message: Message, context: Context) -> Message:
        site = None
        payload = None
        try:
            notes, received = unpack(message.content)
            config = Config.from_flat(json.loads(str(notes["config"])))
            site = identify(context, config, int(str(notes["index"])))
            use_threads(site.config)
            result, payload = handler(site, notes, received)
        except FedllmError as error:
            log.error("refused: %s", error)
            result = {"error": public_reason(site, error)}
        except Exception as error:
            log.exception("the round failed at this site")
            result = {"error": f"internal error ({type(error).__name__}); details are in the site's log"}
        if site is not None:
            result["site"] = site.name
        return Message(pack(result, payload), reply_to=message)

    return answer


def _hello(site: Site, notes: dict[str, Note], payload: bytes | None) -> Answer:
    """Check everything that can be checked before the first round, and compare specs."""
    theirs = _server_spec(site, notes)
    basis = _basis(site, theirs)
    data = site.data()
    if site.config.privacy.enabled:
        plan = make_plan(site.config, records=len(data.train), site=site.name)
        site.policy.require_noise(plan.noise_multiplier)
        site.ledger().entries()
    return {
        "simulated": site.simulated,
        "fedllm": version("fedllm"),
        "projections": [] if basis is None else list(projections(basis, seed=theirs.basis)),
        "has_basis": basis is not None,
    }, None


def _make_basis(site: Site, notes: dict[str, Note], payload: bytes | None) -> Answer:
    """Make the public-svd basis from the base weights and send it."""
    spec = _server_spec(site, notes)
    base = load_base(site.config.model)
    weights = {
        module: base.get_submodule(module).get_parameter("weight").detach().float().cpu().numpy()
        for module in spec.shapes
    }
    return {}, save(svd_basis(weights, rank=spec.rank).tensors)


def _keep_basis(site: Site, notes: dict[str, Note], payload: bytes | None) -> Answer:
    """Store a shipped basis for the rounds to come."""
    spec = _server_spec(site, notes)
    if payload is None:
        raise WireError("the basis message carries no payload.")
    basis = read_basis(payload, spec)
    path = _basis_file(site, spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(basis.tensors, path)
    return {}, None


def _train(site: Site, notes: dict[str, Note], payload: bytes | None) -> Answer:
    """Evaluate the received adapter, train, and send the trained matrices."""
    session, tokens, state = _prepare(site, notes, payload)
    config, round = site.config, int(str(notes["round"]))
    result: dict[str, Note] = {"weights": session.weights}
    if notes["evaluate"] and site.metrics_may_leave:
        result |= _scores(session, tokens, site, state, records=config.evaluation.records)
    plan: PrivacyPlan | None = None
    if config.privacy.enabled:
        ledger, run = site.ledger(), str(notes["run"])
        spent = tuple(
            entry.spend for entry in ledger.entries(dataset=site.policy.dataset) if entry.run == run
        )
        plan = make_plan(config, records=len(tokens.train), site=site.name, round=round, spent=spent)
        result["epsilon"] = authorise(plan, policy=site.policy, ledger=ledger, run=run, round=round)
    trained = train_round(session, tokens, config=config, state=state, round=round, plan=plan)
    if trained.loss is not None:
        result["train_loss"] = trained.loss
        result["examples"] = len(tokens.train)
    return result, encode(trained.state, codec=config.wire.codec)


def _evaluate(site: Site, notes: dict[str, Note], payload: bytes | None) -> Answer:
    """Score the finished adapter and the untuned base on the held-out records."""
    session, tokens, state = _prepare(site, notes, payload)
    result: dict[str, Note] = {"weights": session.weights}
    if not site.metrics_may_leave:
        return result, None
    records = site.config.evaluation.final_records
    result |= _scores(session, tokens, site, state, records=records)
    result |= _scores(session, tokens, site, None, records=records, prefix="base_")
    truth = tokens.heldout_labels[: records or None]
    if site.config.data.task == "classify" and truth:
        result["majority_accuracy"], result["majority_macro_f1"] = majority(tokens.train_labels, truth)
    return result, None


def _scores(
    session: Session,
    tokens: SiteTokens,
    site: Site,
    state: AdapterState | None,
    *,
    records: int,
    prefix: str = "",
) -> dict[str, Note]:
    scores = evaluate(session, tokens, config=site.config, state=state, records=records)
    if scores is None:
        return {}
    found: dict[str, Note] = {f"{prefix}loss": scores.loss, "records": scores.records}
    if scores.accuracy is not None and scores.macro_f1 is not None:
        found |= {f"{prefix}accuracy": scores.accuracy, f"{prefix}macro_f1": scores.macro_f1}
    return found


def _prepare(
    site: Site, notes: dict[str, Note], payload: bytes | None
) -> tuple[Session, SiteTokens, AdapterState]:
    spec = _server_spec(site, notes)
    if payload is None:
        raise WireError("the message carries no adapter.")
    state = decode(payload, spec=spec, layout=METHODS[spec.method].trained_shapes(spec))
    basis = _basis(site, spec)
    if basis is None:
        raise MismatchError(f"site {site.name}: the shipped basis {spec.basis[8:20]} is missing here.")
    return open_session(site.config, spec, basis), tokenise(site.data(), site.config), state


def _server_spec(site: Site, notes: dict[str, Note]) -> AdapterSpec:
    """Return the server's spec after comparing it with what this site's own model gives.

    The full spec travels when a site joins; afterwards the basis alone does.
    """
    ours = adapter_spec(site.config)
    basis = str(notes["basis"])
    theirs = AdapterSpec(
        method=ours.method,
        rank=ours.rank,
        scale=ours.scale,
        shapes=ours.shapes,
        basis=basis,
        base=ours.base,
    )
    if "spec" in notes:
        try:
            sent = AdapterSpec.from_json(str(notes["spec"]))
        except (ValueError, TypeError, KeyError):
            raise WireError("the server's adapter spec is not readable.") from None
        require_same_spec(sent, theirs, site=site.name)
    return theirs


def _basis_file(site: Site, spec: AdapterSpec) -> Path:
    return site.folder / "basis" / f"{spec.basis.removeprefix('shipped:')}.safetensors"


def _basis(site: Site, spec: AdapterSpec) -> Basis | None:
    """Return the frozen matrices: from the seed, or as kept from the server; None if not here."""
    seeded = basis_from_seed(spec)
    if seeded is not None or spec.basis == "shipped:":
        return seeded
    path = _basis_file(site, spec)
    if not path.is_file():
        return None
    return Basis.from_tensors(load_file(path))


def read_basis(payload: bytes, spec: AdapterSpec) -> Basis:
    """Read a shipped basis and check shapes, numbers and, where the spec names it, its hash.

    Raises
    ------
    WireError
        If the payload is oversized, damaged, not finite, or not the basis the spec names.
    MismatchError
        If a matrix is missing or has another shape.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for module, (out, into) in spec.shapes.items():
        expected |= {f"{module}.B": (out, spec.rank), f"{module}.A": (spec.rank, into)}
    limit = 4 * sum(int(np.prod(shape)) for shape in expected.values()) + 256 * len(expected) + 4096
    if len(payload) > limit:
        raise WireError(f"oversized basis: {len(payload)} bytes, at most {limit} are possible.")
    try:
        tensors = load(payload)
    except (SafetensorError, ValueError, KeyError):
        raise WireError("the basis is damaged or truncated.") from None
    require_same_layout(
        dict(sorted(expected.items())),
        {key: tensors[key].shape for key in sorted(tensors)},
        site="that made the basis",
    )
    if not all(value.dtype == np.float32 and np.isfinite(value).all() for value in tensors.values()):
        raise WireError("the basis holds numbers that are not finite float32.")
    basis = Basis.from_tensors(tensors)
    named = spec.basis.removeprefix("shipped:")
    if named and basis.digest != named:
        raise WireError("the basis is not the one its hash names.")
    return basis
