"""Small federations in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from torch import Tensor

import fedllm
from fedllm.adapters.export import load_state
from fedllm.adapters.method import write_state
from fedllm.config import Config
from fedllm.data.records import Example
from fedllm.data.sites import simulated_site
from fedllm.federation.client import client_app
from fedllm.federation.inprocess import InProcessGrid
from fedllm.federation.server import serve
from fedllm.runs.events import read_events
from fedllm.runs.folder import RunFolder, load_config
from fedllm.training.forward import label_scores
from fedllm.training.session import open_session, tokenise
from fedllm.training.spec import basis_from_seed

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


@pytest.fixture
def scored() -> Callable[..., tuple[Example, tuple[str, ...], Tensor]]:
    """Return what scores a record as a finished run's own evaluation does.

    It takes the run's folder and the record's text with what else it has (default: the first site's first
    held-out record), and returns the record, the labels, and log p(label | record).
    """

    def score(folder: RunFolder, text: str = "", **more: Any) -> tuple[Example, tuple[str, ...], Tensor]:
        config = load_config(folder)
        state, _ = load_state(folder.adapter_dir)
        basis = basis_from_seed(state.spec)
        assert basis is not None
        session = open_session(config, state.spec, basis)
        write_state(session.method, session.model, state)
        site = simulated_site(config.data, sites=config.federation.sites, seed=config.run.seed, index=0)
        record = Example(text=text, label=site.labels[0], unit="", **more) if text else site.heldout[0]
        tokens = tokenise(replace(site, heldout=(record,)), config)
        return record, tokens.labels, label_scores(session, tokens.heldout, tokens.label_tokens)[0]

    return score
