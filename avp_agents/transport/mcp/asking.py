"""Whose request it is, which of their contexts it names, and how errors are told."""

from __future__ import annotations

import logging
from typing import Any

from mcp.server.context import ServerRequestContext
from starlette.requests import Request

from avp_agents.context import Context
from avp_agents.errors import AvpError, EngineError
from avp_agents.handle import ContextHandle
from avp_agents.protocol.handshake import Shipment
from avp_agents.transport.problems import error_json, status_of
from avp_agents.transport.server.service import Service
from avp_agents.transport.server.tenants import Tenant
from avp_agents.transport.wire import Json, frame_key

log = logging.getLogger(__name__)

SCOPE = ""
"""Contexts that were kept for a thread or a user of a graph are not offered over MCP."""

Asking = ServerRequestContext[Any, Any]


async def tenant_of(service: Service, asking: Asking) -> Tenant:
    """The namespace that the request's token opens; the gate has checked it."""
    return await service.tenant(_request(asking))


def frame_key_of(asking: Asking) -> bytes:
    """The key of frames for whoever asks."""
    _, _, token = _request(asking).headers.get("authorization", "").partition(" ")
    return frame_key(token.strip() or None)


async def resolved(tenant: Tenant, handle_id: str) -> Context:
    """The context that a handle's id stands for; untrusted.

    Raises:
        InvalidHandleError: It is not one.
        ContextLostError: The namespace does not have it, or not in this scope.
    """
    return await tenant.engine.aresolve(ContextHandle(id=handle_id), scope=SCOPE)


def described(context: Context, handle: ContextHandle, model: str) -> Json:
    """What a client is told of a context of a model."""
    shipment = Shipment(len(context), context.nbytes, context.kv.nbytes if context.kv is not None else None)
    told = {"handle": dict(handle.to_state()), "model": model, "latent_steps": context.latent_steps}
    return told | shipment.to_wire()


def explained(error: Exception) -> tuple[str, Json]:
    """What to tell of an error, for people and for clients of ours. What we did not expect is logged and not told."""
    if not isinstance(error, AvpError):
        log.error("A request over MCP failed", exc_info=error)
        error = EngineError("The server failed; its log says why.")
    return str(error), error_json(error, status_of(error))


def _request(asking: Asking) -> Request:
    assert isinstance(asking.request, Request), "the endpoint is served over HTTP only"
    return asking.request
