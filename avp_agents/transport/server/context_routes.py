"""Contexts of a namespace: look them up, keep, pin, drop and delete them. `frame_routes` moves their content."""

from __future__ import annotations

from dataclasses import asdict

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from avp_agents.errors import InvalidHandleError
from avp_agents.handle import ContextHandle
from avp_agents.transport.server.bodies import read_fields
from avp_agents.transport.server.service import Service
from avp_agents.transport.wire import describe


class ContextRoutes:
    """Handlers; each takes a request and returns a response.

    Args:
        service: What they work with.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def list(self, request: Request) -> ASGIApp:
        """``?scope=`` to ``{"handles"}``, oldest first."""
        tenant = await self._service.tenant(request)
        handles = await tenant.store.alist(scope=request.query_params.get("scope"))
        return JSONResponse({"handles": [handle.to_state() for handle in handles]})

    async def get(self, request: Request) -> ASGIApp:
        """``?scope=`` to the context's description."""
        tenant = await self._service.tenant(request)
        scope = request.query_params.get("scope")
        context = await tenant.engine.aresolve(reference(request), scope=scope)
        ids = [tenant.store.namespace.handle_id(recipe_id, scope or "") for recipe_id in context.recipe_ids]
        return JSONResponse(describe(context, context.to_handle(), {}, ids).to_json())

    async def put(self, request: Request) -> ASGIApp:
        """``{"scope"?, "agent"?, "text"?, "seconds"?}`` to ``{"handle"}``: a handle of its own, to stay."""
        tenant = await self._service.tenant(request)
        fields = await read_fields(request, self._service.limits.body_bytes)
        scope, agent, text = (fields.get(name, str, "") for name in ("scope", "agent", "text"))
        seconds = fields.get("seconds", float)
        fields.end()
        context = await tenant.engine.aresolve(reference(request))
        handle = await tenant.keep(context, scope=scope, agent=agent, text=text, seconds=seconds)
        return JSONResponse({"handle": handle.to_state()})

    async def held(self, request: Request) -> ASGIApp:
        """``{"found"}``: whether the context is there; does not count as a use."""
        tenant = await self._service.tenant(request)
        return JSONResponse({"found": await tenant.store.acontains(reference(request))})

    async def touch(self, request: Request) -> ASGIApp:
        """``{"found"}``, and counts as a use."""
        tenant = await self._service.tenant(request)
        return JSONResponse({"found": await tenant.store.atouch(reference(request))})

    async def delete(self, request: Request) -> ASGIApp:
        """``{"found"}``: whether it was there."""
        tenant = await self._service.tenant(request)
        return JSONResponse({"found": await tenant.store.adelete(reference(request))})

    async def drop_kv(self, request: Request) -> ASGIApp:
        """``{"bytes"}`` that dropping the KV-cache freed."""
        tenant = await self._service.tenant(request)
        return JSONResponse({"bytes": await tenant.store.adrop_kv(reference(request))})

    async def pin(self, request: Request) -> ASGIApp:
        """``{}``; the context is spared from eviction."""
        tenant = await self._service.tenant(request)
        await tenant.store.apin(reference(request))
        return JSONResponse({})

    async def unpin(self, request: Request) -> ASGIApp:
        """``{}``."""
        tenant = await self._service.tenant(request)
        await tenant.store.aunpin(reference(request))
        return JSONResponse({})

    async def discard(self, request: Request) -> ASGIApp:
        """``{"handles", "idle"?, "dry_run"?}`` to what was removed."""
        tenant = await self._service.tenant(request)
        fields = await read_fields(request, self._service.limits.body_bytes)
        handles, idle = fields.require("handles", list), fields.get("idle", float, 0.0)
        dry_run = fields.get("dry_run", bool, False)
        fields.end()
        if not all(isinstance(handle, str | dict) for handle in handles):
            raise InvalidHandleError("'handles' must be a list of handles.")
        return JSONResponse(asdict(await tenant.store.adiscard(handles, idle=idle, dry_run=dry_run)))

    async def prune(self, request: Request) -> ASGIApp:
        """What was removed because it had outlived its time or the budget."""
        tenant = await self._service.tenant(request)
        return JSONResponse(asdict(await tenant.store.aprune()))

    async def stats(self, request: Request) -> ASGIApp:
        """What the namespace's store holds."""
        tenant = await self._service.tenant(request)
        return JSONResponse(asdict(await tenant.store.astats()))


def reference(request: Request) -> ContextHandle:
    """The context that the path names; untrusted.

    Raises:
        InvalidHandleError: It is not a handle's id.
    """
    return ContextHandle(id=request.path_params["reference"])
