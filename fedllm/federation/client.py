"""What a site does with each kind of message."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedllm.adapters.basis import Basis, projections
from fedllm.adapters.export import save_peft_adapter, save_state
from fedllm.adapters.state import AdapterSpec, matrix_name, require_same_spec
from fedllm.aggregation import RoundPlan, make_rule
from fedllm.config import Config
from fedllm.errors import DataError, DivergedError, FedllmError, MismatchError, PrivacyError, WireError
from fedllm.evaluation.metrics import bootstrap_interval, majority
from fedllm.federation.blobs import BlobStore
from fedllm.federation.booking import BOOKED, book, booked_so_far
from fedllm.federation.cards import site_card
from fedllm.federation.local import Start, finish, projected, receive, sketch_layout
from fedllm.federation.makebasis import WITH_CORE, make_basis, read_basis
from fedllm.federation.memory import SiteMemory
from fedllm.federation.noised import noised_counts
from fedllm.federation.plan import require_promises
from fedllm.federation.records import (
    ADAPTER,
    BASIS,
    SITE_NOISE,
    Note,
    Notes,
    Parts,
    number,
    pack,
    text,
    unpack,
    whole,
)
from fedllm.federation.site import Site, identify, public_reason, use_threads
from fedllm.federation.site_privacy import hidden_update, round_multiplier
from fedllm.privacy.plan import PrivacyPlan, make_plan
from fedllm.privacy.release import require_released
from fedllm.runs.events import INTERVAL, QUALITY
from fedllm.runs.folder import atomic_write
from fedllm.training.round import RoundResult, evaluate, train_round
from fedllm.training.session import Session, SiteTokens, open_session, tokenise
from fedllm.training.spec import adapter_spec, basis_from_seed, basis_seed, site_spec
from fedllm.wire import decode, encode

log = logging.getLogger("fedllm.site")
Answer = tuple[Notes, Parts]


def client_app() -> ClientApp:
    """Return the Flower ClientApp of a site."""
    app = ClientApp()
    app.query("hello")(answering(_hello))
    app.query("make_basis")(answering(_make_basis))
    app.query("keep_basis")(answering(_keep_basis))
    app.query("project")(answering(_project))
    app.train()(answering(_train))
    app.evaluate()(answering(_evaluate))
    return app


def answering(handler: Callable[[Site, Notes, Parts], Answer]) -> Callable[[Message, Context], Message]:
    """Turn a handler into one that always replies: an error becomes a note without records' text."""

    def answer(message: Message, context: Context) -> Message:
        site, head = None, ""
        parts: Parts = {}
        try:
            notes, received = unpack(message.content)
            config = Config.from_flat(json.loads(str(notes["config"])))
            site = identify(context, config, int(str(notes["index"])))
            require_promises(site.config)
            use_threads(site.config)
            head = _head(site)
            result, parts = handler(site, notes, received)
        except FedllmError as error:
            log.error("refused: %s", error)
            result = {"error": public_reason(site, error)}
        except Exception as error:
            log.exception("the round failed at this site")
            result = {"error": f"internal error ({type(error).__name__}); details are in the site's log"}
        if site is not None:
            if "error" in result:
                result |= _spent(site, notes, head)
            result["site"] = site.name
            if site.config.private_replies:
                result, parts = _released(site, result, parts)
        return Message(pack(result, parts), reply_to=message)

    return answer


def _head(site: Site) -> str:
    """Return the hash of the ledger's newest row, empty where nothing was booked yet."""
    return site.ledger().head if site.config.privacy.enabled and site.has_ledger else ""


def _spent(site: Site, notes: Notes, head: str) -> Notes:
    """Return what is booked if a handler has failed after it booked: that stays spent, and is to be seen."""
    try:
        newest = _head(site)
        if newest != head:
            return booked_so_far(site, notes) | {"ledger": newest}
    except Exception:
        # whatever made the handler fail may strike here too, and a reply is owed all the same
        log.exception("what was booked cannot be told")
    return {}


