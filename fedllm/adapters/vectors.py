"""Methods without products: IA3's scaling vectors and prompt tuning, averaged plainly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from fedllm.adapters.basis import Basis, generator
from fedllm.adapters.method import AdapterMethod
from fedllm.adapters.state import AdapterSpec, Matrix, require_same_layout

if TYPE_CHECKING:
    from peft import IA3Config
    from peft.tuners.ia3 import IA3Layer

#: Leaf names of the maps that IA3 scales at their input (PEFT's own list of feed-forward modules).
FEEDFORWARD = ("down_proj", "fc2", "wo", "dense_4h_to_h", "w2")
_PROMPT_DEVIATION = 0.02


class Ia3(AdapterMethod):
    """IA3 (arXiv 2205.05638): one vector l a map, on its output, or on a feed-forward map's input."""

    name = "ia3"
    title = "IA3"
    paper = "arXiv 2205.05638"
    trains = "l"
    export = "peft"
    private = False
    zero_is_base = False

    @override
    def matrices(self, spec: AdapterSpec) -> tuple[str, ...]:
        return ("l",)

    @override
    def shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        return {
            f"{module}.l": (1, into) if is_feedforward(module) else (out, 1)
            for module, (out, into) in spec.shapes.items()
        }

    @override
    def start(self, spec: AdapterSpec, seed: str) -> dict[str, Matrix]:
        return {key: np.ones(shape, np.float32) for key, shape in self.shapes(spec).items()}

    @override
    def inject(
        self, model: PreTrainedModel, spec: AdapterSpec, basis: Basis, *, dropout: float = 0.0
    ) -> nn.Module:
        from peft import get_peft_model

        wrapped = get_peft_model(model, ia3_config(spec))
        found = {path: (int(layer.out_features), int(layer.in_features)) for path, layer in _layers(wrapped)}
        require_same_layout(spec.shapes, found, site="of this process")
        return wrapped

    @override
    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {f"{path}.l": layer.ia3_l["default"] for path, layer in _layers(model)}


class PromptModel(nn.Module):
    """A frozen base and the embeddings that stand before every prompt."""

    def __init__(self, base: PreTrainedModel, tokens: int, width: int) -> None:
        super().__init__()
        self.base = base
        self.prompt = nn.Parameter(torch.zeros(tokens, width, device=base.device))


class Prompt(AdapterMethod):
    """Prompt tuning (arXiv 2104.08691): ``rank`` virtual tokens before the text."""

    name = "prompt"
    title = "Prompt tuning"
    paper = "arXiv 2104.08691"
    trains = "P"
    export = "peft"
    private = False
    zero_is_base = False

    @override
    def matrices(self, spec: AdapterSpec) -> tuple[str, ...]:
        return ("P",)

    @override
    def shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        return {"prompt.P": (spec.rank, spec.width)}

    @override
    def start(self, spec: AdapterSpec, seed: str) -> dict[str, Matrix]:
        draw = generator(seed, "prompt.P").standard_normal((spec.rank, spec.width))
        return {"prompt.P": (_PROMPT_DEVIATION * draw).astype(np.float32)}

    @override
    def inject(
        self, model: PreTrainedModel, spec: AdapterSpec, basis: Basis, *, dropout: float = 0.0
    ) -> nn.Module:
        return PromptModel(model.requires_grad_(False), spec.rank, spec.width)

    @override
    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {"prompt.P": model.get_parameter("prompt")}


def is_feedforward(module: str) -> bool:
    """Return whether IA3 scales a map's input instead of its output."""
    return module.rpartition(".")[2] in FEEDFORWARD


def ia3_config(spec: AdapterSpec) -> IA3Config:
    """Return PEFT's configuration of an IA3 adapter."""
    from peft import IA3Config

    return IA3Config(
        target_modules=list(spec.shapes),
        feedforward_modules=[module for module in spec.shapes if is_feedforward(module)],
    )


def _layers(model: nn.Module) -> list[tuple[str, IA3Layer]]:
    from peft.tuners.ia3 import IA3Layer

    prefix = "base_model.model."
    return [
        (path.removeprefix(prefix), module)
        for path, module in model.named_modules()
        if isinstance(module, IA3Layer)
    ]


def prefix_of(model: nn.Module) -> Tensor | None:
    """Return the virtual tokens of an injected model, shape (tokens, width), or None."""
    return model.prompt if isinstance(model, PromptModel) else None
