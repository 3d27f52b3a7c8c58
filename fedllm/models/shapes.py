"""Which linear layers a run adapts, and their shapes, read off a model without weights."""

from __future__ import annotations

import copy
import difflib
import re

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedllm.errors import ConfigError, ModelError
from fedllm.models.load import CLASSES, LOADING_ERRORS, is_head
from fedllm.models.pooling import reads_pooler, require_linear_head
from fedllm.models.quiet import quiet

_POSITIONS = "max_position_embeddings"
LAYER_INDEX = re.compile(r"\.(\d+)\.")


def linear_shapes(
    config: PretrainedConfig, *, targets: str, layers: str, kind: str = "causal", pooling: str = "model"
) -> dict[str, tuple[int, int]]:
    """Return the linear layers to adapt.

    Parameters
    ----------
    config : PretrainedConfig
        Of a causal language model or an encoder.
    targets : str
        ``all-linear`` (every linear layer but the output or classification head), or module names
        separated by commas such as ``q_proj,v_proj``.
    layers : str
        Layer numbers and ranges such as ``15-29`` or ``0,3,5``; empty: all. Modules outside the
        numbered layers are not filtered.
    pooling : str
        With ``mean`` an encoder's pooler computes nothing and is left out.

    Returns
    -------
    dict[str, tuple[int, int]]
        Module path -> (out, in), in model order.

    Raises
    ------
    ConfigError
        If a target or layer does not exist, or nothing is left to adapt.
    ModelError
        If the head cannot read a mean.
    """
    model = _without_weights(config, kind)
    if pooling == "mean":
        require_linear_head(model)
    head = model.get_output_embeddings() if kind == "causal" else None
    linear = {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and not (kind == "encoder" and is_head(path))
        and not (pooling == "mean" and reads_pooler(path))
    }
    if not linear:
        raise ConfigError(
            f"model: a {config.model_type} has no linear layers to adapt. Choose another model."
        )
    suffixes = _parse_targets(targets, list(linear))
    numbers = {path: int(found[1]) for path in linear if (found := LAYER_INDEX.search(path))}
    chosen = _parse_layers(layers, count=max(numbers.values(), default=-1) + 1)
    shapes = {
        path: shape
        for path, shape in linear.items()
        if (suffixes is None or any(_ends_with(path, suffix) for suffix in suffixes))
        and (chosen is None or path not in numbers or numbers[path] in chosen)
    }
    if not shapes:
        raise ConfigError(
            f"adapter.targets={targets}, adapter.layers={layers}: no linear layer is left to adapt."
        )
    return shapes


def head_shapes(config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """Return module path -> (out, in) of an encoder's classification head, in model order.

    Raises
    ------
    ModelError
        If the model has no head of linear layers with biases.
    """
    model = _without_weights(config, "encoder")
    shapes = {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_head(path) and module.bias is not None
    }
    if not shapes:
        raise ModelError(f"model: a {config.model_type} has no classification head that is understood here.")
    return shapes


def count_parameters(config: PretrainedConfig, kind: str = "causal") -> int:
    """Return the number of parameters of the model; tied ones count once."""
    model = _without_weights(config, kind)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


def count_quantised(config: PretrainedConfig, kind: str = "causal") -> int:
    """Return the number of weights that bitsandbytes quantises: linear layers', the head's not among them."""
    model = _without_weights(config, kind)
    head = model.get_output_embeddings() if kind == "causal" else None
    return sum(
        module.weight.numel()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and not (kind == "encoder" and is_head(path))
    )


def count_positions(config: PretrainedConfig, kind: str = "causal") -> int | None:
    """Return how many tokens of a text the model has positions for; None where its config sets no limit."""
    text = config.get_text_config()
    values = text.to_dict()
    positions = values.get(text.attribute_map.get(_POSITIONS, _POSITIONS))
    if not positions:
        return None
    # RoBERTa and its kin count positions from behind that of padding
    unused = [
        module.padding_idx + 1
        for path, module in _without_weights(config, kind).named_modules()
        if isinstance(module, nn.Embedding)
        and path.endswith("position_embeddings")
        and module.padding_idx is not None
    ]
    return int(positions) - max(unused, default=0)


def _without_weights(config: PretrainedConfig, kind: str) -> PreTrainedModel:
    try:
        with quiet(), torch.device("meta"):
            model: PreTrainedModel = CLASSES[kind].from_config(copy.deepcopy(config), trust_remote_code=False)
    except ValueError as error:
        what = "a causal language model" if kind == "causal" else "an encoder with a classification head"
        raise ModelError(
            f"model: a {config.model_type} is not {what}. Choose another model.name or model.kind."
        ) from error
    except LOADING_ERRORS as error:
        raise ModelError(
            f"model: its config.json describes no {config.model_type} ({type(error).__name__}: {error}). "
            "Copy the whole model folder again."
        ) from error
    return model


def _ends_with(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith(f".{suffix}")


def _parse_targets(targets: str, paths: list[str]) -> list[str] | None:
    """Return the suffixes asked for, or None for all."""
    if targets.strip() == "all-linear":
        return None
    suffixes = [name.strip() for name in targets.split(",") if name.strip()]
    available = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    if not suffixes:
        raise ConfigError(f"adapter.targets: empty. Give all-linear or some of {', '.join(available)}.")
    for suffix in suffixes:
        if not any(_ends_with(path, suffix) for path in paths):
            near = difflib.get_close_matches(suffix, [*available, "all-linear"], n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ConfigError(
                f"adapter.targets: the model has no linear layer '{suffix}'. "
                f"It has {', '.join(available)}.{hint}"
            )
    return suffixes


def _parse_layers(layers: str, *, count: int) -> set[int] | None:
    """Return the layer numbers asked for, or None for all."""
    if not layers.strip():
        return None
    chosen: set[int] = set()
    for part in layers.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if found is None:
            raise ConfigError(
                f"adapter.layers: '{part.strip()}' is neither a layer nor a range, such as 3 or 15-29."
            )
        first, last = int(found[1]), int(found[2] or found[1])
        if first > last:
            raise ConfigError(f"adapter.layers: {first}-{last} runs backwards; write {last}-{first}.")
        if last >= count:
            raise ConfigError(f"adapter.layers: the model has layers 0-{count - 1}, got {part.strip()}.")
        chosen.update(range(first, last + 1))
    return chosen
