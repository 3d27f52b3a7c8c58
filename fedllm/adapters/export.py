"""Write an adapter state as a standard PEFT folder, without the base model wherever that is possible."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from fedllm.adapters import METHODS
from fedllm.adapters.basis import Basis
from fedllm.adapters.hydra import merged_factors
from fedllm.adapters.layers import Factors, frozen_weight
from fedllm.adapters.lora import magnitudes
from fedllm.adapters.state import AdapterSpec, AdapterState, Matrix
from fedllm.adapters.vectors import ia3_config
from fedllm.errors import RunError

if TYPE_CHECKING:
    from peft import IA3Config, LoraConfig, PromptTuningConfig

STATE_FILE = "fedllm_state.safetensors"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."


def save_state(state: AdapterState, folder: Path, *, seed: str) -> None:
    """Write the trained matrices themselves, so that a later run can go on from them.

    Raises
    ------
    RunError
        If the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {key: np.array(value) for key, value in state.tensors.items()},
            folder / STATE_FILE,
            metadata={"spec": state.spec.to_json(), "seed": seed},
        )
    except (OSError, SafetensorError) as error:
        raise _unwritten(folder, error) from error


def save_peft_adapter(
    state: AdapterState, basis: Basis, folder: Path, *, base_model: str, folded: Factors | None = None
) -> None:
    """Write a folder that ``PeftModel.from_pretrained(base, folder)`` loads.

    Fed-SB becomes ``B' = B R, A' = A``; what a rule has folded into the base becomes further columns.

    Parameters
    ----------
    base_model : str
        Name written into the PEFT config (never a path of this machine).
    folded : Mapping, optional
        Module path -> (U, D) that was added to the base's weights during the run.

    Raises
    ------
    MismatchError
        If the method's adapter cannot be written without the base's weights.
    RunError
        If the folder cannot be written.
    """
    from peft import PromptTuningConfig

    spec, method = state.spec, METHODS[state.spec.method]
    if spec.method == "ia3":
        tensors = {f"{_PREFIX}{m}.ia3_l": state.tensors[f"{m}.l"] for m in spec.shapes}
        _write(folder, ia3_config(spec), tensors, state, base_model=base_model)
    elif spec.method == "prompt":
        config = PromptTuningConfig(
            num_virtual_tokens=spec.rank, token_dim=spec.width, num_transformer_submodules=1
        )
        tensors = {"prompt_embeddings": state.tensors["prompt.P"]}
        _write(folder, config, tensors, state, base_model=base_model)
    else:
        factors = with_folded(method.lora_factors(state, basis), folded or {}, scale=spec.scale)
        _write_lora(folder, factors, {}, state, base_model=base_model)


def save_with_base(state: AdapterState, base: nn.Module, folder: Path, *, base_model: str) -> None:
    """Write the PEFT adapter of a method whose form needs the base's weights (Hydra, DoRA).

    Raises
    ------
    RunError
        If the folder cannot be written.
    """
    weights, biases = {}, {}
    for module in state.spec.shapes:
        layer = base.get_submodule(module)
        weights[module] = frozen_weight(layer)
        bias = dict(layer.named_parameters(recurse=False)).get("bias")
        if bias is not None:
            biases[module] = bias.detach().float().cpu().numpy()
    if state.spec.method == "hydra":
        factors, shifts = merged_factors(state, weights, biases)
        scaled = with_folded(factors, {}, scale=state.spec.scale)
        _write_lora(folder, scaled, shifts, state, base_model=base_model)
        return
    factors = {m: (state.tensors[f"{m}.B"], state.tensors[f"{m}.A"]) for m in state.spec.shapes}
    tensors = _lora_tensors(factors) | {
        f"{_PREFIX}{m}.lora_magnitude_vector": magnitudes(weights[m]) + state.tensors[f"{m}.M"]
        for m in state.spec.shapes
    }
    spec = state.spec
    config = _lora_config(spec, rank=spec.rank, alpha=spec.scale * spec.rank, dora=True)
    _write(folder, config, tensors, state, base_model=base_model)


