"""Small federations in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

import fedllm
from fedllm.config import Config
from fedllm.federation.client import client_app
from fedllm.federation.inprocess import InProcessGrid
from fedllm.federation.server import serve
from fedllm.runs.events import read_events
from fedllm.runs.folder import RunFolder

BASE: dict[str, Any] = {
    "model.name": "tiny-llama",
    "model.dtype": "float32",
    "adapter.rank": 3,
    "adapter.layers": "1",
    "data.source": "mcc",
    "federation.sites": 3,
    "federation.rounds": 2,
    "federation.join_wait": 1.0,
    "federation.deadline": 60.0,
    "train.batch_size": 4,
    "train.local_steps": 2,
    "train.max_length": 160,
    "train.threads": 1,
    "evaluation.records": 2,
    "evaluation.final_records": 4,
}
Tamper = Callable[[Message, Message], Message]


class TamperedApp:
    """A ClientApp whose replies a test may change."""

    def __init__(self, tamper: Tamper | None) -> None:
        self.app = client_app()
        self.tamper = tamper

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self.app(message, context)
        return reply if self.tamper is None else self.tamper(message, reply)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run whose adapter changes what is written, and how likely it is."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    settings: dict[str, Any] = {
        "model.name": "tiny-llama",
        "model.dtype": "float32",
        "adapter.method": "lora",
        "data.source": "mcc",
        "federation.sites": 2,
        "federation.rounds": 1,
        "train.local_steps": 4,
        "train.lr": 0.3,
        "train.max_length": 160,
        "evaluation.every": 0,
        "evaluation.final_records": 2,
        "evaluation.batch_size": 3,
        "run.dir": str(folder),
    }
    fedllm.run(Config.from_flat(settings))
    return folder


@pytest.fixture
def federate(tmp_path: Path) -> Callable[..., RunFolder]:
    """Return a function that runs a federation and returns its folder."""

    def run(
        tamper: Tamper | None = None,
        *,
        dir: str = "run",
        carrier: type[InProcessGrid] = InProcessGrid,
        **settings: Any,
    ) -> RunFolder:
        values = BASE | {"run.dir": str(tmp_path / dir)}
        values |= {key.replace("__", "."): value for key, value in settings.items()}
        grid = carrier(TamperedApp(tamper), nodes=values["federation.sites"])  # type: ignore[arg-type]
        return serve(Config.from_flat(values).to_flat(), grid)

    return run


@pytest.fixture
def resume() -> Callable[..., RunFolder]:
    """Return a function that resumes a folder."""

    def run(folder: Path, *, nodes: int = 3, tamper: Tamper | None = None) -> RunFolder:
        grid = InProcessGrid(TamperedApp(tamper), nodes=nodes)  # type: ignore[arg-type]
        return serve({"run.resume": str(folder)}, grid)

    return run


@pytest.fixture
def events() -> Callable[[RunFolder, str], list[Mapping[str, Any]]]:
    """Return a function that lists a run's events of one name."""
    return lambda folder, name: [e for e in read_events(folder) if e["event"] == name]
