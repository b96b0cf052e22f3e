"""Work for a client that may leave, and events sent to it while it stays."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar, cast

from starlette.types import Receive, Scope, Send

from avp_agents.errors import AvpError
from avp_agents.transport.server.gate import ClientGone

_Result = TypeVar("_Result")

Emit = Callable[[bytes], None]
"""Takes an encoded event."""

Produce = Callable[[Emit], Awaitable[None]]
"""Makes the events of a stream."""

KEEP_ALIVE_SECONDS = 10.0
_KEEP_ALIVE = b": waiting\n\n"


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Do some work, and cancel it when the client leaves.

    Args:
        receive: The request's, its body read.
        work: What to do.

    Raises:
        ClientGone: The client left first.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        await _cancel(leaving)
        await _cancel(working)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A response of server-sent events, as an ASGI application.

    An error before the first event is raised, so that it becomes a response of its own; a later one becomes an event.

    Args:
        produce: Makes the events and hands each, encoded, to the function that it is given. It is cancelled when the
            client leaves.
        encode_error: The event for an error.
    """

    def __init__(self, produce: Produce, encode_error: Callable[[AvpError], bytes]) -> None:
        self._produce, self._encode_error = produce, encode_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events."""
        await while_connected(receive, self._pump(send))

    async def _pump(self, send: Send) -> None:
        events: asyncio.Queue[bytes | None] = asyncio.Queue()
        producing = asyncio.ensure_future(self._run(events))
        started = False
        try:
            while (event := await _next_event(events)) is not None:
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                    started = True
                await send({"type": "http.response.body", "body": event, "more_body": True})
            error = producing.exception()
            if error is not None and not (started and isinstance(error, AvpError)):
                raise error
            last = b"" if error is None else self._encode_error(cast("AvpError", error))
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            await _cancel(producing)

    async def _run(self, events: asyncio.Queue[bytes | None]) -> None:
        try:
            await self._produce(events.put_nowait)
        finally:
            events.put_nowait(None)


async def _next_event(events: asyncio.Queue[bytes | None]) -> bytes | None:
    """The next event, or a comment that shows proxies and clients that the server is still there."""
    try:
        async with asyncio.timeout(KEEP_ALIVE_SECONDS):
            return await events.get()
    except TimeoutError:
        return _KEEP_ALIVE


async def _cancel(task: asyncio.Future[Any]) -> None:
    """End a task and wait until it has cleaned up."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})


_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
