"""Who is here, what the link can carry, and what a context says to another model."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from avp_agents.errors import ConfigurationError
from avp_agents.protocol.handshake import Hello, handshake
from avp_agents.protocol.session import Session
from avp_agents.transport.server.bodies import read_fields
from avp_agents.transport.server.context_routes import reference
from avp_agents.transport.server.service import Service
from avp_agents.transport.server.tenants import Tenant
from avp_agents.transport.wire import Json

MAX_PROBE_BYTES = 2**22
_REREAD: dict[str, Any] = {"true": True, "false": False, "all": "all"}


class HandshakeRoutes:
    """Handlers; each takes a request and returns a response.

    Args:
        service: What they work with.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def shake(self, request: Request) -> ASGIApp:
        """``{"hello"?}`` to this side's; who said hello also gets a session, and the modes that both can do."""
        tenant = await self._service.tenant(request)
        fields = await read_fields(request, self._service.limits.body_bytes)
        said = fields.get("hello", dict)
        fields.end()
        remote = Hello.from_wire(said) if said is not None else None
        hello, rate = tenant.engine.crossing.hello, self._service.prefill_rate
        ours = await asyncio.to_thread(hello, prefill_rate=rate)
        session = self._service.sessions.open(tenant.name, ours, remote) if remote is not None else None
        return JSONResponse(self._answer(tenant, ours, session))

    async def resume(self, request: Request) -> ASGIApp:
        """A session that was opened before, its time starting anew."""
        tenant = await self._service.tenant(request)
        session = self._service.sessions.resume(request.path_params["session"], tenant.name)
        return JSONResponse(self._answer(tenant, session.local, session))

    async def probe(self, request: Request) -> ASGIApp:
        """``?bytes=`` so many zeros, to measure the link with."""
        text = request.query_params.get("bytes", "")
        size = int(text) if text.isascii() and text.isdigit() and len(text) < 9 else -1
        if not 0 <= size <= MAX_PROBE_BYTES:
            raise ConfigurationError(f"bytes is 0 to {MAX_PROBE_BYTES}.")
        return Response(bytes(size), media_type="application/octet-stream")

    async def thought(self, request: Request) -> ASGIApp:
        """``?reread=true|false|all``: what the context says to another model, as an encoded `Thought`."""
        tenant = await self._service.tenant(request)
        reread = _REREAD.get(request.query_params.get("reread", "true"))
        if reread is None:
            raise ConfigurationError("reread is true, false or all.")
        context = await tenant.engine.aresolve(reference(request), scope=request.query_params.get("scope"))
        thought = await asyncio.to_thread(tenant.engine.crossing.express, context, reread=reread)
        return Response(thought.encode(), media_type="application/msgpack")

    def _answer(self, tenant: Tenant, ours: Hello, session: Session | None) -> Json:
        engine = tenant.engine
        answer: Json = {
            "hello": ours.to_wire(),
            "model": self._service.model,
            "context_window": engine.context_window,
            "namespace": {"name": tenant.name, "tag": tenant.store.namespace.tag},
            "upload_bytes": self._service.limits.upload_bytes,
            "tool_format": asdict(engine.tool_format),
            "session": None,
        }
        if session is None:
            return answer
        shaken = handshake(ours, session.remote)
        modes = cast("list[str]", list(shaken.modes))
        return answer | {"session": session.id, "modes": modes, "overlap": round(shaken.overlap, 4)}
