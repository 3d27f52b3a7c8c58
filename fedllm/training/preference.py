"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290) on pairs of answers.

A pair is one record: prompt x, preferred answer c, rejected answer r. Its margin is

    m = (log p(c|x) - log p(r|x)) - (log ref(c|x) - log ref(r|x))

and its loss -log sigmoid(beta m) (section 4). The reference is the base model without its adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedllm.adapters.layers import unadapted
from fedllm.data.encode import Encoded, collate
from fedllm.training.likelihood import answer_log_likelihoods
from fedllm.training.session import Session


def dpo_losses(margins: Tensor, *, beta: float) -> Tensor:
    """Return ``-log sigmoid(beta m)``, in nats, in the shape of the margins.

    >>> dpo_losses(torch.zeros(1), beta=0.1)
    tensor([0.6931])
    """
    return -nn.functional.logsigmoid(beta * margins)


def margins(session: Session, records: Sequence[Encoded]) -> Tensor:
    """Return each pair's margin over the reference, shape (B,), float32.

    The reference sees the very batch the model sees, so rounding cancels: a margin is exactly zero
    while an adapter adds zero, and a resumed run has the margins of an undisturbed one. That costs a
    forward pass a step; a value kept for each record would save it where records come again.
    """
    training = session.model.training
    # dropout in the base, where it has any, would make the reference a random one
    session.model.eval()
    with unadapted(session.model), torch.no_grad():
        for module in session.base.modules():
            # 8-bit layers round in another way while they train; the reference has to round as the model does
            if isinstance(module, nn.Linear):
                module.train(training)
        reference = preferences(session.base, records, session.pad_id, multiple=session.padding)
    session.model.train(training)
    found = preferences(
        session.base, records, session.pad_id, prefix=session.prefix, multiple=session.padding
    )
    return found - reference


def preferences(
    base: PreTrainedModel,
    records: Sequence[Encoded],
    pad_id: int,
    *,
    prefix: Tensor | None = None,
    multiple: int = 1,
) -> Tensor:
    """Return ``log p(c|x) - log p(r|x)`` of each pair, shape (B,), float32.

    The model gets 2 B rows: all preferred answers, then all rejected ones, padded to a multiple of
    ``multiple`` tokens.
    """
    rejected = [replace(record, answer=record.rejected) for record in records]
    batch = collate([*records, *rejected], pad_id, multiple=multiple)
    found = answer_log_likelihoods(base, batch, prefix=prefix)
    preferred, other = found.chunk(2)
    return preferred - other
