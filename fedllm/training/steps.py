"""One optimiser step at a site, with and without differential privacy."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from fedllm.data.encode import PUBLIC, Encoded, padded_length
from fedllm.errors import FedllmError, PrivacyError
from fedllm.privacy.clipping import owned_means, pair_sums
from fedllm.privacy.entropy import SecureGenerator
from fedllm.privacy.plan import PrivacyPlan
from fedllm.privacy.sampling import random_subset
from fedllm.settings import TrainSettings
from fedllm.training.dirac import DiracCanaries
from fedllm.training.forward import record_losses
from fedllm.training.session import PRIVATE_PADDING, Session

log = logging.getLogger("fedllm.site")

#: Units, each with its records -> key -> each unit's gradient, shape (units, *shape), float32.
GradientsOf = Callable[[Sequence[Sequence[Encoded]]], dict[str, Tensor]]


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
    ordered = sorted(records, key=lambda record: record.length)
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


def unit_batches(
    units: Sequence[Sequence[Encoded]], size: int, *, padding: int = 1
) -> Iterator[list[Sequence[Encoded]]]:
    """Yield units of one padded length in chunks of at most ``size`` records; no unit is divided."""

    def width(unit: Sequence[Encoded]) -> int:
        return padded_length(max(record.length for record in unit), padding)

    for _, alike in groupby(sorted(units, key=width), key=width):
        chunk: list[Sequence[Encoded]] = []
        held = 0
        for unit in alike:
            if chunk and held + len(unit) > size:
                yield chunk
                chunk, held = [], 0
            chunk.append(unit)
            held += len(unit)
        yield chunk


def private_gradients(
    session: Session,
    trained: Mapping[str, nn.Parameter],
    units: Sequence[Sequence[Encoded]],
    *,
    plan: PrivacyPlan,
    generator: SecureGenerator,
    micro_batch: int,
    canaries: DiracCanaries | None = None,
) -> None:
    """Leave a step's privatised gradient in ``.grad``.

    Parameters
    ----------
    trained : Mapping[str, Parameter]
        Key -> parameter of the matrices that train in this round; clipped jointly.
    units : sequence of sequences of Encoded
        All privacy units of the site, each with its records; the plan draws some of them.
    canaries : DiracCanaries, optional
        Of an audit: further units, and what watches the releases.

    Raises
    ------
    PrivacyError
        From :func:`record_gradients`.
    """
    shapes = {key: value.shape for key, value in trained.items()}
    gradients_of = of_units(partial(record_gradients, session, trained))
    if canaries is not None:
        units, gradients_of = [*units, *canaries.units], canaries.among(gradients_of, shapes)
    found = private_release(
        shapes,
        units,
        gradients_of=gradients_of,
        plan=plan,
        generator=generator,
        micro_batch=micro_batch,
    )
    if canaries is not None:
        canaries.observe(found)
    for key, value in found.items():
        parameter = trained[key]
        parameter.grad = value.to(device=parameter.device, dtype=parameter.dtype)


def require_private_path(session: Session, trained: Mapping[str, nn.Parameter], plan: PrivacyPlan) -> None:
    """Compute and clip a public record's gradient: what fails for all fails before any is drawn.

    Raises
    ------
    PrivacyError
        From :func:`record_gradients`, or if the gradient cannot be computed or clipped.
    """
    try:
        plan.clip(record_gradients(session, trained, [PUBLIC]))
    except FedllmError:
        raise
    except Exception as error:
        raise PrivacyError(
            "no private step can be taken with this model and these settings: "
            f"{type(error).__name__}: {error}"
        ) from error


def rehearse(
    session: Session, trained: Mapping[str, nn.Parameter], plan: PrivacyPlan, *, rows: int, length: int
) -> None:
    """Take the largest pass that records can ask for, with public ones.

    Where memory does not suffice the process may be killed, which no handler sees: it has to happen
    whatever is drawn, and before anything is.
    """
    record = Encoded((0,) * (length - 1), (0,), truncated=False, rejected=(0,))
    try:
        plan.clip(record_gradients(session, trained, [record] * rows))
    except Exception as error:
        log.warning(
            "a pass of train.micro_batch=%d records of train.max_length=%d tokens fails here (%s): records "
            "as long contribute nothing; lower one of them.",
            rows,
            length,
            type(error).__name__,
        )


def record_gradients(
    session: Session, trained: Mapping[str, nn.Parameter], records: Sequence[Encoded]
) -> dict[str, Tensor]:
    """Return key -> the gradient of each record's own loss, shape (B, *shape), float32.

    A preference goes through the model as two rows, and is clipped as what it is: one record.

    Raises
    ------
    PrivacyError
        If a trained matrix had no per-example gradient (its update would be noise alone).
    """
    if session.recorder is None:
        raise PrivacyError("the session was not opened for private training.")
    try:
        record_losses(session, records).sum().backward()  # type: ignore[no-untyped-call]
    finally:
        # a pass that fails must not leave its rows to the next one's records
        gradients = session.recorder.take()
    if session.beta is not None:
        gradients = pair_sums(gradients)
    _require_all(session, trained, gradients, rows=len(records))
    return gradients


def of_units(of_records: Callable[[Sequence[Encoded]], dict[str, Tensor]]) -> GradientsOf:
    """Return what gives each unit the mean of its records' gradients."""

    def gradients(units: Sequence[Sequence[Encoded]]) -> dict[str, Tensor]:
        found = of_records([record for unit in units for record in unit])
        sizes = torch.tensor([len(unit) for unit in units])
        if int(sizes.sum()) == len(units):
            return found
        owners = torch.arange(len(units)).repeat_interleave(sizes)
        return owned_means(found, owners, units=len(units))

    return gradients


