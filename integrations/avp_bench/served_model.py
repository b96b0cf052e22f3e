"""A model behind `avp-agents serve`, in a process of its own, as benchmarks of two processes need it."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from avp_agents.errors import ConfigurationError

START_SECONDS = 600.0
_STOP_SECONDS = 60.0
_TOKEN_VARIABLE = "AVP_SERVE_TOKEN"
_COMMAND = "from avp_agents.cli import app; app()"


@dataclass(frozen=True)
class ModelServer:
    """A server that runs.

    Attributes:
        url: Where it listens, on the loopback.
        token: What it lets in.
        pid: Its process.
    """

    url: str
    token: str = field(repr=False)
    pid: int


@contextmanager
def served_model(folder: str, *options: str) -> Iterator[ModelServer]:
    """Serve a model while this is open. What the server stores lies in a temporary folder.

    Args:
        folder: Of the model.
        options: Further ones of `avp-agents serve`.

    Raises:
        ConfigurationError: The server does not start.
    """
    with tempfile.TemporaryDirectory() as home:
        port, token = _free_port(), secrets.token_urlsafe(32)
        url, log = f"http://127.0.0.1:{port}", Path(home, "log")
        own = {_TOKEN_VARIABLE: token, "XDG_CACHE_HOME": home, "XDG_CONFIG_HOME": home}
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, "serve", folder, "--port", str(port), *options],
                stdout=file, stderr=file, env={**os.environ, **own},
            )  # fmt: skip
        try:
            _wait_until_up(url, process, log)
            yield ModelServer(url, token, process.pid)
        finally:
            _stop(process)


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    latest = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < latest:
        try:
            httpx.get(f"{url}/health", trust_env=False)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise ConfigurationError(f"avp-agents serve did not start: {log.read_text(errors='replace').strip()[-500:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
