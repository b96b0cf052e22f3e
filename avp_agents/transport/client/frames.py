"""Contexts to and from a server as frames, in pieces; a transfer that breaks off goes on where it stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from avp_agents.context import Context
from avp_agents.errors import TransportError
from avp_agents.protocol.frame_decoding import FrameReader
from avp_agents.protocol.frame_encoding import EncodedFrame
from avp_agents.protocol.frame_values import decode_context, encode_context
from avp_agents.transport.client.connection import Connection
from avp_agents.transport.json_fields import Fields
from avp_agents.transport.wire import API, OFFSET_HEADER

PIECE_BYTES = 2**24
_CONTINUATIONS = 5
_PAUSE_SECONDS = 0.1


def fetch_context(connection: Connection, handle_id: str, *, kv: bool, scope: str | None = None) -> Context:
    """A context with all its values.

    Raises:
        ContextLostError: The server does not have it.
        FrameError: What came is not the frame that was sent.
        TransportError: The transfer broke off again and again.
    """
    path = f"{API}/contexts/{quote(handle_id, safe='')}/frame"
    params = {"kv": "1" if kv else "0"} | ({"scope": scope} if scope is not None else {})
    reader, arrived, etag = FrameReader(key=connection.frame_key), 0, ""
    for attempt in range(_CONTINUATIONS + 1):
        headers = {"range": f"bytes={arrived}-", "if-range": etag} if arrived else {}
        started, begun = time.perf_counter(), arrived
        try:
            with connection.stream(path, headers, params) as response:
                if arrived and response.status_code != 206:
                    # the KV-cache is another one by now, so this is another frame
                    reader, arrived = FrameReader(key=connection.frame_key), 0
                etag = response.headers.get("etag", "")
                for chunk in response.iter_raw():
                    reader.feed(chunk)
                    arrived += len(chunk)
            connection.meter.note(arrived - begun, time.perf_counter() - started)
            return decode_context(reader.finish())
        except TransportError:
            if attempt == _CONTINUATIONS or not etag:
                raise
    raise AssertionError("the last attempt returns or raises")


def send_context(connection: Connection, context: Context, *, kv: bool) -> Any:
    """Send a context; returns the server's description of it, as JSON.

    Raises:
        FingerprintMismatchError, IntegrityError: The server's model cannot have made it.
        LimitExceededError: It is larger than the server takes.
        TransportError: The transfer broke off again and again.
    """
    frame = encode_context(context, key=connection.frame_key, with_kv=kv)
    begun = Fields(connection.ask("POST", f"{API}/uploads", {"bytes": frame.nbytes}))
    path = f"{API}/uploads/{quote(begun.require('upload', str), safe='')}"
    source, failures = _Source(frame), 0
    offset = 0
    while True:
        size = min(PIECE_BYTES, frame.nbytes - offset)
        try:
            piece = source.piece(offset, size)
            answer = Fields(connection.send_piece(path, piece, size, {OFFSET_HEADER: str(offset)}))
        except TransportError as error:
            failures += 1
            # what the server refuses, it will refuse again
            if type(error) is not TransportError or failures > _CONTINUATIONS:
                raise
            # the server may not have noticed yet that the last piece broke off
            time.sleep(_PAUSE_SECONDS * failures)
            answer = Fields(connection.ask("GET", path))
        offset = answer.require("offset", int)
        if (described := answer.get("context", dict)) is not None:
            return described


class _Source:
    """The bytes of a frame, piece by piece; made anew only where they are asked for out of turn."""

    def __init__(self, frame: EncodedFrame) -> None:
        self._frame = frame
        self._chunks, self._rest, self._position = iter(frame), memoryview(b""), 0

    def piece(self, start: int, size: int) -> Iterator[bytes]:
        """`size` bytes from `start` on."""
        if start != self._position:
            self._chunks, self._rest, self._position = iter(self._frame), memoryview(b""), 0
            for _ in self._take(start):
                pass
        return self._take(size)

    def _take(self, size: int) -> Iterator[bytes]:
        while size:
            if not self._rest:
                self._rest = next(self._chunks)
            part, self._rest = self._rest[:size], self._rest[size:]
            size -= len(part)
            self._position += len(part)
            yield bytes(part)