def with_folded(factors: Factors, folded: Factors, *, scale: float) -> Factors:
    """Return factors with their scale and the folded ones inside, all of one rank (zero columns)."""
    joined = {}
    for module, (up, down) in factors.items():
        more_up, more_down = folded.get(module, (up[:, :0], down[:0]))
        joined[module] = (np.hstack([scale * up, more_up]), np.vstack([down, more_down]))
    rank = max(up.shape[1] for up, _ in joined.values())
    return {
        module: (
            np.pad(up, ((0, 0), (0, rank - up.shape[1]))),
            np.pad(down, ((0, rank - down.shape[0]), (0, 0))),
        )
        for module, (up, down) in joined.items()
    }


def load_state(folder: Path) -> tuple[AdapterState, str]:
    """Read back the trained matrices of an exported folder, and the seed they started from.

    Raises
    ------
    RunError
        If the folder holds no state of fedllm, or a damaged one.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise RunError(f"{folder} holds no {STATE_FILE}; give the adapter folder of a run.")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            order = AdapterSpec.from_json(metadata["spec"])
        tensors = load_file(path)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise _damaged(path, error) from None
    shapes = METHODS[order.method].trained_shapes(order)
    return AdapterState(order, {key: tensors[key] for key in shapes if key in tensors}), metadata["seed"]


def require_loadable(folder: Path) -> None:
    """Refuse a PEFT folder that was cut off while it was written or copied.

    Raises
    ------
    RunError
        If its configuration or its matrices cannot be read.
    """
    path = folder / CONFIG_FILE
    try:
        json.loads(path.read_bytes())
        path = folder / WEIGHTS_FILE
        # opening compares the header with the file's length
        with safe_open(path, framework="numpy"):
            pass
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> RunError:
    return RunError(
        f"{path} is missing or damaged ({type(error).__name__}); restore it from a backup, or run the recipe "
        "again."
    )


def _unwritten(folder: Path, error: OSError | SafetensorError) -> RunError:
    # a full disk is an error of its own to safetensors
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return RunError(f"{folder}: the adapter could not be written ({reason}).")


def _write_lora(
    folder: Path,
    factors: Factors,
    shifts: Mapping[str, Matrix],
    state: AdapterState,
    *,
    base_model: str,
) -> None:
    """Write factors that carry their scale; ``shifts`` are changes of biases."""
    tensors = _lora_tensors(factors)
    for module in factors if shifts else ():
        out = factors[module][0].shape[0]
        tensors[f"{_PREFIX}{module}.lora_B.bias"] = shifts.get(module, np.zeros(out, np.float32))
    rank = next(iter(factors.values()))[0].shape[1]
    config = _lora_config(state.spec, rank=rank, alpha=float(rank), bias=bool(shifts))
    _write(folder, config, tensors, state, base_model=base_model)


def _lora_tensors(factors: Factors) -> dict[str, Matrix]:
    tensors = {}
    for module, (up, down) in factors.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = down
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = up
    return tensors


def _lora_config(
    spec: AdapterSpec, *, rank: int, alpha: float, dora: bool = False, bias: bool = False
) -> LoraConfig:
    from peft import LoraConfig

    # exact module paths as a regular expression: lists match by suffix
    targets = "^(" + "|".join(re.escape(module) for module in spec.shapes) + ")$"
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT takes floats too
        target_modules=targets,
        use_dora=dora,
        lora_bias=bias,
    )


def _write(
    folder: Path,
    config: LoraConfig | IA3Config | PromptTuningConfig,
    tensors: Mapping[str, Matrix],
    state: AdapterState,
    *,
    base_model: str,
) -> None:
    from peft import PromptTuningConfig

    head = {
        f"{_PREFIX}{module}.{name}": state.tensors[f"{module}.{name}"]
        for module in state.spec.head
        for name in ("weight", "bias")
    }
    config.task_type = "SEQ_CLS" if head else "CAUSAL_LM"
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    if head and not isinstance(config, PromptTuningConfig):
        config.modules_to_save = [module.partition(".")[0] for module in state.spec.head]
    whole = {key: np.ascontiguousarray(value, np.float32) for key, value in {**tensors, **head}.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(whole, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
    except (OSError, SafetensorError) as error:
        raise _unwritten(folder, error) from error