def private_release(
    shapes: Mapping[str, Sequence[int]],
    units: Sequence[Sequence[Encoded]],
    *,
    gradients_of: GradientsOf,
    plan: PrivacyPlan,
    generator: SecureGenerator,
    micro_batch: int,
) -> dict[str, Tensor]:
    """Return what a private step makes of a site's records: (sum of clipped + noise) / expected batch.

    Each unit drawn contributes the clipped mean gradient of its records, of at most ``micro_batch``
    of them, drawn anew each step. If none is drawn, no gradient is computed and noise alone remains.

    Parameters
    ----------
    shapes : Mapping
        Key -> shape of every matrix that trains.
    units : sequence of sequences of Encoded
        All privacy units of the site, each with its records.
    gradients_of : callable
        Returns key -> gradients of some units, shape (units, *shape), float32.
    """
    sums = plan.zeros(shapes)

    def contribute(chunk: Sequence[Sequence[Encoded]]) -> None:
        found = plan.clip(gradients_of(chunk))
        # all matrices or none: a chunk that fails is taken again
        sums.update({key: sums[key].to(value.device) + value for key, value in found.items()})

    drawn = [_some(units[unit], most=micro_batch, generator=generator) for unit in plan.draw(generator)]
    # a unit none of whose records can be used is drawn and counted like any other, and contributes zero
    for chunk in unit_batches([unit for unit in drawn if unit], micro_batch, padding=PRIVATE_PADDING):
        _robustly(contribute, chunk)
    return plan.privatise(sums, generator)


def _robustly(
    contribute: Callable[[Sequence[Sequence[Encoded]]], None], chunk: list[Sequence[Encoded]]
) -> None:
    """Let a unit whose gradient cannot be computed contribute zero: an error would tell that it was drawn."""
    try:
        contribute(chunk)
    except Exception as error:
        kind = type(error).__name__
        if len(chunk) > 1:
            log.warning("%d units are taken one at a time: together they failed (%s).", len(chunk), kind)
            for unit in chunk:
                _robustly(contribute, [unit])
        else:
            log.warning("a unit contributes nothing: its gradient cannot be computed (%s).", kind)


def _some(unit: Sequence[Encoded], *, most: int, generator: SecureGenerator) -> Sequence[Encoded]:
    if len(unit) <= most:
        return unit
    return [unit[index] for index in random_subset(range(len(unit)), size=most, generator=generator)]


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
