"""The ASGI application: which handler answers what."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from avp_agents.errors import AvpError
from avp_agents.protocol.session import SessionTable
from avp_agents.transport.server.access import Access
from avp_agents.transport.server.chat_routes import ChatRoutes
from avp_agents.transport.server.context_routes import ContextRoutes
from avp_agents.transport.server.engine_routes import EngineRoutes
from avp_agents.transport.server.frame_routes import FrameRoutes
from avp_agents.transport.server.gate import Gate
from avp_agents.transport.server.handshake_routes import HandshakeRoutes
from avp_agents.transport.server.limits import ServerLimits, Throttle
from avp_agents.transport.server.metrics import CONTENT_TYPE
from avp_agents.transport.server.service import Service
from avp_agents.transport.server.tenants import EngineFor, Tenants
from avp_agents.transport.server.uploads import Uploads
from avp_agents.transport.wire import API

log = logging.getLogger(__name__)

HOUSEKEEPING_SECONDS = 60.0

Handler = Callable[[Request], Awaitable[ASGIApp]]


def create_app(engine_for: EngineFor, *, model: str, access: Access, limits: ServerLimits | None = None) -> Starlette:
    """The application that serves one model.

    Args:
        engine_for: The model's engine for a namespace, for example
            ``lambda name: engine.for_store(default_store(name))``.
        model: The name that the model goes by.
        access: Who may ask.
        limits: How much; by default, `ServerLimits()`.
    """
    allowed = limits or ServerLimits()
    service = Service(
        tenants=Tenants(engine_for, allowed),
        limits=allowed,
        throttle=Throttle(allowed),
        uploads=Uploads(allowed),
        sessions=SessionTable(),
        model=model,
    )
    app = Starlette(
        routes=_routes(service),
        exception_handlers={HTTPException: _leave_to_gate},
        lifespan=lambda _: _lifespan(service),
    )
    app.add_middleware(Gate, access=access, limits=allowed, throttle=service.throttle, metrics=service.metrics)
    app.state.service = service
    return app


def _routes(service: Service) -> list[Route]:
    engine, contexts, frames = EngineRoutes(service), ContextRoutes(service), FrameRoutes(service)
    chat, handshakes, one = ChatRoutes(service), HandshakeRoutes(service), f"{API}/contexts/{{reference}}"
    return [
        _route("/health", "GET", _health),
        _route("/metrics", "GET", lambda request: _metrics(request, service)),
        _route("/v1/models", "GET", chat.models),
        _route("/v1/models/{model:path}", "GET", chat.model),
        _route("/v1/chat/completions", "POST", chat.completions),
        _route(f"{API}/handshake", "POST", handshakes.shake),
        _route(f"{API}/handshake/{{session}}", "GET", handshakes.resume),
        _route(f"{API}/probe", "GET", handshakes.probe),
        _route(f"{API}/think", "POST", engine.think),
        _route(f"{API}/generate", "POST", engine.generate),
        _route(f"{API}/replay", "POST", engine.replay),
        _route(f"{API}/join", "POST", engine.join),
        _route(f"{API}/count", "POST", engine.count),
        _route(f"{API}/encode", "POST", engine.encode),
        _route(f"{API}/requests/{{request_id}}", "DELETE", engine.cancel),
        _route(f"{API}/contexts", "GET", contexts.list),
        _route(f"{API}/contexts/discard", "POST", contexts.discard),
        _route(f"{API}/contexts/prune", "POST", contexts.prune),
        _route(f"{API}/contexts/stats", "GET", contexts.stats),
        _route(one, "GET", contexts.get),
        _route(one, "DELETE", contexts.delete),
        _route(f"{one}/handles", "POST", contexts.put),
        _route(f"{one}/held", "GET", contexts.held),
        _route(f"{one}/touch", "POST", contexts.touch),
        _route(f"{one}/kv", "DELETE", contexts.drop_kv),
        _route(f"{one}/pin", "PUT", contexts.pin),
        _route(f"{one}/pin", "DELETE", contexts.unpin),
        _route(f"{one}/frame", "GET", frames.download),
        _route(f"{one}/thought", "GET", handshakes.thought),
        _route(f"{API}/uploads", "POST", frames.begin),
        _route(f"{API}/uploads/{{upload}}", "PATCH", frames.piece),
        _route(f"{API}/uploads/{{upload}}", "GET", frames.offset),
        _route(f"{API}/uploads/{{upload}}", "DELETE", frames.abandon),
    ]


def _route(path: str, method: str, handler: Handler) -> Route:
    return Route(path, _Endpoint(f"{method} {path}", handler), methods=[method])


class _Endpoint:
    """A handler as an ASGI application that notes its route for the metrics."""

    def __init__(self, name: str, handler: Handler) -> None:
        self._name, self._handler = name, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        scope["avp_route"] = self._name
        response = await self._handler(Request(scope, receive, send))
        await response(scope, receive, send)


async def _leave_to_gate(request: Request, error: Exception) -> Response:
    """Unknown paths and methods are errors like all others."""
    raise error


async def _health(request: Request) -> ASGIApp:
    return JSONResponse({"status": "ok"})


async def _metrics(request: Request, service: Service) -> ASGIApp:
    gauges = {
        "requests_running": service.throttle.running,
        "uploads_unfinished": len(service.uploads),
        "sessions": len(service.sessions),
        "namespaces": len(service.tenants.all()),
    }
    return PlainTextResponse(service.metrics.render(gauges), media_type=CONTENT_TYPE)


@asynccontextmanager
async def _lifespan(service: Service) -> AsyncIterator[None]:
    keeping = asyncio.create_task(_keep_house(service))
    try:
        yield
    finally:
        keeping.cancel()
        with suppress(asyncio.CancelledError):
            await keeping
        service.uploads.close()


async def _keep_house(service: Service) -> None:
    """Let go of what nobody asks for any more."""
    while True:
        await asyncio.sleep(HOUSEKEEPING_SECONDS)
        service.uploads.drop_stale()
        for tenant in service.tenants.all():
            try:
                await tenant.store.aprune()
            except AvpError as error:
                log.warning("The contexts of namespace %s were not pruned: %s", tenant.name, error)
