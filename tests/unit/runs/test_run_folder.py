from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fedllm.config import Config
from fedllm.errors import RunError
from fedllm.home import home
from fedllm.runs.folder import RunFolder, atomic_write, create_run, load_config, open_run


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.setenv("FEDLLM_HOME", "")
    assert home() == Path.home() / ".cache" / "fedllm"


def test_settings_survive(make_run) -> None:
    folder = make_run(train__lr=0.25)
    assert load_config(open_run(folder.path)).train.lr == 0.25


def test_empty_dir_makes_distinct_folders_under_home(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path))
    first, second = create_run(Config()), create_run(Config())
    assert first.path != second.path
    assert first.path.parent == second.path.parent == tmp_path / "runs"


def test_existing_run_is_refused_and_untouched(make_run) -> None:
    folder = make_run()
    before = folder.config_file.read_bytes()
    with pytest.raises(RunError, match=r"exists; choose another run\.dir or continue it with run\.resume="):
        make_run(train__lr=0.5)
    assert folder.config_file.read_bytes() == before


def test_existing_empty_folder_is_taken(make_run, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    assert make_run().config_file.is_file()


def test_a_file_in_the_way_is_named(make_run, tmp_path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="run: cannot be written: file exists"):
        make_run()


def test_open_says_what_is_missing(tmp_path) -> None:
    with pytest.raises(RunError, match=r"config\.toml is missing"):
        open_run(tmp_path)
    with pytest.raises(RunError, match="no such folder"):
        open_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"), [("[train", "not valid TOML"), ("[train]\nlearning = 1\n", "unknown setting")]
)
def test_damaged_settings_name_the_file(make_run, text: str, message: str) -> None:
    folder = make_run()
    folder.config_file.write_text(text)
    with pytest.raises(RunError, match=message) as caught:
        load_config(folder)
    assert str(folder.config_file) in str(caught.value)


@pytest.mark.parametrize("name", ["../../etc", "..", ".", "/etc/passwd", "a/b", "Klinik Süd", "a\x00b"])
def test_no_site_name_leaves_the_run(tmp_path, name: str) -> None:
    sites = tmp_path / "sites"
    site = RunFolder(tmp_path).site_dir(name)
    assert site.parent == sites
    site.mkdir(parents=True)
    assert site.resolve().parent == sites.resolve()


def test_site_folders_are_distinct_and_never_nameless(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    assert len({folder.site_dir(name) for name in ("a/b", "a%2Fb", "a.b", "a b")}) == 4
    with pytest.raises(RunError, match="empty name"):
        folder.site_dir("")


@pytest.mark.parametrize("step", ["write", "fsync", "replace", "open"])
def test_no_space_keeps_the_old_file(monkeypatch, tmp_path, step: str) -> None:
    file = tmp_path / "metrics.csv"
    atomic_write(file, b"old")

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(RunError, match=r"metrics\.csv: cannot be written: no space left on device\."):
            atomic_write(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_short_writes_are_completed(monkeypatch, tmp_path) -> None:
    whole = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: whole(descriptor, data[:3]))
    atomic_write(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"
