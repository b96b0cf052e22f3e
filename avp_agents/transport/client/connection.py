"""HTTP to one server: JSON, events and bytes, for threads and event loops, with errors as the engine raised them."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import httpx
from httpx_sse import EventSource, ServerSentEvent

from avp_agents.errors import AvpError, RequestTimeoutError, TransportError
from avp_agents.protocol.handshake import LinkMeter
from avp_agents.transport.client.loop_transport import LoopTransport
from avp_agents.transport.json_fields import parse_json
from avp_agents.transport.problems import error_from_json
from avp_agents.transport.wire import REQUEST_ID_HEADER, Json, frame_key

CONNECT_SECONDS = 10.0
LINGER_SECONDS = 5.0
"""How long the end of a cancelled answer is waited for, so that its connection can be used again."""


@dataclass(frozen=True)
class Event:
    """A server-sent event."""

    name: str
    data: Any


class Connection:
    """One server, seen from one process.

    Nothing is retried: a request that got lost may have been carried out.

    Args:
        url: ``http://`` or ``https://``, host and port.
        token: Bearer token.
        seconds: How long an answer, or the next piece of one, may take.
        http2: Speak HTTP/2; without TLS by prior knowledge, which proxies may not understand.
        verify: A file of certificates to trust, instead of the system's.
        transport: Of httpx, for threads; for proxies and tests.

    Attributes:
        meter: How fast bytes come from the server.
        frame_key: The key of frames.
        bytes_sent, bytes_received: Of bodies, since the start.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        seconds: float,
        http2: bool,
        verify: str | None,
        transport: httpx.BaseTransport | None,
    ) -> None:
        self.url = _checked_url(url)
        self.frame_key = frame_key(token)
        self.meter = LinkMeter()
        self.bytes_sent = self.bytes_received = 0
        encrypted = self.url.scheme == "https"
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "headers": {"authorization": f"Bearer {token}"} if token is not None else {},
            "timeout": httpx.Timeout(seconds, connect=CONNECT_SECONDS),
            "follow_redirects": False,
        }
        self._speaking: dict[str, Any] = {
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=32),
            "trust_env": False,
            "http2": http2,
            "http1": encrypted or not http2,
            "verify": ssl.create_default_context(cafile=verify) if encrypted else True,
        }
        self._transport = transport
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._client: httpx.Client | None = None
        self._loop_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = WeakKeyDictionary()

    def ask(self, method: str, path: str, body: Json | None = None, *, request_id: str | None = None) -> Any:
        """Send a request and return the JSON that answers it.

        Raises:
            AvpError: As the server reports it.
            TransportError: The server cannot be reached, or its answer is no JSON.
        """
        with _translated(self.url):
            response = self.client.request(method, path, **self._request(body, request_id))
        return self._read(response)

    async def aask(self, method: str, path: str, body: Json | None = None, *, request_id: str | None = None) -> Any:
        """Asynchronous `ask`."""
        with _translated(self.url):
            response = await self.loop_client.request(method, path, **self._request(body, request_id))
        return self._read(response)

    def events(self, path: str, body: Json, request_id: str) -> Generator[Event, None, None]:
        """The events that answer a request. One named ``error`` is raised.

        Leaving before the end cancels the request on the server.

        Raises:
            As `ask`.
        """
        with (
            self._cancelled_when_left(request_id),
            _translated(self.url),
            self.client.stream("POST", path, **self._request(body, request_id)) as response,
        ):
            told = EventSource(response).iter_sse()
            if response.is_error:
                response.read()
                self._read(response)
            try:
                for event in told:
                    yield _checked_event(event)
            except GeneratorExit:
                self._end(request_id, told)
                raise
            finally:
                self.bytes_received += response.num_bytes_downloaded

    async def aevents(self, path: str, body: Json, request_id: str) -> AsyncGenerator[Event, None]:
        """Asynchronous `events`."""
        client, ended = self.loop_client, False
        try:
            with _translated(self.url):
                async with client.stream("POST", path, **self._request(body, request_id)) as response:
                    told = EventSource(response).aiter_sse()
                    if response.is_error:
                        await response.aread()
                        self._read(response)
                    try:
                        async for event in told:
                            yield _checked_event(event)
                    except (GeneratorExit, asyncio.CancelledError):
                        ended = True
                        await self._aend(request_id, told)
                        raise
                    finally:
                        self.bytes_received += response.num_bytes_downloaded
        except (asyncio.CancelledError, RequestTimeoutError):
            if not ended:
                await self._aend(request_id, None)
            raise

    @contextmanager
    def _cancelled_when_left(self, request_id: str) -> Iterator[None]:
        """Cancel a request whose answer is not waited for any longer."""
        try:
            yield
        except (RequestTimeoutError, KeyboardInterrupt, SystemExit):
            self.cancel(request_id)
            raise

    def cancel(self, request_id: str) -> None:
        """Ask the server to end a request; that it cannot be reached changes nothing."""
        with suppress(AvpError):
            self.ask("DELETE", _cancelling(request_id))

    async def acancel(self, request_id: str) -> None:
        """Asynchronous `cancel`."""
        with suppress(AvpError):
            await self.aask("DELETE", _cancelling(request_id))

    @contextmanager
    def stream(self, path: str, headers: Mapping[str, str], params: Mapping[str, str]) -> Iterator[httpx.Response]:
        """The response to a GET, its body unread.

        Raises:
            As `ask`.
        """
        with _translated(self.url), self.client.stream("GET", path, headers=headers, params=params) as response:
            if response.is_error:
                response.read()
                self._read(response)
            try:
                yield response
            finally:
                self.bytes_received += response.num_bytes_downloaded

    def send_piece(self, path: str, content: Iterator[bytes], size: int, headers: Mapping[str, str]) -> Any:
        """PATCH some bytes, and return the JSON that answers them.

        Raises:
            As `ask`.
        """
        with _translated(self.url):
            response = self.client.patch(path, content=content, headers={"content-length": str(size), **headers})
        self.bytes_sent += size
        return self._read(response)

    def get_bytes(self, path: str, params: Mapping[str, str]) -> bytes:
        """The body that answers a GET; notes what it says about the link.

        Raises:
            As `ask`.
        """
        started = time.perf_counter()
        with _translated(self.url):
            response = self.client.get(path, params=params)
        if response.is_error:
            self._read(response)
        self.meter.note(len(response.content), time.perf_counter() - started)
        self.bytes_received += len(response.content)
        return response.content

    def close(self) -> None:
        """Close the connections of threads. Those of an event loop end with it, or by `aclose`."""
        with self._lock:
            if self._client is not None and self._process == os.getpid():
                self._client.close()
            self._client = None

    async def aclose(self) -> None:
        """Close the connections of the event loop that runs now."""
        with self._lock:
            client = self._loop_clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    @property
    def client(self) -> httpx.Client:
        """For threads; a new one after a fork."""
        with self._lock:
            if self._process != os.getpid():
                self._process, self._client = os.getpid(), None
            if self._client is None:
                self._client = httpx.Client(transport=self._transport, **self._speaking, **self._options)
            return self._client

    @property
    def loop_client(self) -> httpx.AsyncClient:
        """For the event loop that runs now."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if loop not in self._loop_clients:
                transport = LoopTransport(**self._speaking)
                self._loop_clients[loop] = httpx.AsyncClient(transport=transport, trust_env=False, **self._options)
            return self._loop_clients[loop]

    def _request(self, body: Json | None, request_id: str | None) -> dict[str, Any]:
        headers = {REQUEST_ID_HEADER: request_id} if request_id is not None else {}
        if body is None:
            return {"headers": headers}
        try:
            content = json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise TransportError(f"What is to be sent is not JSON data: {error}.") from error
        self.bytes_sent += len(content)
        return {"content": content, "headers": headers | {"content-type": "application/json"}}

    def _read(self, response: httpx.Response) -> Any:
        """The JSON of a whole response; an error is raised."""
        self.bytes_received += response.num_bytes_downloaded if not response.is_error else 0
        try:
            data = parse_json(response.content)
        except AvpError as error:
            if response.is_error:
                raise error_from_json(response.status_code, None) from error
            raise TransportError(f"{self.url} did not answer with JSON; is it an avp-agents server?") from error
        if response.is_error:
            raise error_from_json(response.status_code, data)
        return data

    def _end(self, request_id: str, rest: Iterator[ServerSentEvent]) -> None:
        """Cancel a request that is being answered, and read the answer's end: over HTTP/2 the connection goes on."""
        self.cancel(request_id)
        latest = time.monotonic() + LINGER_SECONDS
        with suppress(httpx.HTTPError, httpx.StreamError):
            for _ in rest:
                if time.monotonic() > latest:
                    return

    async def _aend(self, request_id: str, rest: AsyncIterator[ServerSentEvent] | None) -> None:
        with suppress(httpx.HTTPError, httpx.StreamError, TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await self.acancel(request_id)
                if rest is not None:
                    async for _ in rest:
                        pass


@asynccontextmanager
async def cancelling(connection: Connection, request_id: str) -> AsyncIterator[None]:
    """Tell the server when the task that waits for an answer is cancelled."""
    try:
        yield
    except asyncio.CancelledError:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await connection.acancel(request_id)
        raise


def _checked_event(told: ServerSentEvent) -> Event:
    event = Event(told.event, parse_json(told.data))
    if event.name == "error":
        raise error_from_json(500, event.data)
    return event


def _cancelling(request_id: str) -> str:
    return f"/avp/v1/requests/{request_id}"


def _checked_url(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise TransportError(f"{url!r} is not a URL: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query:
        raise TransportError("A server's URL is http:// or https:// with host and port; the token goes into token=.")
    return parsed


@contextmanager
def _translated(url: httpx.URL) -> Iterator[None]:
    """httpx's errors as ours."""
    try:
        yield
    except httpx.ConnectError as error:
        raise TransportError(f"Cannot connect to {url}: {error}. Is `avp-agents serve` running there?") from error
    except httpx.TimeoutException as error:
        raise RequestTimeoutError(f"{url} did not answer in time; raise RemoteEngine(seconds=).") from error
    except (httpx.HTTPError, httpx.StreamError) as error:
        raise TransportError(f"The exchange with {url} broke off: {type(error).__name__}: {error}") from error
