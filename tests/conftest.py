"""What all tests share: a quiet, offline, single-threaded torch and a home of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session", autouse=True)
def fedllm_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give the whole session one cache folder, apart from the user's."""
    home = tmp_path_factory.mktemp("home")
    before = os.environ.get("FEDLLM_HOME")
    os.environ["FEDLLM_HOME"] = str(home)
    yield home
    if before is None:
        del os.environ["FEDLLM_HOME"]
    else:
        os.environ["FEDLLM_HOME"] = before
