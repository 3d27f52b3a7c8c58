"""Membership inference on a finished run's adapter, with the untuned base as reference."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from fedllm.config import Config
from fedllm.data.encode import Encoded, collate, collate_classes
from fedllm.data.order import batch_indices
from fedllm.data.sites import simulated_sites
from fedllm.errors import ConfigError, DataError
from fedllm.federation.generate import tuned_model
from fedllm.federation.site import training_config
from fedllm.models.load import load_tokenizer
from fedllm.privacy.audit import Check, Rate, Scores, area_interval, area_under_curve, hits_at
from fedllm.runs.events import Event, read_events
from fedllm.runs.folder import open_run
from fedllm.runs.manifest import settings_of
from fedllm.training.forward import class_losses
from fedllm.training.likelihood import causal_losses
from fedllm.training.preference import preferences
from fedllm.training.session import SiteTokens, tokenise
from fedllm.training.steps import micro_batches

FALSE_POSITIVE_RATES = (0.01, 0.001)


@dataclass(frozen=True, kw_only=True)
class Membership:
    """How well records that trained are told from records that did not.

    Attributes
    ----------
    members, others : int
        Records scored of each kind.
    drawn : float
        Share of the members that a private run is expected to have drawn at least once: which ones nobody
        knows. In an open run all members were in a batch.
    area : float
        Area under the curve; 0.5 is guessing.
    interval : tuple[float, float]
        Its 95 % interval.
    hits : dict[float, Rate or None]
        False positive rate -> true positive rate; None where too few records resolve it.
    """

    members: int
    others: int
    drawn: float
    area: float
    interval: tuple[float, float]
    hits: dict[float, Rate | None]

    @property
    def check(self) -> Check:
        """Return the line of the audit: a measurement."""
        parts = []
        for fpr, found in self.hits.items():
            text = (
                "too few records"
                if found is None
                else f"{found.value:.1%} ({found.low:.1%} to {found.high:.1%})"
            )
            parts.append(f"true positives at {fpr:.1%} false ones: {text}")
        low, high = self.interval
        kind = "records that trained"
        if self.drawn < 1:
            kind = f"training records (some {self.drawn:.0%} of them drawn in a step) "
        detail = (
            f"{self.members} {kind.rstrip()} against {self.others} held out, scored by the loss: area "
            f"under the curve {self.area:.3f} ({low:.3f} to {high:.3f}); {'; '.join(parts)}"
        )
        return Check("membership", None, detail)


def attack_membership(folder: Path, *, records: int = 500) -> Membership:
    """Score a finished run's training and held-out records by how much the adapter lowered their loss.

    Of a pair of answers the score is the margin over the base.

    An encoder has no loss before it is tuned; there the tuned loss alone is the score.

    Parameters
    ----------
    records : int
        Most records of a kind and site.

    Raises
    ------
    ConfigError
        If the sites were real, so that their records are not here, or the adapter is virtual tokens.
    DataError
        If there are no held-out records to compare with.
    """
    run = open_run(folder)
    config = settings_of(run)
    if config.adapter.method == "prompt":
        raise ConfigError("adapter.method=prompt: membership is measured on adapters of weights.")
    if config.data.source == "file" and not config.data.path:
        raise ConfigError(f"{folder}: its sites were real; their records are not on this machine.")
    member: list[Encoded] = []
    other: list[Encoded] = []
    shares: list[float] = []
    rounds = _trained_rounds(read_events(run))
    sites, pooled = config.federation.sites, config.federation.mode == "central"
    for data in simulated_sites(config.data, sites=sites, seed=config.run.seed, pooled=pooled):
        tokens = tokenise(data, config)
        other += tokens.heldout[:records]
        if data.name in rounds:
            found, share = _members(training_config(config), tokens, rounds[data.name])
            member += found[:records]
            shares += [share] * len(found[:records])
    if not (member and other):
        raise DataError(f"{folder}: there are no records that trained, or no held-out ones to compare with.")
    model = tuned_model(folder)
    scores = [_scores(model, found, config) for found in (member, other)]
    return Membership(
        members=len(member),
        others=len(other),
        drawn=sum(shares) / len(shares),
        area=area_under_curve(*scores),
        interval=area_interval(*scores),
        hits={fpr: hits_at(*scores, false_positive_rate=fpr) for fpr in FALSE_POSITIVE_RATES},
    )


def _trained_rounds(events: Sequence[Event]) -> dict[str, set[int]]:
    """Return site -> the rounds whose update of it was used."""
    found: dict[str, set[int]] = {}
    for event in events:
        if event["event"] == "site_reply" and event["accepted"]:
            found.setdefault(event["site"], set()).add(event["round"])
    return found


def _members(config: Config, tokens: SiteTokens, rounds: Collection[int]) -> tuple[list[Encoded], float]:
    """Return a site's records that were in a batch, and 1; in a private run all, and the share drawn."""
    train, size = config.train, config.train.batch_size * config.train.accumulation
    steps = [
        (round - 1) * train.local_steps + local for round in rounds for local in range(train.local_steps)
    ]
    if config.privacy.enabled:
        rate = min(1.0, size / max(1, len(tokens.units)))
        return list(tokens.train), 1 - (1 - rate) ** len(steps)
    seen = {
        index
        for step in steps
        for index in batch_indices(
            len(tokens.train), batch_size=size, step=step, seed=config.run.seed, site=tokens.name
        )
    }
    return [tokens.train[index] for index in sorted(seen)], 1.0


def _scores(model: PeftModel, records: list[Encoded], config: Config) -> Scores:
    tuned = _losses(model, records, config)
    if config.model.kind == "encoder":
        return -tuned
    with model.disable_adapter():
        return _losses(model, records, config) - tuned


def _losses(model: PeftModel, records: list[Encoded], config: Config) -> Scores:
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel), "PEFT wraps what was loaded"
    pad = int(load_tokenizer(config.model).pad_token_id)
    found: list[tuple[int, float]] = []
    with torch.no_grad():
        places = {id(record): place for place, record in enumerate(records)}
        for chunk in micro_batches(records, config.evaluation.batch_size):
            losses = _chunk_losses(base, chunk, pad, config)
            found += [(places[id(record)], float(loss)) for record, loss in zip(chunk, losses, strict=True)]
    return np.array([loss for _, loss in sorted(found)])


def _chunk_losses(base: PreTrainedModel, records: list[Encoded], pad: int, config: Config) -> Tensor:
    if config.model.kind == "encoder":
        return class_losses(base, collate_classes(records, pad), pooling=config.model.pooling)
    if config.train.objective == "dpo":
        return -preferences(base, records, pad)
    return causal_losses(base, collate(records, pad))
