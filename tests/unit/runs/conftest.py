"""A run folder in a temporary directory, and the events of a small run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.config import Config
from fedllm.runs.checkpoints import Checkpoint
from fedllm.runs.events import append_event
from fedllm.runs.folder import RunFolder, create_run
from fedllm.settings import Scalar

MakeRun = Callable[..., RunFolder]
Reply = Callable[..., None]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(name: str = "run", **settings: Scalar) -> RunFolder:
        return create_run(Config().replace(run__dir=str(tmp_path / name), **settings))

    return make


@pytest.fixture
def reply() -> Reply:
    """Append a site's reply; every field has a default."""

    def append(folder: RunFolder, round: int, site: str, **changed: object) -> None:
        fields: dict[str, object] = {
            "accepted": True,
            "reason": "",
            "bytes_up": 100,
            "bytes_down": 200,
            "epsilon": None,
            "loss": 1.0,
            "accuracy": 0.5,
            "macro_f1": 0.25,
            "seconds": 2.0,
        }
        append_event(folder, "site_reply", round=round, site=site, **(fields | changed))

    return append


@pytest.fixture
def make_checkpoint() -> Callable[[int], Checkpoint]:
    def make(round: int) -> Checkpoint:
        # The names are not in alphabetical order: the order must survive.
        spec = AdapterSpec(
            method="fed-sb",
            rank=2,
            scale=1.0,
            shapes={"z": (3, 2), "a": (2, 4)},
            basis="seeded:00",
            base="ff",
        )
        values = np.arange(4, dtype=np.float32).reshape(2, 2) + round
        return Checkpoint(round, AdapterState(spec, {"z.R": values, "a.R": -values}), {"moment": "0.5"})

    return make
