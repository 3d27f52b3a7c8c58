"""Load what a run's settings name: config, tokenizer, frozen base."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedllm.errors import ModelError, PrivacyError
from fedllm.models.dtype import base_dtype
from fedllm.models.pooling import reads_pooler
from fedllm.models.pull import pull
from fedllm.models.quiet import quiet
from fedllm.models.registry import EMBEDDED
from fedllm.settings import ModelSettings

#: What transformers and its parts raise for files that are absent, damaged or of another model.
LOADING_ERRORS = (
    OSError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    TypeError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)
GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
#: First names in the paths of classification heads.
HEADS = ("classifier", "pre_classifier", "score")
#: The class that loads a kind of model (``model.kind``).
CLASSES: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "encoder": AutoModelForSequenceClassification,
}


def resolve(model: ModelSettings) -> Path | str:
    """Return the folder of the base model, or its hub name.

    ``model.path`` comes first, then the embedded models (made in the cache where needed), then the
    name as a hub knows it.

    Raises
    ------
    ModelError
        If model.path is not a folder with config.json, or an embedded model cannot be made.
    """
    if model.path:
        folder = Path(model.path).expanduser()
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "does not exist"
            raise ModelError(
                f"model.path: {folder} {what}. Give a folder with config.json, weights and tokenizer."
            )
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"model.path: {folder} has no config.json. Copy the whole model folder: config.json, "
                "*.safetensors and the tokenizer's files."
            )
        return folder
    return pull(model.name) if model.name in EMBEDDED else model.name


def load_config(model: ModelSettings, *, labels: int = 0) -> PretrainedConfig:
    """Read the model's config; its weights are never touched.

    Parameters
    ----------
    labels : int
        Rows of an encoder's classification head.

    Raises
    ------
    ModelError
        If the name is unknown, the hub cannot be reached, or the config cannot be read or is not one
        of a causal language model.
    """
    source = resolve(model)
    with quiet(), _explained(source, "config.json"):
        config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
    names = config.architectures or []
    if model.kind == "encoder":
        if labels:
            config.num_labels = labels
    elif names and not any(name.endswith(GENERATIVE) for name in names):
        raise ModelError(
            f"{source}: {names[0]} is not a causal language model, so it cannot be fine-tuned here. "
            f"Choose another model.name, such as smollm2-135m-instruct, or model.kind=encoder."
        )
    _require_own_quantization(config, model, source)
    return config


def load_tokenizer(model: ModelSettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer: it pads at the right, with its end token where it has no padding token.

    Raises
    ------
    ModelError
        If its files are missing or damaged, or it has neither a padding nor an end token.
    """
    source = resolve(model)
    if isinstance(source, Path) and not any(source.glob("*token*")) and not any(source.glob("vocab*")):
        raise ModelError(f"{source}: no tokenizer files (tokenizer.json). Copy the whole model folder.")
    with quiet(), _explained(source, "tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"{source}: the tokenizer has neither a padding nor an end token. "
                'Set "pad_token" or "eos_token" in its tokenizer_config.json.'
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def load_base(model: ModelSettings, *, labels: int = 0) -> PreTrainedModel:
    """Load the frozen base in evaluation mode on the device accelerate chooses.

    An encoder's head (``labels`` rows) is new; its values come with the adapter state. With
    ``model.quantization`` the linear layers hold bitsandbytes codes (nf4 for 4bit) and compute in
    ``model.dtype``.

    Raises
    ------
    ModelError
        If the weights are missing, damaged or incomplete, are not safetensors, or belong to a model
        that is not a causal language model.
    """
    config = load_config(model, labels=labels)
    source = resolve(model)
    dtype = base_dtype(model)
    device = PartialState().device
    options: dict[str, Any] = {}
    if model.quantization != "none":
        options = {"quantization_config": _quantization(model, dtype)}
    with quiet(), _explained(source, "weights"):
        loaded: Any = CLASSES[model.kind].from_pretrained(
            source,
            config=config,
            dtype=dtype,
            device_map={"": device},
            attn_implementation="sdpa",
            use_safetensors=True,  # the other format can run code when it is read
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    base: PreTrainedModel = loaded[0]
    absent = [key for key in loaded[1]["missing_keys"] if not is_head(key)]
    missing = sorted(key for key in absent if not (model.pooling == "mean" and reads_pooler(key)))
    if missing:
        raise ModelError(
            f"{source}: the weights lack {len(missing)} of the model's matrices, first '{missing[0]}'. "
            "They would be random. Copy the whole model folder again."
        )
    base.requires_grad_(False)
    for key in absent:
        # a pooler that computes nothing: its random numbers would differ between sites
        base.get_parameter(key).zero_()
    if model.quantization != "none":
        _prepare_quantised(base)
    base.eval()
    return base


def _require_own_quantization(config: PretrainedConfig, model: ModelSettings, source: Path | str) -> None:
    """Refuse weights that are quantised in another way than ``model.quantization`` says.

    Transformers takes a checkpoint's own way over the one it is asked for, and with it whatever makes one
    record's numbers depend on the others of its pass.
    """
    saved = config.to_dict().get("quantization_config")
    if not saved:
        return
    kind = "another way"
    if saved.get("quant_method") == "bitsandbytes" or saved.get("load_in_8bit") or saved.get("load_in_4bit"):
        kind = "8bit" if saved.get("load_in_8bit") else "4bit"
    if kind != model.quantization:
        told = f"set model.quantization={kind}" if kind != "another way" else "use the unquantised model"
        raise ModelError(
            f"{source}: its weights are quantised ({saved.get('quant_method', kind)}, {kind}) and "
            f"model.quantization={model.quantization}; {told}."
        )


def _prepare_quantised(base: PreTrainedModel) -> None:
    """Keep gradients flowing and records apart, whatever the weights' own settings say.

    On some processors an evaluation pass changes the 4-bit layers' layout; no gradient flows through the
    other one, so training after evaluation would silently lose it. 8-bit outliers are found over a whole
    batch: one record's would change how the others are multiplied.
    """
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt):
            module.state.threshold = 0.0


def is_head(path: str) -> bool:
    """Return whether a module or parameter belongs to an encoder's classification head."""
    return path.partition(".")[0] in HEADS


def require_separate_records(base: PreTrainedModel) -> None:
    """Refuse a base whose positions depend on the longest record of all passes so far.

    Raises
    ------
    PrivacyError
        If its rotary embedding is rescaled by the length it meets (dynamic, longrope).
    """
    kinds = _rope_types(base.config.to_dict()) & {"dynamic", "longrope"}
    if kinds:
        raise PrivacyError(
            f"rope_type={kinds.pop()}: this model's positions follow the longest record, so records would "
            "change each other and clipping would not bound one; a private run needs another base model."
        )


def _rope_types(value: object) -> set[str]:
    if not isinstance(value, dict):
        return set()
    own = {str(value[key]) for key in ("rope_type", "type") if key in value}
    return own.union(*map(_rope_types, value.values()))


def require_plain_head(base: PreTrainedModel) -> None:
    """Refuse a causal model whose logits are not its output head on the decoder's last hidden state.

    Raises
    ------
    ModelError
        Naming the model's class.
    """
    ids = torch.tensor([[1, 2, 3]], device=base.device)
    with torch.no_grad():
        hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        plain = base.get_output_embeddings()(hidden)
        whole = base(input_ids=ids, use_cache=False).logits
    if not torch.allclose(plain.float(), whole.float(), rtol=1e-2, atol=1e-2):
        raise ModelError(
            f"{type(base).__name__} changes its logits after the output head (such as soft-capping), which "
            "fedllm's loss does not follow yet; choose another base model."
        )


def _quantization(model: ModelSettings, dtype: torch.dtype) -> BitsAndBytesConfig:
    options: dict[str, Any] = {"load_in_8bit": True}
    if model.quantization == "4bit":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    if model.kind == "encoder":
        # a trained head keeps its numbers
        options["llm_int8_skip_modules"] = list(HEADS)
    return BitsAndBytesConfig(**options)


@contextmanager
def _explained(source: Path | str, part: str) -> Iterator[None]:
    """Turn what the loaders raise into an error that says what to do."""
    try:
        yield
    except LOADING_ERRORS as error:
        raise ModelError(
            _hub_message(source, error) if isinstance(source, str) else _folder_message(source, part, error)
        ) from error


def _hub_message(name: str, error: Exception) -> str:
    near = difflib.get_close_matches(name, EMBEDDED, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return (
        f"model.name: '{name}' is not an embedded model ({', '.join(EMBEDDED)}) and could not be loaded "
        f"from the Hugging Face hub (no network, no such name, no access, or no safetensors): "
        f"{_shortened(error)}.{hint} "
        "Without a network set model.path (at a real site: model_path in its policy) to a folder with "
        "config.json, weights and tokenizer."
    )


def _folder_message(folder: Path, part: str, error: Exception) -> str:
    if folder.name in EMBEDDED and (folder / "fedllm.json").is_file():
        remedy = f"Remove the folder and run `fedllm models pull {folder.name}`."
    else:
        remedy = "Copy the whole model folder again: config.json, *.safetensors and the tokenizer's files."
    reason = _shortened(error)
    if "ignore_mismatched_sizes" in reason:
        reason = "their shapes are not those config.json asks for"
    return f"{folder}: {part} cannot be loaded ({reason}). {remedy}"


def _shortened(error: Exception) -> str:
    return " ".join(str(error).split()[:40]).rstrip(".") or type(error).__name__
