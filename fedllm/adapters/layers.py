"""Injection through PEFT's LoRA layers, which carry every method that adds to a linear map.

PEFT is imported where a model is at hand: that takes six seconds, and a server never has one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from fedllm.adapters.basis import Basis
from fedllm.adapters.method import AdapterMethod
from fedllm.adapters.state import AdapterSpec, Matrix, require_same_layout

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

ADAPTER = "default"
Factors = Mapping[str, tuple[Matrix, Matrix]]


class Folded(nn.Module):
    """A frozen linear map and a low-rank update folded into it: ``W0 x + U (D x)``.

    Rules that merge into the base (FedEx-LoRA, FLoRA, FLoRIST) keep what they merge in factors
    here. So a quantised base stays as it is, and nothing drifts in bfloat16.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        # PEFT finds the true base by this name
        self.base_layer = base_layer
        self.up: Tensor | None = None
        self.down: Tensor | None = None

    def forward(self, x: Tensor, *args: object, **options: object) -> Tensor:
        """Return the map's value with the folded update."""
        result: Tensor = self.base_layer(x, *args, **options)
        if self.up is None or self.down is None:
            return result
        inner = nn.functional.linear(x.to(self.down.dtype), self.down)
        return result + nn.functional.linear(inner, self.up).to(result.dtype)


def frozen_weight(layer: nn.Module) -> Matrix:
    """Return a frozen map's weight, float32, shape (out, in); of a quantised one what its codes mean."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Matrix = dequantize_module_weight(layer).detach().float().cpu().numpy()
    return weight


class LoraFamily(AdapterMethod):
    """Methods that live in PEFT's LoRA layers."""

    dora: ClassVar[bool] = False
    #: whether rules may fold updates into the frozen map
    folds: ClassVar[bool] = True

    @abstractmethod
    def prepare(
        self,
        layer: LoraLayer,
        up: Matrix | None,
        down: Matrix | None,
        *,
        spec: AdapterSpec,
        dtype: torch.dtype,
    ) -> None:
        """Install the frozen matrices into one PEFT layer and freeze what does not train.

        Parameters
        ----------
        dtype : torch.dtype
            The base's number format, which the frozen matrices take too: casting every
            activation to float32 for them would cost a fifth of a step.
        """

    @abstractmethod
    def layer_parameters(self, layer: LoraLayer) -> dict[str, nn.Parameter]:
        """Return the trained parameters of one injected layer by matrix name."""

    def inner_rank(self, spec: AdapterSpec) -> int:
        """Return the rank of the PEFT layer."""
        return spec.rank

    @override
    def inject(
        self, model: PreTrainedModel, spec: AdapterSpec, basis: Basis, *, dropout: float = 0.0
    ) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        rank = self.inner_rank(spec)
        config = LoraConfig(
            r=rank,
            lora_alpha=spec.scale * rank,  # type: ignore[arg-type]  # PEFT takes floats too
            lora_dropout=dropout,
            target_modules=list(spec.shapes),
            use_dora=self.dora,
        )
        wrapped = get_peft_model(model, config)
        layers = adapted_layers(wrapped)
        found = {path: (int(layer.out_features), int(layer.in_features)) for path, layer in layers.items()}  # type: ignore[arg-type]
        require_same_layout(spec.shapes, found, site="of this process")
        for path, layer in layers.items():
            self.prepare(layer, basis.up.get(path), basis.down.get(path), spec=spec, dtype=model.dtype)
            if self.folds:
                layer.base_layer = Folded(layer.base_layer)
        return wrapped

    @override
    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {
            f"{path}.{name}": parameter
            for path, layer in adapted_layers(model).items()
            for name, parameter in self.layer_parameters(layer).items()
        }


def fold(model: nn.Module, factors: Factors) -> None:
    """Fold low-rank updates into the frozen maps, in the place of those folded before.

    Parameters
    ----------
    factors : Mapping[str, tuple[Matrix, Matrix]]
        Module path -> (U, D), shapes (out, r) and (r, in), all scales inside; modules left out
        get none.
    """
    for path, layer in adapted_layers(model).items():
        folded = layer.base_layer
        if isinstance(folded, Folded):
            weight = weight_of(submodule(layer, "lora_A"))
            pair = factors.get(path)
            folded.up = folded.down = None
            if pair is not None:
                folded.up, folded.down = (torch.tensor(matrix).to(weight.device) for matrix in pair)


@contextmanager
def unadapted(model: nn.Module) -> Iterator[None]:
    """Put the base's own maps in the place of the adapted ones while the block runs.

    So the base computes what it does without an adapter, bit for bit, whatever the method and
    whatever rules have folded in. (PEFT's ``disable_adapter`` leaves what stands between a layer and
    its base, and afterwards lets matrices train that were frozen.)
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    pairs = [
        (path, module, module.get_base_layer())
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module)
    ]
    try:
        for path, _, own in pairs:
            model.set_submodule(path, own)
        yield
    finally:
        for path, adapted, _ in pairs:
            model.set_submodule(path, adapted)


def drop_empty_biases(model: nn.Module) -> None:
    """Take the adapter's bias off the maps whose base has none, so that PEFT can merge it.

    A PEFT LoRA has biases at all of its maps or at none; where the base has none, Hydra's are zero.
    """
    for layer in adapted_layers(model).values():
        if "bias" not in dict(layer.get_base_layer().named_parameters(recurse=False)):
            layer.lora_bias[ADAPTER] = False


def submodule(layer: LoraLayer, name: str) -> nn.Module:
    """Return the adapter's part of a PEFT layer, such as ``lora_A``."""
    found: nn.ModuleDict = {"lora_A": layer.lora_A, "lora_B": layer.lora_B}[name]
    return found[ADAPTER]


def weight_of(module: nn.Module) -> nn.Parameter:
    """Return a linear map's weight."""
    return module.get_parameter("weight")


def install(module: nn.Module, matrix: Matrix, dtype: torch.dtype) -> None:
    """Put a frozen matrix into a linear map, in the base's number format."""
    weight = weight_of(module)
    weight.requires_grad_(False)
    weight.data = torch.tensor(matrix).to(device=weight.device, dtype=dtype)


def adapted_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return module path (as in the base model) -> PEFT layer, in model order."""
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    return {
        path.removeprefix(prefix): module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
