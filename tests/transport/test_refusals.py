"""What a server refuses, and that nobody else notices."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from serving import serving, token

from avp_agents import LatentEngine
from avp_agents.errors import (
    AuthenticationError,
    ConfigurationError,
    ContextLostError,
    LimitExceededError,
    StoreFullError,
)
from avp_agents.transport import RemoteEngine
from avp_agents.transport.problems import Refusal
from avp_agents.transport.server import Access, ServerLimits, TokenFile
from avp_agents.transport.server.access import OneToken, add_token
from avp_agents.transport.server.limits import Throttle

API = "/avp/v1"
IMPATIENT = ServerLimits(
    read_seconds=0.5, write_seconds=0.5, body_bytes=10_000, upload_bytes=100_000, uploads=2, upload_seconds=0.6,
    concurrency=2, contexts=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def impatient(engine: LatentEngine) -> Iterator[str]:
    """A server with small limits."""
    with serving(engine, limits=IMPATIENT) as url:
        yield url


@contextmanager
def raw_connection(url: str, text: str) -> Iterator[socket.socket]:
    """A connection on which `text` was sent."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(text.encode())
        yield connection


def others_are_served(url: str) -> bool:
    """Whether another client gets its answer within two seconds."""
    return httpx.get(f"{url}/v1/models", headers=token("two"), timeout=2, trust_env=False).is_success


def error_of(response: httpx.Response) -> tuple[int, str]:
    """Status and code of an error in OpenAI's form."""
    error = response.json()["error"]
    assert error["message"]
    assert error["type"]
    return response.status_code, error["code"]


def test_who_may_ask(url: str) -> None:
    """A token that is known, from this machine's own pages; everybody may ask for the health."""
    cases = [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Basic token-of-one"}, 401),
        (token("one") | {"host": "evil.example"}, 403),
        (token("one") | {"origin": "https://evil.example"}, 403),
        (token("one") | {"host": "localhost:1", "origin": "http://localhost:3000"}, 200),
        (token("one"), 200),
    ]
    for headers, status in cases:
        assert httpx.get(f"{url}/v1/models", headers=headers, trust_env=False).status_code == status
    assert error_of(httpx.get(f"{url}/metrics", trust_env=False)) == (401, "AuthenticationError")
    assert httpx.get(f"{url}/health", trust_env=False).json() == {"status": "ok"}


def test_namespaces_see_nothing_of_each_other(url: str) -> None:
    """Not by a handle, not by a name of a request, not by what is cached."""
    with RemoteEngine(url, token="token-of-one") as one, RemoteEngine(url, token="token-of-two") as two:
        prompt = "the namespaces of tenants are apart from each other"
        handle = one.store.put(one.think(prompt, steps=2))
        with pytest.raises(ContextLostError):
            two.resolve(handle)
        with pytest.raises(ContextLostError):
            two.fetch(handle)
        assert not two.store.delete(handle)
        assert one.store.contains(handle)
        assert two.generate(prompt, max_tokens=1).usage.positions_reused == 0
        assert one.generate(prompt, max_tokens=1).usage.positions_reused > 0
        assert one.store.stats().contexts > two.store.stats().contexts

        upload = one.connection.ask("POST", f"{API}/uploads", {"bytes": 10})["upload"]
        assert error_of(httpx.get(f"{url}{API}/uploads/{upload}", headers=token("two"), trust_env=False))[0] == 404
        one.connection.ask("DELETE", f"{API}/uploads/{upload}")


def test_paths_and_methods(url: str) -> None:
    """Unknown ones are errors in the same form."""
    assert httpx.get(f"{url}/nothing", headers=token("one"), trust_env=False).json()["error"]["type"]
    assert httpx.get(f"{url}{API}/think", headers=token("one"), trust_env=False).status_code == 405
    lost = httpx.get(f"{url}{API}/contexts/avp:1:{'0' * 32}", headers=token("one"), trust_env=False)
    assert error_of(lost) == (404, "ContextLostError")
    for reference in ("..%2f..%2fetc%2fpasswd", "avp:1:xyz"):
        malformed = httpx.get(f"{url}{API}/contexts/{reference}", headers=token("one"), trust_env=False)
        assert malformed.status_code in (400, 404)


