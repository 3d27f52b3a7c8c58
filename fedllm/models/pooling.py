"""What an encoder's classification head reads: what its class gives it, or a mean over the tokens."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from fedllm.errors import ModelError

#: The one linear map that reads a mean.
HEAD = "classifier"
#: What stands between a model's states and its own classes' heads.
POOLER = "pooler"


def class_logits(base: PreTrainedModel, inputs: Mapping[str, Tensor], *, pooling: str) -> Tensor:
    """Return an encoder's logits, shape (B, labels), float32.

    Parameters
    ----------
    base : PreTrainedModel
        A sequence classifier, with or without adapter layers.
    inputs : Mapping[str, Tensor]
        ``input_ids``, ``attention_mask`` and what else the model takes, shape (B, T).
    pooling : str
        ``model``: as the model's class computes them, such as from the first token through a pooler.
        ``mean``: from the mean of the last hidden states of a record's own tokens, as sentence encoders
        are trained (Reimers and Gurevych, arXiv 1908.10084, section 3).
    """
    placed = {name: value.to(base.device) for name, value in inputs.items()}
    if pooling == "model":
        logits: Tensor = base(**placed).logits
        return logits.float()
    hidden = base.base_model(**placed).last_hidden_state
    mask = placed["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    logits = base.get_submodule(HEAD)(mean)
    return logits.float()


def reads_pooler(path: str) -> bool:
    """Return whether a module belongs to a pooler, which a mean leaves out."""
    return POOLER in path.split(".")


def require_linear_head(model: PreTrainedModel) -> None:
    """Refuse a mean where the head is not one linear map alone.

    Raises
    ------
    ModelError
        Naming the model's class.
    """
    parts = {name: child for name, child in model.named_children() if any(True for _ in child.parameters())}
    others = set(parts) - {model.base_model_prefix, HEAD, POOLER}
    if others or not isinstance(parts.get(HEAD), nn.Linear):
        raise ModelError(
            f"model.pooling=mean: the head of a {type(model).__name__} is not one linear map; use "
            "model.pooling=model."
        )
