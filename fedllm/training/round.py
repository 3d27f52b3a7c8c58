"""One site's round: from the adapter received to the adapter sent."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedllm.adapters.layers import Factors, fold
from fedllm.adapters.method import read_state, write_state
from fedllm.adapters.state import AdapterState
from fedllm.config import Config
from fedllm.data.order import batch_indices
from fedllm.errors import DivergedError, PrivacyError
from fedllm.evaluation.metrics import Scores
from fedllm.models.fingerprint import weights_fingerprint
from fedllm.privacy.entropy import SecureGenerator
from fedllm.privacy.plan import PrivacyPlan
from fedllm.training.dirac import DiracCanaries
from fedllm.training.hyper import ClientRate
from fedllm.training.optimizers import make_optimizer
from fedllm.training.scores import label_metrics, preference_metrics, text_metrics
from fedllm.training.session import Session, SiteTokens
from fedllm.training.steps import (
    learning_rate,
    plain_gradients,
    private_gradients,
    rehearse,
    require_private_path,
)


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """What training left at the site; only ``state`` travels in a private run.

    Attributes
    ----------
    loss : float or None
        Mean training loss of the round's batches, None in private runs.
    """

    state: AdapterState
    loss: float | None


def train_round(
    session: Session,
    site: SiteTokens,
    *,
    config: Config,
    state: AdapterState,
    round: int,
    plan: PrivacyPlan | None,
    train: Collection[str],
    folded: Factors | None = None,
    last: Mapping[str, np.ndarray] | None = None,
    canaries: DiracCanaries | None = None,
    rehearsed: bool = False,
) -> RoundResult:
    """Train ``train.local_steps`` steps from a received state.

    Optimiser moments start anew each round and exist for the matrices that train alone; the
    learning rate and the order of the records go on over the whole run and depend on (seed, site,
    step) alone, so a resumed run repeats what an undisturbed one does.

    Parameters
    ----------
    train : Collection[str]
        Names of the matrices that train; the others stay as received.
    folded : Mapping, optional
        Module path -> (U, D) folded into the frozen base.
    last : Mapping, optional
        Key -> the federation's last change of that matrix, for FedHyper's client-side rate.
    canaries : DiracCanaries, optional
        Of an audit, see :mod:`fedllm.training.dirac`; the plan counts them among its units.
    rehearsed : bool
        Take a pass of the largest size before any private record, see :func:`fedllm.training.steps.rehearse`.

    Raises
    ------
    PrivacyError
        If ``plan`` is given and the private path cannot be proven active.
    DivergedError
        If training diverged to NaN or infinity.
    """
    settings = config.train
    fold(session.model, folded or {})
    write_state(session.method, session.model, state)
    trained = session.trainable(train)
    session.model.train(config.adapter.dropout > 0)
    optimizer = make_optimizer(
        trained.values(),
        settings,
        noise_deviation=0.0 if plan is None else plan.gradient_deviation,
        floor=config.privacy.adam_floor,
    )
    generator, units = SecureGenerator(), site.units_of_records
    optimizer.zero_grad(set_to_none=True)
    if plan is not None:
        require_private_path(session, trained, plan)
        if rehearsed:
            rehearse(session, trained, plan, rows=settings.micro_batch, length=settings.max_length)
    torch.manual_seed(_dropout_seed(config, site.name, round))
    rate = ClientRate(
        trained,
        {key: torch.tensor(value) for key, value in (last or {}).items()},
        steps=settings.local_steps,
        paper=settings.fedhyper == "paper",
    )
    total = settings.local_steps * config.federation.rounds
    losses = []
    for local in range(settings.local_steps):
        step = (round - 1) * settings.local_steps + local
        for group in optimizer.param_groups:
            group["lr"] = rate.factor * learning_rate(settings, step=step, total=total)
        optimizer.zero_grad(set_to_none=True)
        if plan is None:
            chosen = batch_indices(
                len(site.train),
                batch_size=settings.batch_size * settings.accumulation,
                step=step,
                seed=config.run.seed,
                site=site.name,
            )
            records = [site.train[index] for index in chosen]
            losses.append(plain_gradients(session, records, micro_batch=settings.micro_batch))
            optimizer.step()
        else:
            private_gradients(
                session,
                trained,
                units,
                plan=plan,
                generator=generator,
                micro_batch=settings.micro_batch,
                canaries=canaries,
            )
            _checked_step(session, trained, optimizer, first=local == 0)
        if settings.fedhyper != "none":
            rate.update()
    optimizer.zero_grad(set_to_none=True)
    result = read_state(session.method, session.model, session.spec)
    if not all(np.isfinite(value).all() for value in result.tensors.values()):
        raise DivergedError(f"site {site.name}: training diverged (NaN or infinity); lower train.lr.")
    return RoundResult(state=result, loss=sum(losses) / len(losses) if losses else None)


def evaluate(
    session: Session,
    site: SiteTokens,
    *,
    config: Config,
    state: AdapterState | None,
    records: int,
    folded: Factors | None = None,
) -> Scores | None:
    """Score a site's held-out records, the first ``records`` of them (0: all).

    Parameters
    ----------
    state : AdapterState or None
        The adapter to evaluate; None: the untuned base.

    Returns
    -------
    Scores or None
        None if the site has no held-out records. On preferences the untuned base is its own
        reference: all its margins are zero.
    """
    chosen = site.heldout[: records or None]
    if not chosen:
        return None
    zero = session.method.initial_state(session.spec, seed="0")
    fold(session.model, folded or {} if state is not None else {})
    write_state(session.method, session.model, zero if state is None else state)
    session.model.eval()
    untuned = state is None
    if session.beta is not None:
        return preference_metrics(
            session, chosen, beta=session.beta, size=config.evaluation.batch_size, untuned=untuned
        )
    if not config.data.labelled:
        return text_metrics(session, site, chosen, config=config, untuned=untuned)
    return label_metrics(session, site, chosen, size=config.evaluation.batch_size, untuned=untuned)


def _checked_step(
    session: Session,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    first: bool,
) -> None:
    """Take a step; after a round's first one, prove that the adapter moved and the base did not."""
    if not first:
        optimizer.step()
        return
    before = {key: value.detach().clone() for key, value in trained.items()}
    frozen = frozen_fingerprint(session, trained)
    optimizer.step()
    _require_moved(before, trained)
    if frozen_fingerprint(session, trained) != frozen:
        raise PrivacyError("a frozen weight moved in the first private step; training was stopped.")


def frozen_fingerprint(session: Session, trained: Mapping[str, nn.Parameter]) -> str:
    """Return a fingerprint of everything that must not train."""
    return weights_fingerprint(session.model, exclude=trained.values())


def _require_moved(before: Mapping[str, Tensor], after: Mapping[str, nn.Parameter]) -> None:
    still = [key for key, value in after.items() if torch.equal(value.detach(), before[key])]
    if still:
        raise PrivacyError(
            f"{still[0]} did not move in the first private step ({len(still)} matrices in all); "
            "check train.lr. Training was stopped."
        )


def _dropout_seed(config: Config, site: str, round: int) -> int:
    """Return the seed of dropout: a pure function of run seed, site and round."""
    return int(np.random.SeedSequence([config.run.seed, round, *site.encode()]).generate_state(1)[0])
