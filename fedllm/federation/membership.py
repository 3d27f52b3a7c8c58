"""Membership inference on a finished run's adapter, with the untuned base as reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from fedllm.config import Config
from fedllm.data.encode import Encoded, collate, collate_classes
from fedllm.data.sites import simulated_sites
from fedllm.errors import ConfigError, DataError
from fedllm.federation.generate import tuned_model
from fedllm.models.load import load_tokenizer
from fedllm.privacy.audit import Check, Rate, Scores, area_interval, area_under_curve, hits_at
from fedllm.runs.folder import load_config, open_run
from fedllm.training.forward import class_losses
from fedllm.training.likelihood import causal_losses
from fedllm.training.preference import preferences
from fedllm.training.session import tokenise
from fedllm.training.steps import micro_batches

FALSE_POSITIVE_RATES = (0.01, 0.001)


@dataclass(frozen=True, kw_only=True)
class Membership:
    """How well records that trained are told from records that did not.

    Attributes
    ----------
    members, others : int
        Records scored of each kind.
    area : float
        Area under the curve; 0.5 is guessing.
    interval : tuple[float, float]
        Its 95 % interval.
    hits : dict[float, Rate or None]
        False positive rate -> true positive rate; None where too few records resolve it.
    """

    members: int
    others: int
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
        detail = (
            f"{self.members} records that trained against {self.others} held out, scored by the loss: area "
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
    config = load_config(open_run(folder))
    if config.adapter.method == "prompt":
        raise ConfigError("adapter.method=prompt: membership is measured on adapters of weights.")
    if config.data.source == "file" and not config.data.path:
        raise ConfigError(f"{folder}: its sites were real; their records are not on this machine.")
    member: list[Encoded] = []
    other: list[Encoded] = []
    for data in simulated_sites(config.data, sites=config.federation.sites, seed=config.run.seed):
        tokens = tokenise(data, config)
        member += tokens.train[:records]
        other += tokens.heldout[:records]
    if not other:
        raise DataError("data.heldout=0: there are no held-out records to compare with.")
    model = tuned_model(folder)
    scores = [_scores(model, found, config) for found in (member, other)]
    return Membership(
        members=len(member),
        others=len(other),
        area=area_under_curve(*scores),
        interval=area_interval(*scores),
        hits={fpr: hits_at(*scores, false_positive_rate=fpr) for fpr in FALSE_POSITIVE_RATES},
    )


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
