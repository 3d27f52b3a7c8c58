"""How the change of a model is parametrised, what is trained, and what travels."""

from fedllm.adapters.fedsb import FedSB, Ravan
from fedllm.adapters.ffa import FfaLora
from fedllm.adapters.hydra import Hydra
from fedllm.adapters.lora import Dora, Lora
from fedllm.adapters.method import AdapterMethod
from fedllm.adapters.vectors import Ia3, Prompt

#: Registry of adapter methods; a new method adds one line here.
METHODS: dict[str, AdapterMethod] = {
    method.name: method for method in (Lora(), FfaLora(), FedSB(), Ravan(), Hydra(), Dora(), Ia3(), Prompt())
}

__all__ = ["METHODS", "AdapterMethod"]