def test_bodies_that_are_too_large(impatient: str) -> None:
    """One that announces its length is refused before it is read; one in chunks when it passes the limit."""
    headers = token("one")
    announced = httpx.post(f"{impatient}{API}/think", headers=headers, content=b"x" * 20_000, trust_env=False)
    assert error_of(announced) == (413, "LimitExceededError")
    pieces = (b"x" * 4000 for _ in range(5))
    assert httpx.post(f"{impatient}{API}/think", headers=headers, content=pieces, trust_env=False).status_code == 413
    with RemoteEngine(impatient, token="token-of-one") as remote, pytest.raises(LimitExceededError):
        remote.connection.ask("POST", f"{API}/uploads", {"bytes": 100_001})


def test_slow_clients_time_out(impatient: str) -> None:
    """With the header, with the body, a byte at a time; meanwhile others are served."""
    started = time.monotonic()
    with raw_connection(impatient, "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n") as slow_header:
        assert others_are_served(impatient)
        assert slow_header.recv(100) == b"", "the connection is closed"

    post = (
        f"POST {API}/think HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer token-of-one\r\n"
        "Content-Length: 99\r\n\r\n"
    )
    with raw_connection(impatient, post + '{"prompt"') as half_open:
        assert others_are_served(impatient)
        assert b" 408 " in half_open.recv(1000)
    with raw_connection(impatient, post) as dripping:
        answer = b""
        for byte in b'{"prompt": "x"':
            dripping.sendall(bytes([byte]))
            dripping.settimeout(0.2)
            try:
                answer = dripping.recv(1000)
                break
            except TimeoutError:
                continue
        assert b" 408 " in answer
    assert time.monotonic() - started < 8


def test_silent_connections_shut_nobody_out(impatient: str) -> None:
    """Some hundreds of connections on which nothing is ever sent."""
    host, port = impatient.removeprefix("http://").split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(300)]
    assert others_are_served(impatient)
    for connection in silent:
        connection.close()


