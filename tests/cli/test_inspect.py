"""``avp-agents inspect``: files and URLs."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from avp_agents.cli import app
from avp_agents.protocol import encode_context
from avp_agents.store import Namespace
from avp_agents.testing.contexts import make_context
from avp_agents.transport.wire import frame_key


@pytest.fixture(scope="module")
def frame() -> bytes:
    return bytes(encode_context(make_context(tokens=500), key=Namespace.load("team").key).assemble())


@pytest.fixture
def file(frame: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "context.avp"
    path.write_bytes(frame)
    return path


class _Handler(BaseHTTPRequestHandler):
    """Serves a frame: with ranges at /frame, without at /whole, behind a token at /private."""

    frame = b""
    served: bytes | None = None

    def do_GET(self) -> None:
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("location", "/frame")
            self.end_headers()
            return
        if self.path == "/private" and self.headers.get("authorization") != "Bearer secret":
            self.send_response(401)
            self.end_headers()
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        start = int(asked[1]) if asked and self.path != "/whole" else 0
        frame = self.served or self.frame
        body = frame[start:]
        self.send_response(200 if self.path == "/whole" else 206)
        if self.path != "/whole":
            self.send_header("content-range", f"bytes {start}-{len(frame) - 1}/{len(frame)}")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            self.close_connection = True  # the client hung up, having what it wanted

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean."""


@pytest.fixture(scope="module")
def url(frame: bytes) -> Iterator[str]:
    handler = type("Handler", (_Handler,), {"frame": frame})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def run(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def test_a_file_is_described(file: Path) -> None:
    said = run(file)

    assert "context, frame version 1" in said
    assert "504, of which 504 have keys and values" in said
    assert "not checked" in said
    assert "2×504×8" in said


@pytest.mark.parametrize("where", ["file", "/frame"])
def test_json_has_everything(file: Path, url: str, frame: bytes, where: str) -> None:
    found = json.loads(run(file if where == "file" else url + where, "--json"))

    assert found["bytes"] == len(frame)
    assert found["bytes_read"] < len(frame) / 10
    assert found["sections"][5]["shape"] == [2, 504, 8]
    assert found["authentic"] is None


def test_checks_are_made_where_they_are_asked_for(file: Path, url: str) -> None:
    for where in (str(file), url + "/frame"):
        found = json.loads(run(where, "--json", "--verify", "--namespace", "team"))
        assert (found["authentic"], found["verified"]) == (True, True)


def test_another_namespace_is_told_apart(file: Path) -> None:
    assert "DOES NOT MATCH" in run(file, "--namespace", "others", code=1)


def test_a_url_may_want_a_token(url: str) -> None:
    assert "--token" in run(url + "/private", code=1)
    found = json.loads(run(url + "/private", "--token", "secret", "--namespace", "team", "--json"))
    assert found["authentic"] is True


def test_frames_of_a_server_are_checked_with_the_token(url: str) -> None:
    assert "DOES NOT MATCH" in run(url + "/private", "--token", "secret", code=1)
    with pytest.MonkeyPatch.context() as patch:
        served = encode_context(make_context(tokens=500), key=frame_key("secret"))
        patch.setattr(_Handler, "served", bytes(served.assemble()))
        assert "matches; it covers" in run(url + "/private", "--token", "secret", "--verify")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("/whole", "does not answer range requests"),
        ("/elsewhere", "redirects are not followed"),
    ],
)
def test_urls_that_cannot_be_inspected(url: str, where: str, message: str) -> None:
    assert message in " ".join(run(url + where, code=1).split())


def test_only_files_and_http_are_read(tmp_path: Path) -> None:
    for where in ("file:///etc/passwd", "ftp://host/frame", "http://"):
        assert "Only http and https" in run(where, code=1)
    assert "There is no file" in run(tmp_path / "missing", code=1)
    (tmp_path / "noise").write_bytes(b"noise" * 100)
    assert "not a frame" in run(tmp_path / "noise", code=1)


def test_large_frames_are_refused_by_size(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[24:32] = (5 << 20).to_bytes(8, "little")
    file.write_bytes(data)
    assert "above the limit" in run(file, "--max-mib", "1", code=1)
