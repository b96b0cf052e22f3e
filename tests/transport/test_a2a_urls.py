"""URLs in messages of other agents: what is fetched, from where, and what is not."""

from __future__ import annotations

import asyncio
import dataclasses
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx", reason='httpx is not installed: pip install "avp-agents[a2a]"')

from avp_agents.errors import ConfigurationError, LimitExceededError, TransportError
from avp_agents.transport.a2a.fetching import UrlPolicy, fetch

DATA = Path(__file__).parent / "data"
HOST = "frames.example.com"
LOOPBACK = ("127.0.0.0/8",)
PUBLIC = "93.184.215.14"


class Resolver:
    """A resolver that tests script: each question gets the next answer, and is noted."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers, self.asked = list(answers), []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        return self.answers.pop(0)


@asynccontextmanager
async def answering(response: bytes | Callable[..., Any], **options: Any) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server that answers every request with the same bytes; yields its port, and what it was asked."""
    heard: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        if callable(response):
            await response(writer)
        else:
            writer.write(response)
            await writer.drain()
        writer.close()

    running: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running.add(asyncio.ensure_future(answer(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, **options)
    async with server:
        yield server.sockets[0].getsockname()[1], heard
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def body(data: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, "", ""]
    return "\r\n".join(lines).encode() + data


def here(port: int, resolver: Resolver | None = None, **changes: Any) -> UrlPolicy:
    """A policy for a server of this test's, under a public name."""
    given: dict[str, Any] = {"hosts": frozenset({f"{HOST}:{port}"}), "networks": LOOPBACK, "stall_seconds": 5.0}
    given |= {"resolve": resolver or Resolver(["127.0.0.1"])} | changes
    return UrlPolicy(**given)


async def test_a_payload_is_fetched_from_the_address_that_was_checked() -> None:
    """The name is resolved once. The server is asked under its name, with the token; the link's speed is noted."""
    resolver = Resolver(["127.0.0.1"])
    async with answering(body(b"x" * 70_000, "Content-Length: 70000")) as (port, heard):
        policy = here(port, resolver)
        assert await fetch(f"http://{HOST}:{port}/frame?kv=1", policy, token="secret") == b"x" * 70_000
    assert resolver.asked == [(HOST, port)]
    assert heard[0].startswith(b"GET /frame?kv=1 HTTP/1.1\r\n")
    assert f"host: {HOST}:{port}".encode() in heard[0].lower()
    assert b"authorization: bearer secret" in heard[0].lower()
    assert policy.meter.link is not None


async def test_a_name_that_changes_its_address_after_the_check_reaches_nothing() -> None:
    """DNS rebinding: a second answer would lead to a server inside, and is never asked for."""
    resolver = Resolver(["127.0.0.2"], ["127.0.0.1"])
    async with answering(body(b"inside")) as (port, heard):
        policy = here(port, resolver, networks=["127.0.0.2/32"])
        with pytest.raises(TransportError, match="did not send"):
            await fetch(f"http://{HOST}:{port}/", policy, token=None)
    assert (len(resolver.asked), heard) == (1, [])


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "198.18.0.1",
        "240.0.0.1",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%lo",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:a9fe:a9fe",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::169.254.169.254",
        "64:ff9b:1::1",
        "2002:7f00:1::1",
        "2001:0:7f00:1::1",
        "2001:db8::1",
        "not an address",
    ],
)
async def test_an_address_inside_is_refused_in_whatever_spelling(address: str) -> None:
    """Also where only one of several addresses is inside."""
    for addresses in ([address], [PUBLIC, address]):
        policy = UrlPolicy(frozenset({HOST}), resolve=Resolver(addresses))
        with pytest.raises(TransportError, match="address"):
            await fetch(f"https://{HOST}/", policy, token=None)


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f000001", "0177.0.0.1", "localhost", "[::1]", "127.0.0.1"])
async def test_the_system_resolver_does_not_lead_inside_either(host: str) -> None:
    """Spellings that resolvers turn into the loopback address: checked is what they were turned into."""
    policy = UrlPolicy(frozenset({host.strip("[]")}))
    with pytest.raises(TransportError, match=r"not a public address|cannot be resolved|malformed"):
        await fetch(f"https://{host}/", policy, token=None)


