"""The folder of one run, and how files get into it whole or not at all.

Layout: ``config.toml``, ``events.jsonl``, ``metrics.csv``, ``manifest.json``, ``report.html``,
``adapter/``, ``checkpoints/round-0003.safetensors`` and, for simulated sites, ``sites/<name>/``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from safetensors import SafetensorError

from fedllm.config import Config, read_toml
from fedllm.errors import ConfigError, RunError
from fedllm.home import home


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run.

    Attributes
    ----------
    path : Path
        The run folder itself.
    """

    path: Path

    @property
    def config_file(self) -> Path:
        """Return the file with all settings of the run, defaults included."""
        return self.path / "config.toml"

    @property
    def events_file(self) -> Path:
        """Return the file with one JSON line an event."""
        return self.path / "events.jsonl"

    @property
    def metrics_file(self) -> Path:
        """Return the table with one row a round and site."""
        return self.path / "metrics.csv"

    @property
    def manifest_file(self) -> Path:
        """Return the file with versions, seeds and hashes."""
        return self.path / "manifest.json"

    @property
    def report_file(self) -> Path:
        """Return the page for people."""
        return self.path / "report.html"

    @property
    def adapter_dir(self) -> Path:
        """Return the folder of the exported PEFT adapter."""
        return self.path / "adapter"

    @property
    def checkpoints_dir(self) -> Path:
        """Return the folder of the server's checkpoints."""
        return self.path / "checkpoints"

    def site_dir(self, name: str) -> Path:
        """Return the folder of a simulated site; names are quoted so that none leaves ``sites/``.

        Raises
        ------
        RunError
            If the name is empty.
        """
        if not name:
            raise RunError(f"{self.path}: a site has an empty name; give every site a name.")
        return self.path / "sites" / quote(name, safe=" ").replace(".", "%2E")


def new_run_path() -> Path:
    """Return a folder under ``$FEDLLM_HOME/runs`` that no run has used."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return (home() / "runs" / f"{stamp}-{secrets.token_hex(2)}").absolute()


def create_run(config: Config) -> RunFolder:
    """Make the folder of a new run and write its settings.

    Parameters
    ----------
    config : Config
        The settings. An empty ``run.dir`` means a new folder under ``$FEDLLM_HOME/runs``.

    Raises
    ------
    RunError
        If the folder exists with something in it, or cannot be made or written.
    """
    path = Path(config.run.dir).expanduser().absolute() if config.run.dir else new_run_path()
    try:
        path.mkdir(parents=True, exist_ok=True)
        taken = any(path.iterdir())
    except OSError as error:
        raise write_error(path, error) from None
    if taken:
        raise RunError(f"{path} exists; choose another run.dir or continue it with run.resume={path}.")
    folder = RunFolder(path)
    atomic_write(folder.config_file, config.to_toml().encode())
    return folder


def open_run(path: str | Path) -> RunFolder:
    """Return the run in an existing folder.

    Raises
    ------
    RunError
        If it is no run folder, naming the missing folder or file.
    """
    folder = RunFolder(Path(path).expanduser().absolute())
    if not folder.path.is_dir():
        raise RunError(f"{folder.path}: no such folder; give the folder of a run.")
    if not folder.config_file.is_file():
        raise RunError(f"{folder.path} is not a run folder: {folder.config_file.name} is missing.")
    return folder


def load_config(folder: RunFolder) -> Config:
    """Read the settings a run was started with.

    Raises
    ------
    RunError
        If they cannot be read, naming the file and the first wrong key.
    """
    try:
        values = read_toml(folder.config_file)
    except ConfigError as error:
        raise RunError(str(error)) from None
    try:
        return Config.from_flat(values)
    except ConfigError as error:
        raise RunError(f"{folder.config_file}: {error}") from None


@contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Keep a run to this process; the lock ends with the process, however that ends.

    Raises
    ------
    RunError
        If another process works on the run, or the folder cannot be written.
    """
    path = folder.path / ".lock"
    try:
        file = path.open("a")
    except OSError as error:
        raise write_error(path, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder.path}: another process works on this run; wait for it.") from None
        except OSError as error:
            raise write_error(path, error) from None
        yield


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that after a crash either the old or the new content is there, whole.

    Raises
    ------
    RunError
        With the plain reason (no space left on device, read-only file system, ...). The old file
        is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_durably(temporary, data)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise write_error(path, error) from None


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Give a folder to write into, and make it the target once all is in it; else nothing is left.

    Parameters
    ----------
    target : Path
        A folder that is empty or not there.

    Raises
    ------
    RunError
        If it cannot be made or written.
    """
    # what exists may be a mount point, which nothing can be renamed to
    exists = target.is_dir()
    temporary = (target if exists else target.parent) / f".{target.name}.{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if exists:
            for path in temporary.iterdir():
                path.rename(target / path.name)
        else:
            temporary.rename(target)
    except (OSError, SafetensorError) as error:
        # a full disk is an error of its own to safetensors
        said = error.strerror if isinstance(error, OSError) else str(error)
        reason = (said or "input/output error").lower()
        raise RunError(
            f"{target}: cannot be written: {reason}. Free some space or choose another folder."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_error(path: Path, error: OSError) -> RunError:
    """Say in plain words why a path cannot be written."""
    reason = (error.strerror or "input/output error").lower()
    return RunError(
        f"{path}: cannot be written: {reason}. Free some space or choose a run.dir you may write to."
    )


def _write_durably(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
