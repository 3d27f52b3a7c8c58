"""Start ``flwr run`` with all that an offline machine needs, and leave nothing running."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import tomli_w

from fedllm.errors import RunError
from fedllm.home import home
from fedllm.resources import app_dir
from fedllm.settings import Scalar


class Launch:
    """One ``flwr run`` in Flower's simulation engine, with a Flower home and ports of its own.

    Parameters
    ----------
    values : Mapping[str, Scalar]
        The run's flat settings.
    sites : int
        Simulated sites.
    parallel : int
        Sites at work at once, one core each.
    offline : bool
        Whether model and data are on this machine, so that no hub needs to be asked.

    Raises
    ------
    RunError
        If the Flower home cannot be made.
    """

    def __init__(self, values: Mapping[str, Scalar], *, sites: int, parallel: int, offline: bool) -> None:
        self._folder = home() / "flwr" / uuid.uuid4().hex[:8]
        try:
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise RunError(
                f"{self._folder}: cannot be made ({error.strerror}); set FEDLLM_HOME to a folder you may "
                "write to."
            ) from None
        self.log = self._folder / "flwr.log"
        settings = self._folder / "settings.toml"
        settings.write_text(tomli_w.dumps(dict(values)), encoding="utf-8")
        self._environment = _environment(self._folder, offline=offline)
        federation = (
            f"num-supernodes={sites} client-resources-num-cpus=1 init-args-num-cpus={parallel} "
            "init-args-log-to-driver=true"
        )
        command = ["run", str(app_dir()), "--stream", "-c", str(settings)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*_flwr(), *command, "--federation-config", federation],
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def running(self) -> bool:
        """Return whether ``flwr run`` still streams."""
        return self.process.poll() is None

    def finished_well(self) -> bool:
        """Return whether Flower says the run completed (``flwr run`` exits with 0 either way)."""
        done = subprocess.run(
            [*_flwr(), "list", "--format", "json"],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        start = done.stdout.find("{")
        if done.returncode != 0 or start < 0:
            return False
        runs = json.loads(done.stdout[start:]).get("runs", [])
        return bool(runs) and runs[0]["status"] == "finished:completed"

    def log_tail(self, lines: int = 15) -> str:
        """Return the last lines of Flower's log."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """Stop everything that was started under this Flower home."""
        ours = list(self._processes())
        for process in ours:
            _ignore_gone(process.terminate)
        _, alive = psutil.wait_procs(ours, timeout=2)
        for process in alive:
            _ignore_gone(process.kill)

    def close(self, run_folder: Path) -> None:
        """Stop, keep the log in the run folder, and remove the Flower home."""
        self.stop()
        if run_folder.is_dir():
            shutil.copy(self.log, run_folder / "flower.log")
            shutil.rmtree(self._folder, ignore_errors=True)

    def _processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                if process.environ().get("FLWR_HOME") == str(self._folder):
                    yield process
            except (psutil.Error, OSError):
                continue


@contextmanager
def launched(
    values: Mapping[str, Scalar], run_folder: Path, *, sites: int, parallel: int, offline: bool
) -> Iterator[Launch]:
    """Start a run and stop it however the block ends."""
    with _signals_end_it():
        launch = Launch(values, sites=sites, parallel=parallel, offline=offline)
        try:
            yield launch
        finally:
            launch.close(run_folder)


@contextmanager
def _signals_end_it() -> Iterator[None]:
    """Leave by an exception where a signal would end this process and let what it started train on."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    wanted = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _flwr() -> list[str]:
    return [sys.executable, "-m", "fedllm.cli.flower"]


def _environment(folder: Path, *, offline: bool) -> dict[str, str]:
    ports = _free_ports(2)
    local = "127.0.0.1,localhost"
    here = {
        "FLWR_HOME": str(folder),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(ports[0]),
        "FLWR_LOCAL_CONTROL_API_PORT": str(ports[1]),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": tempfile.gettempdir(),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        "NO_PROXY": ",".join(part for part in (os.environ.get("NO_PROXY", ""), local) if part),
        "FEDLLM_HOME": str(home()),
        # flower-superlink and its children must be those of this environment
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    if offline:
        here["HF_HUB_OFFLINE"] = "1"
    return os.environ | here


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


def _ignore_gone(action: object) -> None:
    try:
        action()  # type: ignore[operator]
    except psutil.NoSuchProcess:
        return
