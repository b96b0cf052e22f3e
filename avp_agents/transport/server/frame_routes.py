"""Contexts up and down as frames, in pieces, so that a transfer that broke off goes on where it stopped.

    GET    /contexts/<reference>/frame?kv=1     the frame; takes Range (``bytes=<offset>-``) with If-Range
    POST   /uploads {"bytes"}                   begins an upload: {"upload", "offset"}
    PATCH  /uploads/<upload>                    a piece; the header upload-offset says where it belongs
    GET    /uploads/<upload>                    {"offset"}: how much has arrived
    DELETE /uploads/<upload>

The last piece is answered with the description of the context, once the frame was checked and the context stored.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from itertools import count
from weakref import WeakKeyDictionary

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from avp_agents.context import Context
from avp_agents.errors import ConfigurationError, TransportError
from avp_agents.kv_cache import KvCache
from avp_agents.protocol.frame_decoding import read_frame
from avp_agents.protocol.frame_encoding import EncodedFrame
from avp_agents.protocol.frame_values import decode_context, encode_context
from avp_agents.protocol.limits import Limits
from avp_agents.transport.problems import Refusal
from avp_agents.transport.server.bodies import content_length, read_fields, too_large
from avp_agents.transport.server.context_routes import reference
from avp_agents.transport.server.gate import ClientGone
from avp_agents.transport.server.service import Service
from avp_agents.transport.server.streaming import while_connected
from avp_agents.transport.server.tenants import Tenant
from avp_agents.transport.server.uploads import Upload
from avp_agents.transport.wire import OFFSET_HEADER, Json, frame_key

_RANGE = re.compile(r"bytes=(\d{1,18})-")
CONTENT_TYPE = "application/vnd.avp.frame"


class FrameRoutes:
    """Handlers; each takes a request and returns a response.

    Args:
        service: What they work with.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._kv_numbers: WeakKeyDictionary[KvCache, int] = WeakKeyDictionary()
        self._next_number = count(1)

    async def download(self, request: Request) -> ASGIApp:
        """The context as a frame; ``?kv=0`` (the default) without its KV-cache."""
        tenant = await self._service.tenant(request)
        with_kv = {"0": False, "1": True}.get(request.query_params.get("kv", "0"))
        if with_kv is None:
            raise ConfigurationError("kv is 0 or 1.")
        scope = request.query_params.get("scope")
        context = await tenant.engine.aresolve(reference(request), scope=scope)
        frame = await asyncio.to_thread(encode_context, context, key=_key(request), with_kv=with_kv)
        return _FrameResponse(frame, self._etag(context, frame, with_kv), request)

    async def begin(self, request: Request) -> ASGIApp:
        """Make room for an upload."""
        tenant = await self._service.tenant(request)
        fields = await read_fields(request, self._service.limits.body_bytes)
        size = fields.require("bytes", int)
        fields.end()
        if size < 1:
            raise ConfigurationError("'bytes' must be at least 1.")
        if size > self._service.limits.upload_bytes:
            raise too_large(self._service.limits.upload_bytes)
        upload = self._service.uploads.begin(tenant.name, size)
        return JSONResponse({"upload": upload.id, "offset": 0}, status_code=201)

    async def piece(self, request: Request) -> ASGIApp:
        """Take in a piece of an upload."""
        tenant = await self._service.tenant(request)
        upload = self._upload(request, tenant)
        with upload.in_use():
            await self._receive(request, upload)
            if not upload.complete:
                return JSONResponse({"offset": upload.offset, "context": None})
            try:
                described = await while_connected(request.receive, self._finish(tenant, upload, _key(request)))
            finally:
                self._service.uploads.end(upload)
        return JSONResponse({"offset": upload.offset, "context": described})

    async def offset(self, request: Request) -> ASGIApp:
        """How much of an upload has arrived."""
        tenant = await self._service.tenant(request)
        return JSONResponse({"offset": self._upload(request, tenant).offset})

    async def abandon(self, request: Request) -> ASGIApp:
        """Forget an upload."""
        tenant = await self._service.tenant(request)
        upload = self._upload(request, tenant)
        with upload.in_use():
            self._service.uploads.end(upload)
        return JSONResponse({})

    def _upload(self, request: Request, tenant: Tenant) -> Upload:
        return self._service.uploads.find(request.path_params["upload"], tenant.name)

    async def _receive(self, request: Request, upload: Upload) -> None:
        """Append the body to the upload. What arrived before a client left stays."""
        if request.headers.get(OFFSET_HEADER) != str(upload.offset):
            error = TransportError(f"{OFFSET_HEADER} must be {upload.offset}: so many bytes have arrived.")
            raise Refusal(409, error, headers={OFFSET_HEADER: str(upload.offset)})
        if (content_length(request) or 0) > upload.size - upload.offset:
            raise too_large(upload.size - upload.offset)
        try:
            async for piece in request.stream():
                if len(piece) > upload.size - upload.offset:
                    raise too_large(upload.size - upload.offset)
                upload.append(piece)
        except ClientDisconnect as error:
            raise ClientGone from error

    async def _finish(self, tenant: Tenant, upload: Upload, key: bytes) -> Json:
        most = self._service.limits.upload_bytes
        limits = Limits(frame_bytes=most, value_bytes=most, head_bytes=min(most, Limits.head_bytes))

        def read() -> Context:
            return decode_context(read_frame(upload.path, key=key, limits=limits))

        context = await asyncio.to_thread(read)
        await asyncio.to_thread(tenant.engine.accept, context)
        return (await tenant.keep_result(context, {})).to_json()

    def _etag(self, context: Context, frame: EncodedFrame, with_kv: bool) -> str:
        """What tells one content from another: the head's MAC, and which KV-cache it was (which never changes)."""
        kv = context.kv if with_kv else None
        number = self._kv_numbers.setdefault(kv, next(self._next_number)) if kv is not None else 0
        return f'"{frame.layout.header.mac.hex()[:32]}-{number}"'


