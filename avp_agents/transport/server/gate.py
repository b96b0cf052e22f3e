"""What every request passes on its way in, and every error on its way out."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from avp_agents.errors import AvpError, EngineError, LimitExceededError, TransportError
from avp_agents.transport.problems import Refusal, error_json, status_of
from avp_agents.transport.server.access import Access
from avp_agents.transport.server.limits import ServerLimits, Throttle
from avp_agents.transport.server.metrics import Metrics

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health"})
"""What anybody may ask."""

_CLIENT_GONE = 499
_SLOWEST = 1024


class ClientGone(Exception):
    """The client has closed the connection, or takes nothing any more."""


class Gate:
    """ASGI middleware: checks site and token, counts, limits, times out, and turns every error into JSON.

    Handlers find the namespace in ``request.state.namespace``.
    """

    def __init__(
        self, app: ASGIApp, *, access: Access, limits: ServerLimits, throttle: Throttle, metrics: Metrics
    ) -> None:
        self._app, self._access, self._limits = app, access, limits
        self._throttle, self._metrics = throttle, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        channel = _Channel(receive, send, self._limits)
        started = time.perf_counter()
        try:
            await self._enter(scope, channel)
        except ClientGone:
            self._metrics.clients_gone.inc()
            channel.status = channel.status or _CLIENT_GONE
            if channel.started:
                raise  # the server then breaks the connection: the response must not look complete
        except Exception as error:
            await self._answer(error, channel)
        finally:
            self._metrics.request(_route(scope), channel.status, time.perf_counter() - started)

    async def _enter(self, scope: Scope, channel: _Channel) -> None:
        headers = Headers(scope=scope)
        self._access.check_site(headers)
        if scope["path"] in OPEN_PATHS:
            await self._app(scope, channel.receive, channel.send)
            return
        namespace = self._access.namespace(headers)
        scope.setdefault("state", {})["namespace"] = namespace
        with self._throttle.entered(namespace):
            await self._app(scope, channel.receive, channel.send)

    async def _answer(self, error: Exception, channel: _Channel) -> None:
        if channel.started:
            log.error("A response broke off", exc_info=error)
            raise error
        status, body, headers = _explained(error)
        try:
            await _send_json(channel, status, body, headers)
        except ClientGone:
            self._metrics.clients_gone.inc()


class _Channel:
    """The two directions of one exchange, with a limit on how slow the client may be.

    Attributes:
        status: Of the response; 0 before it has started.
    """

    def __init__(self, receive: Receive, send: Send, limits: ServerLimits) -> None:
        self._receive, self._send, self._limits = receive, send, limits
        self._body_ended = False
        self._opened, self._received = time.monotonic(), 0
        self.status = 0

    @property
    def started(self) -> bool:
        """Whether the response has."""
        return 0 < self.status != _CLIENT_GONE

    async def receive(self) -> Message:
        """The next piece of the body, which must come in time; afterwards, that the client has gone."""
        if self._body_ended:
            return await self._receive()
        patience = self._limits.read_seconds
        # who drips single bytes is not in time: on the whole, the body must come at `_SLOWEST` bytes per second
        left = self._opened + patience + self._received / _SLOWEST - time.monotonic()
        try:
            async with asyncio.timeout(min(patience, left)):
                message = await self._receive()
        except TimeoutError as error:
            late = LimitExceededError("The body came too slowly.")
            raise Refusal(408, late, headers={"connection": "close"}) from error
        self._received += len(message.get("body", b""))
        self._body_ended = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Send a piece of the response, which the client must take in time."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        try:
            async with asyncio.timeout(self._limits.write_seconds):
                await self._send(message)
        except (TimeoutError, OSError, RuntimeError) as error:
            raise ClientGone from error


def _explained(error: Exception) -> tuple[int, dict[str, object], Mapping[str, str]]:
    """Status, body and headers for an error. What we did not expect is logged and not told."""
    if isinstance(error, Refusal):
        return error.status, error_json(error.error, error.status, error.code), error.headers
    if isinstance(error, HTTPException):
        told = TransportError(f"{error.detail}: see docs/serving.md for what this server answers.")
        return error.status_code, error_json(told, error.status_code), error.headers or {}
    if isinstance(error, AvpError):
        status = status_of(error)
        return status, error_json(error, status), {"retry-after": "1"} if status == 503 else {}
    log.error("A request failed", exc_info=error)
    return 500, error_json(EngineError("The server failed; its log says why."), 500), {}


async def _send_json(channel: _Channel, status: int, body: object, headers: Mapping[str, str]) -> None:
    data = json.dumps(body).encode()
    given = {"content-type": "application/json", "content-length": str(len(data)), **headers}
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in given.items()]
    await channel.send({"type": "http.response.start", "status": status, "headers": raw})
    await channel.send({"type": "http.response.body", "body": data})


def _route(scope: Scope) -> str:
    """The route's pattern, which has few values, and not the path, which has many."""
    return scope.get("avp_route", "other")
