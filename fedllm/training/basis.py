"""Gradients of the base's own weights, for Fed-SB's gradient bases (LoRA-SB, arXiv 2411.19557)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from fedllm.adapters.state import AdapterSpec
from fedllm.config import Config
from fedllm.data.encode import Encoded, collate
from fedllm.errors import ConfigError
from fedllm.models.load import load_base, load_tokenizer
from fedllm.privacy.noise import SecureGenerator
from fedllm.privacy.plan import PrivacyPlan
from fedllm.training.forward import causal_losses

Gradients = dict[str, npt.NDArray[np.float32]]


def weight_gradients(
    config: Config, spec: AdapterSpec, records: Sequence[Encoded], *, plan: PrivacyPlan | None
) -> Gradients:
    """Return the summed gradient of every adapted weight over some records.

    Parameters
    ----------
    records : Sequence[Encoded]
        Without a plan any records; with one a Poisson sample, which may be empty.
    plan : PrivacyPlan or None
        Clip each record's gradient over all weights jointly to its C and add its noise to the sum.

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
    weights = {module: base.get_submodule(module).get_parameter("weight") for module in spec.shapes}
    sums = {module: np.zeros(shape, np.float32) for module, shape in spec.shapes.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    for record in records:
        found = _one_record(base, weights, record, pad)
        size = float(np.sqrt(sum(float(np.sum(value.astype(np.float64) ** 2)) for value in found.values())))
        factor = 1.0 if plan is None else min(1.0, plan.clipping_norm / max(size, 1e-12))
        if np.isfinite(size):
            for module, value in found.items():
                sums[module] += factor * value
    if plan is not None:
        generator = SecureGenerator()
        for value in sums.values():
            value += (plan.noise_deviation * generator.normal(value.shape)).astype(np.float32)
    return sums


def _one_record(
    base: PreTrainedModel, weights: dict[str, torch.nn.Parameter], record: Encoded, pad: int
) -> Gradients:
    causal_losses(base, collate([record], pad)).sum().backward()  # type: ignore[no-untyped-call]
    found: Gradients = {}
    for module, weight in weights.items():
        assert weight.grad is not None, "every adapted weight takes part in the loss"
        found[module] = weight.grad.float().cpu().numpy()
        weight.grad = None
    return found
