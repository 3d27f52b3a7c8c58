"""Two short hashes: is it the same architecture, are they the same weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PretrainedConfig

#: Config entries that decide which matrices there are, under the names the model families use.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "n_embd",
    "n_inner",
    "n_layer",
    "n_head",
    "num_experts",
    "num_local_experts",
    "tie_word_embeddings",
)
SAMPLES = 4096
DIGITS = 16


def architecture_fingerprint(config: PretrainedConfig, shapes: Mapping[str, tuple[int, int]]) -> str:
    """Return 16 hex digits over the model type, its sizes and the adapted shapes.

    File names, number format and library versions do not enter.
    """
    text = config.get_text_config()
    values = text.to_dict()
    parts = {
        "model_type": text.model_type,
        "sizes": {name: values[name] for name in SIZES if name in values},
        "shapes": [[path, *shape] for path, shape in shapes.items()],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:DIGITS]


def weights_fingerprint(model: nn.Module, *, exclude: Iterable[nn.Parameter] = ()) -> str:
    """Return 16 hex digits over evenly spaced entries of every parameter.

    At most 4096 entries of a parameter are read, so a changed matrix shows and a changed single entry
    may not. Quantised parameters enter with their raw codes, others as float32.

    Parameters
    ----------
    model : nn.Module
        A base, with or without adapter layers.
    exclude : Iterable[nn.Parameter]
        Parameters of the model to leave out, such as the trained ones.
    """
    left_out = {id(parameter) for parameter in exclude}
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if id(parameter) in left_out:
            continue
        flat = parameter.data.reshape(-1)
        sample = flat[:: max(1, -(-flat.numel() // SAMPLES))]
        if sample.dtype not in (torch.uint8, torch.int8):
            sample = sample.float()
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:DIGITS]
