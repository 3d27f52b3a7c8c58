from pathlib import Path

import pytest

from fedllm.settings import ModelSettings


@pytest.fixture(scope="session")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def tiny(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSettings:
    """Settings of tiny-llama, made once for all tests of the room."""
    monkeypatch.setenv("FEDLLM_HOME", str(shared_home))
    return ModelSettings(name="tiny-llama", dtype="float32")