class _FrameResponse:
    """Sends a frame, or what of it comes after an offset, in chunks of at most 1 MiB."""

    def __init__(self, frame: EncodedFrame, etag: str, request: Request) -> None:
        self._frame, self._etag = frame, etag
        self._start = self._offset(request)

    def _offset(self, request: Request) -> int | None:
        asked = _RANGE.fullmatch(request.headers.get("range", ""))
        if asked is None or request.headers.get("if-range", self._etag) != self._etag:
            return None
        start = int(asked[1])
        if start >= self._frame.nbytes:
            error = ConfigurationError(f"The frame has {self._frame.nbytes} bytes; nothing begins at {start}.")
            raise Refusal(416, error, headers={"content-range": f"bytes */{self._frame.nbytes}"})
        return start

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await while_connected(receive, self._pump(send))

    async def _pump(self, send: Send) -> None:
        size, start = self._frame.nbytes, self._start or 0
        headers = {
            "content-type": CONTENT_TYPE,
            "content-length": str(size - start),
            "accept-ranges": "bytes",
            "etag": self._etag,
            "cache-control": "no-store",
        }
        if self._start is not None:
            headers["content-range"] = f"bytes {start}-{size - 1}/{size}"
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 206 if self._start is not None else 200, "headers": raw})
        for chunk in _from(self._frame, start):
            await send({"type": "http.response.body", "body": bytes(chunk), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _from(frame: EncodedFrame, start: int) -> Iterator[memoryview]:
    """The frame's chunks from an offset on; what comes before is made for its checksums only."""
    for chunk in frame:
        if len(chunk) > start:
            yield chunk[start:]
        start = max(0, start - len(chunk))


def _key(request: Request) -> bytes:
    _, _, token = request.headers.get("authorization", "").partition(" ")
    return frame_key(token.strip() or None)