def _released(site: Site, result: Notes, parts: Parts) -> Answer:
    """Return a private reply, or an error in its place if a note may not leave."""
    try:
        require_released(result, metrics_public=site.metrics_may_leave, simulated=site.simulated)
    except PrivacyError as error:
        log.error("withheld: %s", error)
        # what was booked stays booked, and the coordinator has to know
        kept = {name: result[name] for name in BOOKED if name in result}
        return {"error": str(error), "site": site.name, **kept}, {}
    return result, parts


def _hello(site: Site, notes: Notes, parts: Parts) -> Answer:
    """Check everything that can be checked before the first round, and compare specs."""
    theirs = _run_spec(site, notes)
    basis = _basis(site, theirs)
    data = site.data()
    books: Notes = {}
    if site.config.privacy.enabled:
        plan = make_plan(
            site.config,
            units=len(data.units),
            site=site.name,
            public_units=site.policy.public_units,
        )
        site.policy.require_noise(plan.noise_multiplier)
        site.ledger().entries()
        books = {"ledger_tag": site.ledger_tag}
    found: Notes = {
        "simulated": site.simulated,
        "fedllm": version("fedllm"),
        "rank": site.rank,
        "projections": [] if basis is None else list(projections(basis, seed=theirs.basis)),
        "has_basis": basis is not None,
        **books,
    }
    if site.simulated or not site.config.private_replies:
        found["data"] = data.fingerprint
    return found, {}


def _make_basis(site: Site, notes: Notes, parts: Parts) -> Answer:
    """Make the frozen matrices that no seed gives, and send them."""
    if site.config.adapter.basis in ("gradient", "dp-gradient"):
        # of the site's own records, with no noise on the site as a whole
        site.policy.require_site_noise(0.0)
    basis, booked = make_basis(site, _run_spec(site, notes), notes)
    return booked, {BASIS: save(basis.tensors)}


def _keep_basis(site: Site, notes: Notes, parts: Parts) -> Answer:
    """Store a shipped basis for the rounds to come."""
    spec = _run_spec(site, notes)
    if BASIS not in parts:
        raise WireError("the basis message carries no payload.")
    basis = read_basis(parts[BASIS], spec, with_core=site.config.adapter.basis in WITH_CORE)
    atomic_write(_basis_file(site, spec), save(basis.tensors))
    return {}, {}


def _train(site: Site, notes: Notes, parts: Parts) -> Answer:
    """Evaluate the received adapter, train, and send what the rule asks for."""
    config, round = site.config, whole(notes, "round")
    if not 1 <= round <= config.federation.rounds:
        # a later round would be one that no projection has counted
        raise WireError(f"round {round} is not one of the recipe's {config.federation.rounds}.")
    noise = 0.0
    if config.site_privacy.at_sites:
        # after a crash the coordinator may ask for more noise, and never for less than the recipe's
        noise = max(number(notes, SITE_NOISE) or 0.0, round_multiplier(config, (), 1))
    site.policy.require_site_noise(noise / math.sqrt(config.federation.needed))
    session, tokens, plan, start, memory = _prepare(site, notes, parts, round)
    result: Notes = {"weights": session.weights}
    if notes["evaluate"] and site.metrics_may_leave:
        result |= _scores(session, tokens, site, start, records=config.evaluation.records)
    private: PrivacyPlan | None = None
    if config.privacy.enabled:
        held = site.ledger().entries(dataset=site.policy.dataset, data=site.data().fingerprint)
        own = [entry for entry in held if entry.run == text(notes, "run")]
        private = make_plan(
            config,
            units=len(tokens.units),
            site=site.name,
            public_units=site.policy.public_units,
            round=round,
            spent=tuple(entry.spend for entry in own if entry.round),
            # round 0 made a basis
            before=tuple(entry.spend for entry in own if not entry.round),
        )
        result |= book(site, notes, private, round=round)
    try:
        trained = train_round(
            session,
            tokens,
            config=config,
            state=start.state,
            round=round,
            plan=private,
            train=plan.train,
            folded=start.folded,
            last=_last_change(config, start, memory, round),
            # a simulated site's records lie beside the coordinator's
            rehearsed=not site.simulated,
        )
    except DivergedError as error:
        if not config.site_privacy.at_sites:
            raise
        # a refusal would tell what became of its training: a site that has no change sends noise alone
        log.error("no change of this round is sent: %s", error)
        trained = RoundResult(state=start.state, loss=None)
    if trained.loss is not None and not config.private_replies:
        result["train_loss"] = trained.loss
        result["examples"] = len(tokens.train)
    state = trained.state
    if config.site_privacy.at_sites:
        state = hidden_update(config, plan, start.shared, state, noise_multiplier=noise)
    return result, finish(config, plan, start, state, round=round, memory=memory)


