"""How the change of a model is parametrised, what is trained, and what travels."""

from fedllm.adapters.fedsb import FedSB, Ravan
from fedllm.adapters.ffa import FfaLora
from fedllm.adapters.hydra import Hydra
from fedllm.adapters.lora import Dora, Lora
from fedllm.adapters.method import AdapterMethod
from fedllm.adapters.vectors import Ia3, Prompt
from fedllm.choices import add_choice
from fedllm.settings import ADAPTERS

#: Registry of adapter methods; a new method adds one line here.
METHODS: dict[str, AdapterMethod] = {
    method.name: method for method in (Lora(), FfaLora(), FedSB(), Ravan(), Hydra(), Dora(), Ia3(), Prompt())
}


def register(method: AdapterMethod) -> None:
    """Let this process run a method from outside the package as ``adapter.method=<its name>``.

    Every process of a run has to do so, the sites' too: a site trains nothing that it has not
    registered itself. Registering a name again replaces what it stood for.

    Raises
    ------
    ConfigError
        If the name is one of the package's, or is not made of lower-case words and hyphens.
    """
    add_choice("adapter.method", method.name, shipped=ADAPTERS)
    METHODS[method.name] = method


__all__ = ["METHODS", "AdapterMethod", "register"]
