"""Contexts as resources. A context's URI is its handle's id.

avp:1:<hex>              what it has read and answered, as text; never a system prompt
avp:1:<hex>/frame        its lineage as a frame
avp:1:<hex>/kv           the same with its KV-cache
avp:1:<hex>/thought      what it says to another model
avp:handshake            the server's side of the handshake
avp:probe                zeros, to measure the link with
"""

from __future__ import annotations

import asyncio
import base64
import json

import mcp_types as types
from mcp.shared.exceptions import MCPError

from avp_agents.context import Context
from avp_agents.crossing.payloads import FRAME_TYPE, MEDIA_TYPES, THOUGHT_TYPE, encoding_for
from avp_agents.crossing.sides import Crossing
from avp_agents.errors import ConfigurationError, ContextLostError, LimitExceededError
from avp_agents.protocol.handshake import CrossingMode
from avp_agents.transport.mcp.asking import SCOPE, Asking, explained, frame_key_of, resolved, tenant_of
from avp_agents.transport.server.service import Service
from avp_agents.transport.server.tenants import Tenant

HANDSHAKE_URI, PROBE_URI = "avp:handshake", "avp:probe"
PROBE_BYTES = 2**18
RESOURCE_BYTES = 32 * 2**20
"""Largest payload: as JSON it passes through memory several times. Larger ones go over the server's other endpoints."""

_PAGE = 100
_MODES: dict[str, CrossingMode] = {"frame": "replay", "kv": "kv", "thought": "projection"}
_TEMPLATES = [
    types.ResourceTemplate(
        name="context", uri_template="avp:1:{context}", mime_type="text/plain", description="What a context has read."
    ),
    types.ResourceTemplate(
        name="frame", uri_template="avp:1:{context}/frame", mime_type=FRAME_TYPE, description="A context's lineage."
    ),
    types.ResourceTemplate(
        name="kv", uri_template="avp:1:{context}/kv", mime_type=FRAME_TYPE, description="Lineage and KV-cache."
    ),
    types.ResourceTemplate(
        name="thought",
        uri_template="avp:1:{context}/thought",
        mime_type=THOUGHT_TYPE,
        description="What a context says to another model.",
    ),
]

_Contents = types.TextResourceContents | types.BlobResourceContents


class ContextResources:
    """Handlers of ``resources/list``, ``resources/templates/list`` and ``resources/read``.

    Args:
        service: What they work with.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def list(self, asking: Asking, params: types.PaginatedRequestParams | None) -> types.ListResourcesResult:
        """The namespace's contexts, newest first, a hundred at a time."""
        start = _offset(params.cursor if params is not None else None)
        tenant = await tenant_of(self._service, asking)
        handles = (await tenant.store.alist(scope=SCOPE))[::-1]
        page, end = handles[start : start + _PAGE], start + _PAGE
        resources = [
            types.Resource(
                name=handle.agent or handle.id, uri=handle.id, description=handle.text or None, mime_type="text/plain"
            )
            for handle in page
        ]
        return types.ListResourcesResult(resources=resources, next_cursor=str(end) if end < len(handles) else None)

    async def templates(
        self, asking: Asking, params: types.PaginatedRequestParams | None
    ) -> types.ListResourceTemplatesResult:
        """The forms of a context."""
        return types.ListResourceTemplatesResult(resource_templates=_TEMPLATES)

    async def read(self, asking: Asking, params: types.ReadResourceRequestParams) -> types.ReadResourceResult:
        """One of them.

        Raises:
            MCPError: It cannot be read; its data has the class.
        """
        try:
            tenant = await tenant_of(self._service, asking)
            return types.ReadResourceResult(contents=[await self._contents(asking, tenant, params.uri)])
        except Exception as error:
            text, told = explained(error)
            raise MCPError(types.INVALID_PARAMS, text, {"uri": params.uri[:200], **told}) from error

    async def _contents(self, asking: Asking, tenant: Tenant, uri: str) -> _Contents:
        if uri == HANDSHAKE_URI:
            hello, rate = tenant.engine.crossing.hello, self._service.prefill_rate
            ours = await asyncio.to_thread(hello, prefill_rate=rate)
            told = {"hello": ours.to_wire(), "model": self._service.model, "resource_bytes": RESOURCE_BYTES}
            return types.TextResourceContents(uri=uri, text=json.dumps(told), mime_type="application/json")
        if uri == PROBE_URI:
            return _blob(uri, bytes(PROBE_BYTES), "application/octet-stream")
        handle_id, _, form = uri.partition("/")
        if form and form not in _MODES:
            raise ConfigurationError(f"There is no resource {uri[:100]!r}.")
        context, own = await resolved(tenant, handle_id), tenant.engine.crossing
        if form:
            return await asyncio.to_thread(_payload, uri, _MODES[form], context, own, frame_key_of(asking))
        thought = await asyncio.to_thread(own.express, context)
        text = "\n\n".join(f"{message.role}: {message.content}" for message in thought.messages)
        return types.TextResourceContents(uri=uri, text=text, mime_type="text/plain")


def _payload(uri: str, mode: CrossingMode, context: Context, own: Crossing, key: bytes) -> _Contents:
    if mode == "kv" and context.kv is None:
        raise ContextLostError("The context has no KV-cache at the moment; read its frame and replay it.")
    size, encode = encoding_for(mode, context, own, key)
    if size > RESOURCE_BYTES:
        raise LimitExceededError(
            f"{size} bytes are more than the {RESOURCE_BYTES} that go over MCP. Fetch it from the server's "
            "/avp/v1/contexts/<id>/frame, or hand over without the KV-cache."
        )
    return _blob(uri, encode(), MEDIA_TYPES[mode])


def _blob(uri: str, data: bytes, mime_type: str) -> _Contents:
    return types.BlobResourceContents(uri=uri, blob=base64.b64encode(data).decode(), mime_type=mime_type)


def _offset(cursor: str | None) -> int:
    if cursor is None:
        return 0
    if not cursor.isascii() or not cursor.isdigit() or len(cursor) > 9:
        raise MCPError(types.INVALID_PARAMS, "The cursor is not one that this server gave.")
    return int(cursor)
