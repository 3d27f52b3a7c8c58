"""One optimiser step at a site, with and without differential privacy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedllm.config import TrainSettings
from fedllm.data.encode import Encoded
from fedllm.errors import PrivacyError
from fedllm.privacy.clipping import clipped_sum
from fedllm.privacy.noise import SecureGenerator
from fedllm.privacy.plan import PrivacyPlan
from fedllm.training.forward import record_losses
from fedllm.training.session import Session


def learning_rate(train: TrainSettings, *, step: int, total: int) -> float:
    """Return the learning rate of a step counted over the whole run, from 0.

    Linear warm-up, then constant or a cosine to zero; it does not restart with a round.
    """
    warmup = round(train.warmup * total)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    if train.schedule == "constant":
        return train.lr
    progress = (step - warmup) / max(1, total - warmup)
    return train.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def micro_batches(records: Sequence[Encoded], size: int) -> Iterator[list[Encoded]]:
    """Yield records in chunks of similar length, so that little padding is computed."""
    ordered = sorted(records, key=lambda record: len(record.prompt) + len(record.answer))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def plain_gradients(session: Session, records: Sequence[Encoded], *, micro_batch: int) -> float:
    """Leave the gradient of the mean record loss in ``.grad`` and return that loss."""
    total = 0.0
    for chunk in micro_batches(records, micro_batch):
        losses = record_losses(session, chunk)
        (losses.sum() / len(records)).backward()  # type: ignore[no-untyped-call]
        total += float(losses.detach().sum())
    return total / len(records)


def private_gradients(
    session: Session,
    trained: Mapping[str, nn.Parameter],
    records: Sequence[Encoded],
    *,
    plan: PrivacyPlan,
    generator: SecureGenerator,
    micro_batch: int,
) -> None:
    """Leave the privatised gradient in ``.grad``: (sum of clipped + noise) / expected batch.

    ``records`` is a Poisson sample and may be empty: then there is no forward pass, only noise.

    Parameters
    ----------
    trained : Mapping[str, Parameter]
        Key -> parameter of the matrices that train in this round; clipped jointly.

    Raises
    ------
    PrivacyError
        If a trained matrix had no per-example gradient (its update would be noise alone).
    """
    if session.sink is None:
        raise PrivacyError("the session was not opened for private training.")
    sums = {key: torch.zeros_like(value) for key, value in trained.items()}
    for chunk in micro_batches(records, micro_batch):
        losses = record_losses(session, chunk)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        gradients = session.sink.take()
        _require_all(session, trained, gradients, rows=len(chunk))
        for key, value in clipped_sum(gradients, clipping_norm=plan.clipping_norm).items():
            sums[key] += value
    for key, parameter in trained.items():
        noise = plan.noise_deviation * generator.normal(tuple(parameter.shape))
        drawn = torch.from_numpy(noise).to(device=parameter.device, dtype=torch.float64)
        parameter.grad = ((sums[key].double() + drawn) / plan.expected_batch).to(parameter.dtype)


def _require_all(
    session: Session, trained: Mapping[str, nn.Parameter], gradients: dict[str, Tensor], *, rows: int
) -> None:
    """Refuse to go on when a matrix trains without being clipped, or does not train at all."""
    for key, parameter in session.parameters.items():
        if parameter.grad is not None or (key in gradients and key not in trained):
            raise PrivacyError(f"{key} received a gradient outside the private path.")
    for key, parameter in trained.items():
        if key not in gradients or tuple(gradients[key].shape) != (rows, *parameter.shape):
            raise PrivacyError(f"{key} has no per-example gradient; the private path is not active.")