@pytest.mark.parametrize("address", [PUBLIC, "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::5db8:d70e"])
def test_public_addresses_pass_with_tls_only(address: str) -> None:
    """Plain HTTP is for the private networks that the receiver named."""
    policy = UrlPolicy(frozenset({HOST}))
    assert policy.check_addresses(policy.check_url(f"https://{HOST}/"), [address])
    with pytest.raises(TransportError, match="must be https"):
        policy.check_addresses(policy.check_url(f"http://{HOST}/"), [address])


def test_a_private_network_that_was_named_is_reached() -> None:
    """That one, also as an IPv4-mapped address; no other."""
    policy = UrlPolicy(frozenset({HOST}), networks=["10.0.0.0/8"])
    url = policy.check_url(f"http://{HOST}/")
    assert len(policy.check_addresses(url, ["10.0.0.7", "::ffff:10.0.0.7"])) == 2
    with pytest.raises(TransportError, match="not a public address"):
        policy.check_addresses(url, ["127.0.0.1"])


@pytest.mark.parametrize(
    "url",
    [
        "https://other.example.com/",
        f"https://{HOST}.attacker.example/",
        f"https://{HOST}@attacker.example/",
        f"https://user:password@{HOST}/",
        f"https://attacker.example\\@{HOST}/",
        f"https://{HOST}:8443/",
        f"https://{HOST}./",
        f"ftp://{HOST}/",
        "file:///etc/passwd",
        "data:,x",
        f"//{HOST}/",
        f"https://{HOST}/#fragment",
        "https:///",
        "https://\r\nHost: inside/",
        "",
        "http://[::1",
    ],
)
async def test_only_urls_of_expected_hosts_are_fetched(url: str) -> None:
    """Anything else is refused before a name is resolved."""
    resolver = Resolver()
    with pytest.raises(TransportError):
        await fetch(url, UrlPolicy(frozenset({HOST}), resolve=resolver), token="secret")
    assert resolver.asked == []


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
async def test_redirects_are_not_followed(status: str) -> None:
    """Wherever they lead."""
    async with answering(body(b"", "Location: /elsewhere", "Content-Length: 0", status=status)) as (port, heard):
        with pytest.raises(TransportError, match="redirect"):
            await fetch(f"http://{HOST}:{port}/", here(port), token=None)
    assert len(heard) == 1


async def test_a_payload_that_announces_too_much_is_refused_before_it_comes() -> None:
    """By its header alone; so is a length that is none."""
    for length in ("1001", "9" * 30, "-1", "many"):
        async with answering(body(b"", f"Content-Length: {length}")) as (port, _):
            with pytest.raises((LimitExceededError, TransportError)):
                await fetch(f"http://{HOST}:{port}/", here(port, max_bytes=1000), token=None)


async def test_a_payload_that_grows_too_large_is_cut_off() -> None:
    """Whatever was announced, or not."""
    chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
    async with answering(body(chunk * 8, "Transfer-Encoding: chunked")) as (port, _):
        with pytest.raises(LimitExceededError, match="larger than the 4000 bytes"):
            await fetch(f"http://{HOST}:{port}/", here(port, max_bytes=4000), token=None)


async def test_a_compressed_payload_is_refused() -> None:
    """A few bytes of it could become very many."""
    async with answering(body(b"\x1f\x8b", "Content-Encoding: gzip", "Content-Length: 2")) as (port, _):
        with pytest.raises(TransportError, match="compresses"):
            await fetch(f"http://{HOST}:{port}/", here(port), token=None)


async def test_an_error_of_the_server_is_told() -> None:
    """With its status, and not its body."""
    async with answering(body(b"secret", "Content-Length: 6", status="403 Forbidden")) as (port, _):
        with pytest.raises(TransportError, match=r"status 403\.$"):
            await fetch(f"http://{HOST}:{port}/", here(port), token=None)