def test_a_client_that_takes_nothing(impatient: str, engine: LatentEngine) -> None:
    """Its answer is given up when the buffers are full; the engine goes on for others."""
    body = json.dumps({"prompt": "x", "options": {"max_tokens": 900, "min_tokens": 900, "logprobs": 50}})
    post = (
        f"POST {API}/generate HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer token-of-one\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    )
    with raw_connection(impatient, post):
        assert others_are_served(impatient)
    latest = time.monotonic() + 5
    while engine.stats().running and time.monotonic() < latest:
        time.sleep(0.05)
    assert not engine.stats().running, "a client that hung up frees its sequence"


def test_uploads_that_nobody_finishes(impatient: str) -> None:
    """So many at a time; those that rest too long are forgotten."""
    with RemoteEngine(impatient, token="token-of-two") as remote:
        first = remote.connection.ask("POST", f"{API}/uploads", {"bytes": 50})["upload"]
        remote.connection.ask("POST", f"{API}/uploads", {"bytes": 50})
        refused = httpx.post(f"{impatient}{API}/uploads", headers=token("two"), json={"bytes": 50}, trust_env=False)
        assert error_of(refused) == (429, "LimitExceededError")
        assert "retry-after" in refused.headers
        time.sleep(0.8)
        gone = httpx.get(f"{impatient}{API}/uploads/{first}", headers=token("two"), trust_env=False)
        assert gone.status_code == 404
        remote.connection.ask("POST", f"{API}/uploads", {"bytes": 50})


@pytest.mark.parametrize("hangs_up", [False, True])
def test_an_upload_that_stops_halfway(impatient: str, hangs_up: bool) -> None:
    """In silence or with a hang-up: others are served, what arrived is kept for a while, and then forgotten."""
    with RemoteEngine(impatient, token="token-of-one") as remote:
        path = f"{API}/uploads/{remote.connection.ask('POST', f'{API}/uploads', {'bytes': 100})['upload']}"
        piece = (
            f"PATCH {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer token-of-one\r\n"
            f"upload-offset: 0\r\nContent-Length: 100\r\n\r\n" + 40 * "x"
        )
        with raw_connection(impatient, piece) as connection:
            assert others_are_served(impatient)
            assert hangs_up or b" 408 " in connection.recv(1000)
        assert remote.connection.ask("GET", path) == {"offset": 40}
        time.sleep(0.8)
        assert error_of(httpx.get(f"{impatient}{path}", headers=token("one"), trust_env=False))[0] == 404


def test_how_many_contexts_a_namespace_may_keep(impatient: str) -> None:
    """Beyond that, nothing is kept until some are deleted."""
    with RemoteEngine(impatient, token="token-of-two") as remote:
        for number in range(3):
            remote.store.put(remote.think(f"number {number}", steps=1)) if not number else remote.think(
                f"number {number}", steps=1
            )
        with pytest.raises(StoreFullError):
            remote.think("one too many", steps=1)
        remote.store.discard(remote.store.list())
        assert remote.think("now again", steps=1).latent_steps == 1


def test_rate_and_concurrency() -> None:
    """A namespace's allowance comes back with time; another's is its own."""
    now = 0.0
    throttle = Throttle(ServerLimits(rate=2, concurrency=5), clock=lambda: now)
    for _ in range(4):
        with throttle.entered("one"):
            pass
    with pytest.raises(Refusal) as caught, throttle.entered("one"):
        pass
    assert (caught.value.status, caught.value.headers["retry-after"]) == (429, "1")
    with throttle.entered("two"):
        now = 0.5
        with throttle.entered("one"):
            assert throttle.running == 2

    narrow = Throttle(ServerLimits(concurrency=1))
    with narrow.entered("one"):
        with pytest.raises(Refusal), narrow.entered("one"):
            pass
        with narrow.entered("two"):
            pass
    with narrow.entered("one"):
        assert narrow.running == 1


def test_tokens_are_kept_as_digests(tmp_path: Path) -> None:
    """A file of them can be changed while the server runs, and nobody else may write to it."""
    path = tmp_path / "tokens"
    first, second = add_token(path, "team-a"), add_token(path, "team-b")
    assert first not in path.read_text()
    access = Access(TokenFile(path), loopback=True)
    assert access.namespace({"authorization": f"Bearer {second}"}) == "team-b"

    path.write_text(path.read_text().splitlines()[0] + "  # the other one was revoked\n")
    assert access.namespace({"authorization": f"bearer {first}"}) == "team-a"
    with pytest.raises(Refusal):
        access.namespace({"authorization": f"Bearer {second}"})

    path.chmod(0o666)
    with pytest.raises(ConfigurationError, match="chmod"):
        TokenFile(path)
    path.chmod(0o600)
    path.write_text("sha256:abc team-a\n")
    with pytest.raises(ConfigurationError, match="line 1"):
        TokenFile(path)
    with pytest.raises(ConfigurationError):
        add_token(path, "no/such/name")


def test_a_server_that_others_can_reach_needs_tokens() -> None:
    """And serves under the names it was given, if any."""
    with pytest.raises(ConfigurationError, match="tokens"):
        Access(None, loopback=False)
    open_to_all_names = Access(OneToken("t" * 20), loopback=False)
    open_to_all_names.check_site({"host": "anything.example"})
    named = Access(OneToken("t" * 20), loopback=False, hosts=frozenset({"models.example"}))
    named.check_site({"host": "models.example:8300"})
    with pytest.raises(Refusal):
        named.check_site({"host": "other.example"})
    assert issubclass(AuthenticationError, Exception)
