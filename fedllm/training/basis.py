"""Gradients of the base's own weights, for Fed-SB's gradient bases (LoRA-SB, arXiv 2411.19557)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedllm.adapters.state import AdapterSpec
from fedllm.config import Config
from fedllm.data.encode import PUBLIC, Encoded, collate
from fedllm.errors import ConfigError
from fedllm.models.load import load_base, load_tokenizer
from fedllm.privacy.entropy import SecureGenerator
from fedllm.privacy.plan import PrivacyPlan
from fedllm.training.likelihood import causal_losses
from fedllm.training.preference import dpo_losses, preferences

log = logging.getLogger("fedllm.site")

Gradients = dict[str, npt.NDArray[np.float32]]


def weight_gradients(
    config: Config, spec: AdapterSpec, units: Sequence[Sequence[Encoded]], *, plan: PrivacyPlan | None
) -> Gradients:
    """Return the mean gradient of every adapted weight over some units' records.

    Parameters
    ----------
    units : sequence of sequences of Encoded
        Without a plan any; with one what it drew, which may be none.
    plan : PrivacyPlan or None
        Clip each unit's gradient over all weights jointly, add noise to the sum, and divide by the
        expected number of units.

    Returns
    -------
    dict[str, ndarray]
        Module path -> gradient, shape (out, in), float32.

    Raises
    ------
    ConfigError
        If the base is an encoder, whose head has learnt nothing yet.
    """
    if spec.head:
        raise ConfigError(f"adapter.basis={config.adapter.basis} needs a causal model (model.kind).")
    base = load_base(config.model)
    pad = int(load_tokenizer(config.model).pad_token_id)
    beta = config.train.beta
    weights = {module: base.get_submodule(module).get_parameter("weight") for module in spec.shapes}
    for weight in weights.values():
        weight.requires_grad_(True)
    if plan is None:
        sums = {module: torch.zeros(shape) for module, shape in spec.shapes.items()}
        for unit in units:
            for module, value in _mean_gradient(base, weights, unit, pad, beta=beta).items():
                sums[module] += value / len(units)
        return {module: value.numpy() for module, value in sums.items()}
    sums = plan.zeros(spec.shapes)

    def clipped(unit: Sequence[Encoded]) -> dict[str, Tensor]:
        found = _mean_gradient(base, weights, unit, pad, beta=beta)
        return plan.clip({module: gradient[None] for module, gradient in found.items()})

    # what fails for every record fails on a public one, whatever was drawn
    clipped([PUBLIC])
    for unit in units:
        try:
            found = clipped(unit)
        except Exception as error:
            # an error would tell that the unit was drawn
            log.warning("a unit contributes nothing: %s.", type(error).__name__)
            continue
        for module, value in found.items():
            sums[module] += value
    return {
        module: value.float().numpy() for module, value in plan.privatise(sums, SecureGenerator()).items()
    }


def _mean_gradient(
    base: PreTrainedModel,
    weights: dict[str, torch.nn.Parameter],
    records: Sequence[Encoded],
    pad: int,
    *,
    beta: float | None,
) -> dict[str, Tensor]:
    for weight in weights.values():
        weight.grad = None
    for record in records:
        loss = _loss(base, record, pad, beta=beta) / len(records)
        loss.backward()  # type: ignore[no-untyped-call]
    found = {}
    for module, weight in weights.items():
        assert weight.grad is not None, "every adapted weight takes part in the loss"
        found[module] = weight.grad.float().cpu()
    return found


def _loss(base: PreTrainedModel, record: Encoded, pad: int, *, beta: float | None) -> Tensor:
    """Return a record's loss; on a preference the base is its own reference."""
    if beta is None:
        return causal_losses(base, collate([record], pad)).sum()
    found = preferences(base, [record], pad)
    return dpo_losses(found - found.detach(), beta=beta).sum()
