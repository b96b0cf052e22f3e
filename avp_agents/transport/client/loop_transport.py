"""HTTP for event loops, where any task may be cancelled at any moment."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import httpx


class LoopTransport(httpx.AsyncHTTPTransport):
    """Lets nobody cancel the opening of a connection.

    A request that is cancelled while it opens a HTTP/2 connection leaves httpcore (1.0) with a wrong count of free
    streams, and every later request on that connection fails. Here such a request goes on until its headers are sent,
    and is cancelled then.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._leaving: set[asyncio.Task[None]] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; see `httpx.AsyncBaseTransport`."""
        opened = asyncio.Event()

        async def trace(event: str, _: Any) -> None:
            if event.endswith("send_request_headers.started"):
                opened.set()

        request.extensions = {**request.extensions, "trace": trace}
        sending = asyncio.create_task(super().handle_async_request(request))
        try:
            return await asyncio.shield(sending)
        except asyncio.CancelledError:
            leaving = asyncio.create_task(_leave(sending, opened))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            if opened.is_set():
                await asyncio.shield(leaving)
            raise

    async def aclose(self) -> None:
        """Close all connections, once those being opened are."""
        await asyncio.gather(*self._leaving)
        await super().aclose()


async def _leave(sending: asyncio.Task[httpx.Response], opened: asyncio.Event) -> None:
    waiting = asyncio.create_task(opened.wait())
    await asyncio.wait({sending, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    sending.cancel()
    with suppress(asyncio.CancelledError, httpx.HTTPError):
        await (await sending).aclose()
