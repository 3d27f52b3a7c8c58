from __future__ import annotations

import json
import platform
import subprocess

import pytest

from fedllm.config import Config
from fedllm.errors import RunError
from fedllm.runs import manifest as module
from fedllm.runs.events import append_event
from fedllm.runs.folder import load_config
from fedllm.runs.manifest import config_digest, read_manifest, versions, write_manifest


def test_manifest_names_versions_and_hashes_but_no_host_or_path(make_run) -> None:
    folder = make_run()
    assert read_manifest(folder) is None
    config = load_config(folder)
    write_manifest(folder, config=config, model={"name": "tiny"}, data={"a": "ff", "b": ""}, simulated=True)
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest["config_sha256"] == config_digest(config)
    assert manifest["data"] == {"a": "ff", "b": ""}
    assert manifest["seeds"] == {"run.seed": 42}
    assert set(manifest["versions"]) == {"python", *module.PACKAGES}
    assert set(manifest["platform"]) == {"system", "machine", "cpus"}
    text = folder.manifest_file.read_text()
    assert str(folder.path) not in text
    assert platform.node() not in json.loads(text)["platform"].values()


def test_a_resumed_run_names_the_versions_of_every_session(make_run) -> None:
    folder, now = make_run(), versions()
    append_event(
        folder, "run_started", run_id="r", sites=1, rounds=4, config={}, versions=now | {"torch": "1.0"}
    )
    append_event(folder, "run_resumed", round=2)
    append_event(folder, "run_resumed", round=3, versions=now)
    write_manifest(folder, config=load_config(folder), model={}, data={}, simulated=True)
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest["versions"] == now
    assert manifest["earlier_versions"] == {"from round 1": "torch 1.0", "from round 2": "not recorded"}


def test_digest_follows_the_settings() -> None:
    assert config_digest(Config()) == config_digest(Config().replace(train__lr=Config().train.lr))
    assert config_digest(Config()) != config_digest(Config().replace(train__lr=0.5))
    assert config_digest(Config()) != config_digest(Config().replace(data__path="own.csv"))


def test_one_recipe_in_two_folders_has_one_digest() -> None:
    one, other = Config().replace(run__dir="/runs/one"), Config().replace(run__dir="/runs/two")
    assert config_digest(one) == config_digest(other) == config_digest(Config())
    assert config_digest(one.replace(run__resume="/runs/one")) == config_digest(one)


def test_a_package_that_is_not_there_is_empty(monkeypatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("fedllm", "no-such-package"))
    assert versions()["no-such-package"] == ""


def test_without_git_there_is_no_commit(monkeypatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert module._commit() == ""


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\udcff"])
def test_damaged_manifest_is_named(make_run, text: str) -> None:
    folder = make_run()
    folder.manifest_file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RunError, match=r"manifest\.json: not a"):
        read_manifest(folder)