def _project(site: Site, notes: Notes, parts: Parts) -> Answer:
    """Answer FedASK's second stage: the update this site holds back, projected on the server's basis."""
    config, round = site.config, whole(notes, "round")
    spec = site_spec(_run_spec(site, notes), site.rank, config.adapter)
    pending = site.memory(text(notes, "run")).load("pending", spec, round=round)
    if pending is None or ADAPTER not in parts:
        raise MismatchError("there is no open sketch of this round here.")
    layout = sketch_layout(config, spec, "Q")
    basis = decode(parts[ADAPTER], spec=spec, layout=layout, codec="float32")
    return {}, {ADAPTER: encode(projected(config, pending, basis), codec=config.wire.codec)}


def _evaluate(site: Site, notes: Notes, parts: Parts) -> Answer:
    """Score the finished adapter and the untuned base; a personal adapter is exported at the site."""
    config = site.config
    trained = config.federation.mode != "base"
    session, tokens, plan, start, _ = _prepare(site, notes, parts, config.federation.rounds + 1)
    result: Notes = {"weights": session.weights}
    if plan.personal and trained:
        _export_personal(site, session, start)
    if config.privacy.enabled and trained:
        result |= booked_so_far(site, notes)
    if not site.metrics_may_leave:
        return result | (noised_counts(site, notes, session, tokens, start) if trained else {}), {}
    records = config.evaluation.final_records
    if trained:
        result |= _scores(session, tokens, site, start, records=records, final=True)
        result |= _elsewhere(site, session, start)
    result |= _scores(session, tokens, site, None, records=records, prefix="base_", final=True)
    truth = tokens.heldout_labels[: records or None]
    if config.data.labelled and truth:
        # the commonest label of private records stays here; that of the public ones is no secret
        commonest = truth if config.private_replies else tokens.own_labels
        result["majority_accuracy"], result["majority_macro_f1"] = majority(commonest, truth)
    return result, {}


def _elsewhere(site: Site, session: Session, start: Start) -> Notes:
    """Return what the site's own adapter scores on other sites' records, where those can be read."""
    try:
        others = site.elsewhere()
        if others is None:
            return {}
        tokens = tokenise(others, site.config)
    except DataError as error:
        log.warning("not judged on the records of the other sites: %s", error)
        return {}
    return _scores(session, tokens, site, start, records=0, prefix="elsewhere_", final=True)


def _export_personal(site: Site, session: Session, start: Start) -> None:
    folder = site.folder / "adapter"
    save_state(start.state, folder, seed=basis_seed(site.config))
    if session.method.export != "base":
        basis = _basis(site, start.state.spec)
        assert basis is not None, "the round was prepared with it"
        name = site.config.model.called
        save_peft_adapter(start.state, basis, folder, base_model=name, folded=start.folded)
    site_card(site.config, folder, site=site.name)


