"""Papers' methods as strategy classes: each fixes the aggregation rule it is known for."""

from __future__ import annotations

from typing import ClassVar

from fedllm.aggregation import RULES
from fedllm.errors import ConfigError
from fedllm.federation.run import ServerRun
from strategies.base import AdapterStrategy


class Preset(AdapterStrategy):
    """An adapter strategy under one paper's name.

    Raises
    ------
    ConfigError
        If the run's settings name another rule.
    """

    #: the rule's ``strategy.name``
    rule: ClassVar[str]

    def __init__(self, run: ServerRun) -> None:
        if run.config.strategy.name != self.rule:
            raise ConfigError(
                f"{type(self).__name__} is strategy.name={self.rule}, not {run.config.strategy.name}."
            )
        super().__init__(run)


def _preset(name: str) -> type[Preset]:
    about = RULES[name].about
    doc = f"{about.title} ({about.paper}): exact: {about.exact}; up {about.up}; down {about.down}."
    return type(RULES[name].__name__, (Preset,), {"rule": name, "__doc__": doc, "__module__": __name__})


Average = _preset("average")
FedIT = _preset("fedit")
FFALoRA = _preset("ffa")
RoLoRA = _preset("rolora")
FedSB = _preset("fed-sb")
RAVAN = _preset("ravan")
FedSA = _preset("fedsa")
FLoRA = _preset("flora")
FedEx = _preset("fedex")
FlexLoRA = _preset("flexlora")
FLoRIST = _preset("florist")
RaFLoRA = _preset("raflora")
HetLoRA = _preset("hetlora")
LoRAFAIR = _preset("lora-fair")
FedRot = _preset("fedrot")
FedSVD = _preset("fedsvd")
FedASK = _preset("fedask")
