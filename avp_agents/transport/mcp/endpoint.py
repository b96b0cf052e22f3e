"""The MCP endpoint of `avp-agents serve`: behind the same gate as everything else the server answers.

Token, namespace, Host and Origin, limits and metrics are the server's own. No session is kept: each request is complete
in itself, so a session cannot be taken over with another token.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from mcp.server import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from avp_agents.transport.mcp.names import EXTENSION
from avp_agents.transport.mcp.resources import ContextResources
from avp_agents.transport.mcp.tools import ContextTools
from avp_agents.transport.server.service import Service

PATH = "/mcp"
VERSION = 1
_INSTRUCTIONS = (
    "A language model that thinks in latent steps, without writing. `think` returns a context by its handle; "
    "`generate` answers on top of it. A context is also a resource, whose text is what it has read."
)


def mount(app: Starlette) -> None:
    """Add the endpoint to a server's application, before it is served.

    Args:
        app: As `avp_agents.transport.server.create_app` makes it.
    """
    service: Service = app.state.service
    manager = StreamableHTTPSessionManager(
        _server(service), stateless=True, max_request_body_size=service.limits.body_bytes
    )
    app.router.routes.append(Route(PATH, _Endpoint(manager)))
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(served: Starlette) -> AsyncIterator[None]:
        async with inner(served), manager.run():
            yield

    app.router.lifespan_context = lifespan


def _server(service: Service) -> Server[Any]:
    tools, resources = ContextTools(service), ContextResources(service)
    server: Server[Any] = Server(
        "avp-agents",
        instructions=_INSTRUCTIONS,
        on_list_tools=tools.list,
        on_call_tool=tools.call,
        on_list_resources=resources.list,
        on_list_resource_templates=resources.templates,
        on_read_resource=resources.read,
    )
    server.extensions[EXTENSION] = {"version": VERSION}
    return server


class _Endpoint:
    """The transport as an ASGI application that notes its route for the metrics."""

    def __init__(self, manager: StreamableHTTPSessionManager) -> None:
        self._manager = manager

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        scope["avp_route"] = f"{scope['method']} {PATH}"
        await self._manager.handle_request(scope, receive, send)
