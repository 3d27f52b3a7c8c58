"""Real Flower processes on loopback, with their own home and ports, stopped at the end."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_certificates(folder: Path) -> None:
    """Write ca.crt, server.pem and server.key for 127.0.0.1."""
    now = datetime.now(UTC)

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def builder(subject: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("test CA"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
        )

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = builder("test CA", ca_key).add_extension(x509.BasicConstraints(True, None), True)
    names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
    server = builder("server", key).add_extension(x509.SubjectAlternativeName(names), False)
    pem = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(ca.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    (folder / "server.pem").write_bytes(server.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    (folder / "server.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def write_node_key(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
    )
    path.with_suffix(".pub").write_bytes(
        key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    )


class Federation:
    """A SuperLink and SuperNodes with TLS and node keys."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {
            "FLWR_HOME": str(folder / "flwr"),
            "FEDLLM_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        write_certificates(folder)
        (folder / "flwr").mkdir()
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "{self.address}"\n'
            f'root-certificates = "{folder / "ca.crt"}"\n'
        )

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{name}.log").open("ab")
        process = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            env=self.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            start_new_session=True,
        )
        self.processes[name] = process
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def flwr(self, *arguments: str) -> str:
        """Run a flwr command to its end and return what it printed."""
        done = subprocess.run(
            [str(BIN / "flwr"), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start_superlink(self) -> None:
        host, port = self.address.split(":")
        files = {
            "--ssl-ca-certfile": "ca.crt",
            "--ssl-certfile": "server.pem",
            "--ssl-keyfile": "server.key",
            "--database": "state.db",
        }
        self.start(
            "superlink",
            "flower-superlink",
            "--host",
            host,
            "--port",
            port,
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            *[word for flag, file in files.items() for word in (flag, str(self.folder / file))],
        )
        wait_for(lambda: _listens(self.address), 60, "the SuperLink does not listen")

    def start_supernode(self, name: str, policy: Path) -> None:
        key = self.folder / f"{name}.key"
        if not key.exists():
            write_node_key(key)
            self.flwr("supernode", "register", str(key.with_suffix(".pub")))
        self.start(
            name,
            "flower-supernode",
            "--superlink",
            self.address,
            "--root-certificates",
            str(self.folder / "ca.crt"),
            "--auth-supernode-private-key",
            str(key),
            "--port",
            str(free_port()),
            "--node-config",
            f'policy="{policy}"',
        )

    def run(self, settings: Path) -> int:
        """Start a run and return its id."""
        out = self.flwr("run", str(ROOT / "apps" / "finetune"), "--format", "json", "-c", str(settings))
        return int(json.loads(out[out.index("{") :])["run-id"])

    def status(self, run: int) -> str:
        out = self.flwr("list", "--run-id", str(run), "--format", "json")
        return str(json.loads(out[out.index("{") :])["runs"][0]["status"])

    def kill(self, name: str) -> None:
        """Kill a process and its children as a power cut would."""
        parent = psutil.Process(self.processes[name].pid)
        for process in [*parent.children(recursive=True), parent]:
            process.kill()
        self.processes.pop(name).wait(timeout=30)

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=15)


def _listens(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def wait_for(condition: Callable[[], object], seconds: float, message: str) -> None:
    """Poll until a condition holds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.3)
    raise AssertionError(message)


@pytest.fixture
def until() -> Callable[[Callable[[], object], float, str], None]:
    """Return the polling helper."""
    return wait_for


@pytest.fixture
def federation(tmp_path: Path, fedllm_home: Path) -> Iterator[Federation]:
    """Give a fresh SuperLink with TLS and node authentication."""
    found = Federation(tmp_path, fedllm_home)
    try:
        found.start_superlink()
        yield found
    finally:
        found.stop()
