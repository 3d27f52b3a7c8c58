"""Write an adapter state as a standard PEFT LoRA folder, without the base model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from peft import LoraConfig
from safetensors.numpy import load_file, save_file

from fedllm.adapters import METHODS
from fedllm.adapters.basis import Basis
from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.errors import RunError

STATE_FILE = "fedllm_state.safetensors"


def save_peft_adapter(state: AdapterState, basis: Basis, folder: Path, *, base_model: str, seed: str) -> None:
    """Write a folder that ``PeftModel.from_pretrained(base, folder)`` loads.

    Every method here has an exact LoRA form: Fed-SB as ``B' = B R, A' = A``. The trained
    matrices themselves stand beside it, so that a later run can go on from them.

    Parameters
    ----------
    base_model : str
        Name written into the PEFT config (never a path of this machine).
    seed : str
        Seed the adapter was started from, kept for ``adapter.init``.
    """
    method = METHODS[state.spec.method]
    tensors: dict[str, np.ndarray] = {}
    for module, (up, down) in method.lora_factors(state, basis).items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(down, np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(up, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        save_file(
            {key: np.array(value) for key, value in state.tensors.items()},
            folder / STATE_FILE,
            metadata={"spec": state.spec.to_json(), "seed": seed},
        )
        LoraConfig(
            r=state.spec.rank,
            lora_alpha=state.spec.scale * state.spec.rank,  # type: ignore[arg-type]  # PEFT takes floats too
            target_modules=_targets(state.spec),
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_model,
            inference_mode=True,
        ).save_pretrained(str(folder))
    except OSError as error:
        raise RunError(f"{folder}: the adapter could not be written ({error.strerror}).") from error


def load_state(folder: Path) -> tuple[AdapterState, str]:
    """Read back the trained matrices of an exported folder, and the seed they started from.

    Raises
    ------
    RunError
        If the folder holds no state of fedllm, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / STATE_FILE
    if not path.is_file():
        raise RunError(f"adapter.init: {folder} holds no {STATE_FILE}; give the adapter folder of a run.")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            order = AdapterSpec.from_json(metadata["spec"])
        tensors = load_file(path)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise RunError(f"adapter.init: {path} is damaged ({type(error).__name__}).") from None
    shapes = METHODS[order.method].trained_shapes(order)
    return AdapterState(order, {key: tensors[key] for key in shapes}), metadata["seed"]


def _targets(spec: AdapterSpec) -> str:
    """Return the exact module paths as a regular expression (lists match by suffix)."""
    return "^(" + "|".join(re.escape(module) for module in spec.shapes) + ")$"
