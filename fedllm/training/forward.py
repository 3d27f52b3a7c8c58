"""What is computed on a prepared model: each record's loss, each label's score, a written answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedllm.data.encode import ClassBatch, Encoded, collate, collate_classes
from fedllm.evaluation.generation import end_tokens, greedy_tokens
from fedllm.evaluation.scoring import label_log_likelihoods
from fedllm.models.pooling import class_logits
from fedllm.training.likelihood import causal_losses
from fedllm.training.preference import dpo_losses, margins
from fedllm.training.session import Session


def record_losses(session: Session, records: Sequence[Encoded], *, untuned: bool = False) -> Tensor:
    """Return each record's loss, shape (B,), float32.

    For a causal model the mean over the record's own answer tokens, or DPO's loss of a pair of
    answers; for an encoder the cross-entropy of its label. Nothing mixes records: a loss over the
    batch's tokens would make one record's gradient depend on the lengths of the others, and clipping
    would no longer bound its influence.

    Parameters
    ----------
    untuned : bool
        Leave out what stands before the prompts.
    """
    if session.spec.head:
        classes = collate_classes(records, session.pad_id, multiple=session.padding)
        return class_losses(session.base, classes, pooling=session.pooling)
    if session.beta is not None:
        return dpo_losses(margins(session, records), beta=session.beta)
    prefix = None if untuned else session.prefix
    batch = collate(records, session.pad_id, multiple=session.padding)
    return causal_losses(session.base, batch, prefix=prefix)


def class_losses(base: PreTrainedModel, batch: ClassBatch, *, pooling: str) -> Tensor:
    """Return the cross-entropy of each record's label under an encoder's head, shape (B,), float32."""
    logits = class_logits(base, batch.inputs, pooling=pooling)
    return nn.functional.cross_entropy(logits, batch.rows.to(logits.device), reduction="none")


def label_scores(
    session: Session,
    records: Sequence[Encoded],
    labels: Sequence[Sequence[int]],
    *,
    untuned: bool = False,
) -> Tensor:
    """Return log p(label | record), shape (records, labels), float32, on the CPU.

    Parameters
    ----------
    labels : sequence of token sequences
        The label texts' tokens; an encoder's head has a row a label and needs none.
    untuned : bool
        Leave out what stands before the prompts.
    """
    with torch.no_grad():
        if session.spec.head:
            inputs = collate_classes(records, session.pad_id).inputs
            logits = class_logits(session.base, inputs, pooling=session.pooling)
            return torch.log_softmax(logits, dim=-1).cpu()
    return label_log_likelihoods(
        session.base,
        [record.prompt for record in records],
        labels,
        pad_id=session.pad_id,
        prefix=None if untuned else session.prefix,
    )


def greedy_answers(
    session: Session,
    records: Sequence[Encoded],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    size: int,
    untuned: bool = False,
) -> tuple[list[str], float]:
    """Return the likeliest answer to each record's prompt, and the share of answers that were cut.

    Parameters
    ----------
    size : int
        Records in one batch; the answers do not depend on it.
    untuned : bool
        Leave out what stands before the prompts.
    """
    stop = end_tokens(session.base, tokenizer)
    found: dict[int, list[int]] = {}
    order = sorted(range(len(records)), key=lambda place: len(records[place].prompt))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        answers = greedy_tokens(
            session.base,
            [records[place].prompt for place in places],
            max_new_tokens=max_new_tokens,
            pad_id=session.pad_id,
            stop=stop,
            prefix=None if untuned else session.prefix,
        )
        found |= dict(zip(places, answers, strict=True))
    texts = [
        str(tokenizer.decode(found[place], skip_special_tokens=True)).strip() for place in range(len(records))
    ]
    return texts, sum(answer[-1] not in stop for answer in found.values()) / len(records)
