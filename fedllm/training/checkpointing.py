"""Gradient checkpointing: a layer's activations are computed again when the backward pass needs them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fedllm.errors import ModelError


def checkpoint_layers(base: PreTrainedModel) -> None:
    """Keep only the inputs of a model's layers for the backward pass.

    Transformers does this in training mode alone, and a model that trains an adapter without dropout
    stays in evaluation mode here, which is what keeps the base's own dropout off.

    Raises
    ------
    ModelError
        If the model has no layers of the kind that can be computed again.
    """
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"train.gradient_checkpointing: a {base.config.model_type} has no layers that can be computed "
            "again; set it to false."
        )
    for layer in layers:
        layer.forward = partial(_again, layer.forward)


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