def _last_change(config: Config, start: Start, memory: SiteMemory, round: int) -> dict[str, np.ndarray]:
    """Return the federation's last change of each matrix, as far as this site has seen it.

    Matrices may take turns: each is compared with what the last round that trained it began from.
    """
    if config.train.fedhyper == "none":
        return {}
    memory.save("received", round, start.shared)
    rule, spec = make_rule(config), start.shared.spec
    found: dict[str, np.ndarray] = {}
    # as many rounds as a site keeps
    for earlier in range(max(1, round - 3), round):
        before, names = memory.load("received", spec, round=earlier), rule.plan(spec, earlier).train
        if before is not None:
            found |= {
                key: value - before.tensors[key]
                for key, value in start.shared.tensors.items()
                if matrix_name(key) in names
            }
    return found


def _scores(
    session: Session,
    tokens: SiteTokens,
    site: Site,
    start: Start | None,
    *,
    records: int,
    prefix: str = "",
    final: bool = False,
) -> dict[str, Note]:
    """Return the notes of what an adapter (None: the untuned base) scores; nothing of a single record."""
    scores = evaluate(
        session,
        tokens,
        config=site.config,
        state=None if start is None else start.state,
        records=records,
        folded=None if start is None else start.folded,
    )
    if scores is None:
        return {}
    measured = {name: vars(scores)[name] for name in QUALITY}
    if final:
        limits = bootstrap_interval(scores.token_f1s or scores.correct, seed=site.config.run.seed)
        measured |= dict(zip(INTERVAL, limits, strict=True)) if limits is not None else {}
        measured |= {"calibration": list(scores.calibration)} if scores.calibration else {}
    # the perplexity of a loss that is too large for it is left out
    known = {name: value for name, value in measured.items() if value is not None and value != math.inf}
    return {f"{prefix}{name}": value for name, value in {"records": scores.records, **known}.items()}


def _prepare(
    site: Site, notes: Notes, parts: Parts, round: int
) -> tuple[Session, SiteTokens, RoundPlan, Start, SiteMemory]:
    config = site.config
    whole_spec = _run_spec(site, notes)
    spec = site_spec(whole_spec, site.rank, config.adapter)
    plan = make_rule(config).plan(spec, round)
    run = text(notes, "run")
    memory, store = site.memory(run), BlobStore(site.folder / "kept", run)
    start = receive(config, spec, plan, notes, parts, round=round, store=store, memory=memory)
    basis = _basis(site, whole_spec)
    if basis is None:
        raise MismatchError(f"site {site.name}: the shipped basis {spec.basis[8:20]} is missing here.")
    return open_session(config, spec, basis), tokenise(site.data(), config), plan, start, memory


def _run_spec(site: Site, notes: Notes) -> AdapterSpec:
    """Return the run's spec after comparing it with what this site's own model gives.

    The full spec travels when a site joins; afterwards the basis alone does.
    """
    ours = adapter_spec(site.config)
    theirs = AdapterSpec(**{**vars(ours), "basis": text(notes, "basis")})
    if "spec" in notes:
        try:
            sent = AdapterSpec.from_json(str(notes["spec"]))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise WireError("the server's adapter spec is not readable.") from None
        require_same_spec(sent, theirs, site=site.name)
    return theirs


def _basis_file(site: Site, spec: AdapterSpec) -> Path:
    name = spec.basis.removeprefix("shipped:")
    if not (len(name) == 64 and name.isalnum()):
        raise WireError("the basis has no hash of the agreed form.")
    return site.folder / "basis" / f"{name}.safetensors"


def _basis(site: Site, spec: AdapterSpec) -> Basis | None:
    """Return the frozen matrices: from the seed, or as kept from the server; None if they are not here.

    A file that is not what its name says goes, so that the server sends it again.
    """
    seeded = basis_from_seed(spec)
    if seeded is not None or spec.basis == "shipped:":
        return seeded
    path = _basis_file(site, spec)
    if not path.is_file():
        return None
    with suppress(SafetensorError, ValueError, KeyError):
        basis = Basis.from_tensors(load_file(path))
        if basis.digest == path.stem:
            return basis
    log.warning("%s is damaged; it has to be sent again.", path)
    path.unlink(missing_ok=True)
    return None
