"""A model from a hub: a small server that speaks as much of the protocol as the client asks for."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub.constants
import pytest

from avp_agents.models import hub
from avp_agents.models.hub import HubSource, download_any
from avp_agents.models.manifest import FileRecord
from avp_agents.models.source import SourceFailedError

REVISION = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "model.safetensors": b"weights"}
UNWANTED = {"pytorch_model.bin": b"pickled"}
SOURCE = HubSource(
    "someone/tiny", REVISION, {n: FileRecord(len(c), hashlib.sha256(c).hexdigest()) for n, c in FILES.items()}
)


class _Hub(BaseHTTPRequestHandler):
    """Serves `FILES` and the model's info."""

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def _answer(self, *, with_content: bool) -> None:
        name = self.path.removeprefix(f"/someone/tiny/resolve/{REVISION}/")
        api = self.path.removeprefix("/api/models/someone/tiny/")
        if api.startswith(("revision/main", f"revision/{REVISION}")):
            siblings = [{"rfilename": name} for name in FILES | UNWANTED]
            content = json.dumps({"id": "someone/tiny", "sha": REVISION, "siblings": siblings}).encode()
        elif api.startswith(f"tree/{REVISION}"):
            entries = [
                {"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in (FILES | UNWANTED).items()
            ]
            content = json.dumps(entries).encode()
        elif name in FILES:
            content = FILES[name]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def use_endpoint(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """What HF_ENDPOINT would have done before the client was imported."""
    constants, endpoint = huggingface_hub.constants, f"http://127.0.0.1:{port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """The hub."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        use_endpoint(monkeypatch, server.server_port)
        thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


@pytest.mark.usefixtures("server")
def test_the_files_arrive(target: Path) -> None:
    SOURCE.fetch_into(target, None)

    assert {path.name: path.read_bytes() for path in target.iterdir()} == FILES


def test_what_the_hubs_cache_holds_is_not_asked_for(
    server: ThreadingHTTPServer, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SOURCE.fetch_into(target, None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    again = tmp_path / "again"
    again.mkdir()
    SOURCE.fetch_into(again, None)

    assert {path.name: path.read_bytes() for path in again.iterdir()} == FILES


@pytest.mark.usefixtures("server")
def test_an_altered_file_is_refused(target: Path) -> None:
    forged = HubSource("someone/tiny", REVISION, {**SOURCE.files, "model.safetensors": FileRecord(7, "0" * 64)})

    with pytest.raises(SourceFailedError, match=r"model\.safetensors has SHA-256"):
        forged.fetch_into(target, None)


@pytest.mark.usefixtures("server")
def test_an_unknown_repository_is_named(target: Path) -> None:
    with pytest.raises(SourceFailedError, match=r"404.*someone/else"):
        HubSource("someone/else", REVISION, SOURCE.files).fetch_into(target, None)


@pytest.mark.usefixtures("server")
def test_any_other_model_arrives_without_pickled_weights() -> None:
    folder = download_any("someone/tiny")

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


@pytest.mark.usefixtures("server")
def test_any_other_model_may_not_exist() -> None:
    with pytest.raises(SourceFailedError, match="404"):
        download_any("someone/else")


def test_offline_mode_asks_nobody(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(SourceFailedError, match="offline"):
        SOURCE.fetch_into(target, None)


def test_a_hub_that_never_answers_costs_little_time(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SECONDS_TO_ANSWER", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_endpoint(monkeypatch, silent.getsockname()[1])
        begun = time.monotonic()
        with pytest.raises(SourceFailedError, match="Timeout"):
            SOURCE.fetch_into(target, None)
    assert time.monotonic() - begun < 5


def test_a_refused_connection_is_named(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        use_endpoint(monkeypatch, gone.getsockname()[1])
    with pytest.raises(SourceFailedError, match="ConnectError"):
        SOURCE.fetch_into(target, None)