async def test_a_payload_that_breaks_off_is_an_error() -> None:
    """And so is a server that is no HTTP server."""
    for response in (body(b"half", "Content-Length: 8"), b"SSH-2.0\r\n\r\n"):
        async with answering(response) as (port, _):
            with pytest.raises(TransportError, match="did not send the payload"):
                await fetch(f"http://{HOST}:{port}/", here(port), token=None)


async def test_a_server_that_falls_silent_is_given_up() -> None:
    """After the time for the next piece."""

    async def stall(writer: asyncio.StreamWriter) -> None:
        writer.write(body(b"x", "Content-Length: 100"))
        await writer.drain()
        await asyncio.sleep(1)

    async with answering(stall) as (port, _):
        with pytest.raises(TransportError, match="ReadTimeout"):
            await fetch(f"http://{HOST}:{port}/", here(port, stall_seconds=0.2), token=None)


async def test_a_server_that_drips_is_given_up() -> None:
    """After the time for the whole, although each piece comes in time."""

    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(body(b"", "Content-Length: 1000"))
        for _ in range(50):
            writer.write(b"x")
            await asyncio.sleep(0.02)

    async with answering(drip) as (port, _):
        with pytest.raises(TransportError, match=r"within 0\.3 s"):
            await fetch(f"http://{HOST}:{port}/", here(port, seconds=0.3), token=None)


async def test_a_resolver_that_falls_silent_is_given_up() -> None:
    """As anything else; and one that fails says why."""

    async def silent(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(60)
        return []

    async def failing(host: str, port: int) -> Sequence[str]:
        raise OSError("no such name")

    for resolve, message in ((silent, r"within 0\.1 s"), (failing, "no such name")):
        policy = UrlPolicy(frozenset({HOST}), resolve=resolve, stall_seconds=0.1)
        with pytest.raises(TransportError, match=message):
            await fetch(f"https://{HOST}/", policy, token=None)
    with pytest.raises(TransportError, match="no address"):
        await fetch(f"https://{HOST}/", UrlPolicy(frozenset({HOST}), resolve=Resolver([])), token=None)


async def test_the_next_address_is_tried() -> None:
    """Where one of a name's addresses does not answer."""
    async with answering(body(b"x", "Content-Length: 1")) as (port, _):
        resolver = Resolver(["127.0.0.9", "127.0.0.1"])
        assert await fetch(f"http://{HOST}:{port}/", here(port, resolver), token=None) == b"x"


async def test_the_certificate_is_the_names() -> None:
    """The connection goes to an address; the certificate must be for the name in the URL."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(DATA / "localhost.pem", DATA / "localhost.key")
    certificates = str(DATA / "localhost.pem")
    async with answering(body(b"x", "Content-Length: 1"), ssl=context) as (port, _):
        right = here(port, hosts=frozenset({f"localhost:{port}"}), certificates=certificates)
        assert await fetch(f"https://localhost:{port}/", right, token=None) == b"x"
        with pytest.raises(TransportError, match=r"(?i)certificate"):
            await fetch(f"https://{HOST}:{port}/", here(port, certificates=certificates), token=None)
        with pytest.raises(TransportError, match=r"(?i)certificate"):
            await fetch(f"https://localhost:{port}/", here(port, hosts=right.hosts), token=None)


@pytest.mark.parametrize(
    "changes", [{"networks": ["10.0.0.1/8"]}, {"networks": ["x"]}, {"max_bytes": 0}, {"seconds": 0}, {"hosts": "a.b"}]
)
def test_a_policy_that_makes_no_sense(changes: dict[str, Any]) -> None:
    """Is refused when it is made."""
    with pytest.raises(ConfigurationError):
        dataclasses.replace(UrlPolicy(frozenset({HOST})), **changes)


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would resolve the name again."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    async with answering(body(b"x", "Content-Length: 1")) as (port, _):
        assert await fetch(f"http://{HOST}:{port}/", here(port), token=None) == b"x"
