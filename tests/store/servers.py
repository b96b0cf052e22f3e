"""Servers that the tests start on the loopback, and stop."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Server:
    """A process that listens on a port of the loopback.

    Attributes:
        command: What starts it.
        port: Where it listens.
        log: Where its output goes.
    """

    command: list[str]
    port: int
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self) -> None:
        """Start it, and wait until it listens."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=self.log.parent)
        until = time.monotonic() + 30
        while time.monotonic() < until and self.process.poll() is None:
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError(f"{self.command[0]} did not start: {self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        """Let it go away, as a machine does that loses its power."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def freeze(self) -> None:
        """Let it keep its connections and answer nothing any more."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def running(command: Callable[[int], list[str]], folder: Path) -> Iterator[Server]:
    """A server on a free port; `command` says how it is started."""
    port = free_port()
    server = Server(command(port), port, folder / "server.log")
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def redis_server(folder: Path) -> Iterator[Server]:
    """A Redis or Valkey server that keeps nothing on disk; without one, the test is skipped."""
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        pytest.skip("needs redis-server or valkey-server; on Debian: apt-get install redis-server")
    options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with running(lambda port: [binary, "--port", str(port), *options], folder) as server:
        yield server


@contextmanager
def s3_server(folder: Path) -> Iterator[Server]:
    """An S3 server; without one, the test is skipped."""
    binary = shutil.which("moto_server") or str(Path(sys.executable).parent / "moto_server")
    if not Path(binary).exists():
        pytest.skip("needs moto_server; pip install 'moto[s3,server]' (in any environment, with moto_server on PATH)")
    with running(lambda port: [binary, "-H", "127.0.0.1", "-p", str(port)], folder) as server:
        yield server


@contextmanager
def mooncake_master(folder: Path) -> Iterator[Server]:
    """Mooncake's master; without Mooncake, the test is skipped."""
    binary = Path(sys.executable).parent / "mooncake_master"
    if not binary.exists():
        pytest.skip("needs Mooncake: pip install mooncake-transfer-engine-non-cuda, apt-get install libibverbs1")
    metrics = str(free_port())
    with running(lambda port: [str(binary), f"--rpc_port={port}", f"--metrics_port={metrics}"], folder) as server:
        yield server
