"""How the weight change is parametrised, what is trained, and what travels."""

from fedllm.adapters.fedsb import FedSB
from fedllm.adapters.ffa import FfaLora
from fedllm.adapters.lora import Lora
from fedllm.adapters.method import AdapterMethod

#: Registry of adapter methods; a new method adds one line here.
METHODS: dict[str, AdapterMethod] = {method.name: method for method in (Lora(), FfaLora(), FedSB())}

__all__ = ["METHODS", "AdapterMethod"]
