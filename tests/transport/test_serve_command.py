"""``avp-agents serve`` as people start it, and what it refuses to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from serving import free_port, serving
from tiny_models import TinyModels
from typer.testing import CliRunner

from avp_agents import LatentEngine
from avp_agents.cli import app
from avp_agents.errors import ConfigurationError, TransportError
from avp_agents.transport import RemoteEngine
from avp_agents.transport.server import Binding

DATA = Path(__file__).parent / "data"


def run(*arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of the command in this process."""
    result = CliRunner().invoke(app, list(arguments), env=environment)
    return result.exit_code, result.output


def test_a_server_from_the_command_line(models: TinyModels, tmp_path: Path) -> None:
    """A token is made, the server started, used, and stopped by a signal."""
    tokens = tmp_path / "tokens"
    code, token = run("add-token", str(tokens), "team-a")
    assert code == 0
    port = free_port()
    command = [sys.executable, "-c", "from avp_agents.cli import app; app()", "serve", models.path("llama")]
    options = ["--port", str(port), "--tokens", str(tokens), "--name", "tiny", "--dtype", "float32"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        wait_until_up(f"http://127.0.0.1:{port}", process)
        with RemoteEngine(f"http://127.0.0.1:{port}", token=token.strip()) as remote:
            thought = remote.think("the lazy dog", steps=2)
            assert remote.generate("and", context=thought, max_tokens=2).handoff.mode == "kv"
            assert (remote.model_path, remote.store.namespace.name) == ("tiny", "team-a")
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(30)
    assert code == 0, process.stderr.read() if process.stderr else ""


def wait_until_up(url: str, process: subprocess.Popen[bytes]) -> None:
    latest = time.monotonic() + 60
    while time.monotonic() < latest and process.poll() is None:
        try:
            httpx.get(f"{url}/health", trust_env=False)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(process.stderr.read() if process.stderr else "the server did not start")


def test_tls(engine: LatentEngine) -> None:
    """With a certificate that the client is told to trust, over HTTP/2 and HTTP/1.1; not without."""
    with serving(engine, certificate=DATA / "localhost.pem", private_key=DATA / "localhost.key") as url:
        assert url.startswith("https://")
        for http2 in (True, False):
            with RemoteEngine(url, token="token-of-one", verify=str(DATA / "localhost.pem"), http2=http2) as remote:
                assert remote.count_tokens("x") > 0
        with RemoteEngine(url, token="token-of-one") as distrusting, pytest.raises(TransportError):
            distrusting.count_tokens("x")


def test_who_may_use_it_must_be_said(tmp_path: Path) -> None:
    """In one way, and without tokens on a loopback address only."""
    missing, conflicting = run("serve"), run("serve", "--without-token", AVP_SERVE_TOKEN="t")
    assert (missing[0], conflicting[0]) == (1, 1)
    assert "add-token" in missing[1]
    code, output = run("serve", "--host", "0.0.0.0", "--without-token")
    assert code == 1
    assert "loopback" in output
    code, output = run("serve", "--tokens", str(tmp_path / "missing"))
    assert code == 1
    assert "missing" in output


def test_a_certificate_needs_its_key(tmp_path: Path) -> None:
    """And both need to be there."""
    with pytest.raises(ConfigurationError, match="both"):
        Binding(certificate=DATA / "localhost.pem")
    with pytest.raises(ConfigurationError, match="no file"):
        Binding(certificate=DATA / "localhost.pem", private_key=tmp_path / "none")


def test_a_port_that_is_taken(url: str, engine: LatentEngine) -> None:
    """Says so."""
    import asyncio

    from serving import engine_for

    from avp_agents.transport.server import Access, ServerLimits, create_app, serve

    served = create_app(engine_for(engine), model="tiny", access=Access(None, loopback=True))
    with pytest.raises(ConfigurationError, match="Choose another"):
        asyncio.run(serve(served, Binding(host="203.0.113.1"), ServerLimits(), stopped=asyncio.Event()))
