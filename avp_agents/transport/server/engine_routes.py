"""Think, generate, replay, count and cancel: the Engine protocol over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from contextlib import aclosing
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from avp_agents.errors import AvpError, RequestTimeoutError
from avp_agents.transport.json_fields import Fields
from avp_agents.transport.problems import error_json, status_of
from avp_agents.transport.server.bodies import read_fields
from avp_agents.transport.server.options import GENERATE_OPTIONS, THINK_OPTIONS, read_options
from avp_agents.transport.server.service import Service
from avp_agents.transport.server.streaming import Emit, EventStream, while_connected
from avp_agents.transport.server.tenants import Tenant
from avp_agents.transport.wire import REQUEST_ID_HEADER, Json, chunk_to_json, generation_to_json


class EngineRoutes:
    """Handlers; each takes a request and returns a response.

    Args:
        service: What they work with.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def think(self, request: Request) -> ASGIApp:
        """``{"prompt", "context"?, "steps"?, "options"?}`` to the description of a context."""
        tenant = await self._service.tenant(request)
        fields = await read_fields(request, self._service.limits.body_bytes)
        prompt, given = fields.anything("prompt"), fields.get("context", str)
        steps, options = fields.get("steps", int, 20), self._options(fields, THINK_OPTIONS, tenant)
        fields.end()

        async def work() -> Json:
            async with tenant.cancellable(request.headers.get(REQUEST_ID_HEADER)):
                asked = await tenant.prompt(prompt, given)
                context = await tenant.engine.athink(asked.prompt, steps=steps, context=asked.context, **options)
                self._service.note_usage(context.usage)
                return (await tenant.keep_result(context, asked.known)).to_json()

        return JSONResponse(await while_connected(request.receive, work()))

    async def generate(self, request: Request) -> ASGIApp:
        """``{"prompt", "context"?, "options"?}`` to the events ``chunk``, ..., ``generation``."""
        tenant = await self._service.tenant(request)
        fields = await read_fields(request, self._service.limits.body_bytes)
        prompt, given = fields.anything("prompt"), fields.get("context", str)
        options = self._options(fields, GENERATE_OPTIONS, tenant)
        fields.end()

        async def produce(emit: Emit) -> None:
            async with tenant.cancellable(request.headers.get(REQUEST_ID_HEADER)):
                asked = await tenant.prompt(prompt, given)
                stream = tenant.engine.astream(asked.prompt, context=asked.context, **options)
                async with aclosing(stream) as chunks:
                    async for chunk in chunks:
                        if chunk.generation is None:
                            emit(_event("chunk", chunk_to_json(chunk)))
                            continue
                        self._service.note_usage(chunk.generation.usage)
                        described = await tenant.keep_result(chunk.generation.context, asked.known)
                        answer = generation_to_json(chunk.generation, described)
                        emit(_event("generation", {"last": chunk_to_json(chunk), "generation": answer}))

        return EventStream(produce, _error_event)

    async def replay(self, request: Request) -> ASGIApp:
        """``{"context"}`` to its description, its KV-cache rebuilt."""
        tenant = await self._service.tenant(request)
        fields = await read_fields(request, self._service.limits.body_bytes)
        reference = fields.require("context", str)
        fields.end()

        async def work() -> Json:
            async with tenant.cancellable(request.headers.get(REQUEST_ID_HEADER)), self._deadline():
                asked = await tenant.prompt([], reference)
                assert asked.context is not None
                context = await tenant.engine.areplay(asked.context)
                self._service.note_usage(context.usage)
                return (await tenant.keep_result(context, asked.known)).to_json()

        return JSONResponse(await while_connected(request.receive, work()))

    async def join(self, request: Request) -> ASGIApp:
        """``{"contexts", "strategy"?, "timeout"?, "source"?}`` to the description of one context of them all."""
        tenant = await self._service.tenant(request)
        fields = await read_fields(request, self._service.limits.body_bytes)
        references, strategy = fields.require("contexts", list), fields.get("strategy", str, "replay")
        seconds = self._service.allowed_seconds(fields.anything("timeout"))
        source = tenant.source(fields.get("source", str, ""))
        fields.end()

        async def work() -> Json:
            async with tenant.cancellable(request.headers.get(REQUEST_ID_HEADER)):
                contexts = await tenant.contexts(references)
                joined = await tenant.engine.ajoin(
                    list(contexts.values()), strategy=cast("Any", strategy), timeout=seconds, source=source
                )
                self._service.note_usage(joined.usage)
                return (await tenant.keep_result(joined, contexts)).to_json()

        return JSONResponse(await while_connected(request.receive, work()))

    async def count(self, request: Request) -> ASGIApp:
        """``{"prompt", "chat_template_kwargs"?, "tools"?}`` to ``{"tokens"}``."""
        tenant = await self._service.tenant(request)
        fields = await read_fields(request, self._service.limits.body_bytes)
        prompt, template = fields.anything("prompt"), fields.get("chat_template_kwargs", dict)
        tools = fields.get("tools", list, [])
        fields.end()
        asked = await tenant.prompt(prompt, None)
        count = tenant.engine.count_tokens
        tokens = await asyncio.to_thread(count, asked.prompt, chat_template_kwargs=template, tools=tools)
        return JSONResponse({"tokens": tokens})

    async def encode(self, request: Request) -> ASGIApp:
        """``{"text"}`` to ``{"ids"}``."""
        tenant = await self._service.tenant(request)
        fields = await read_fields(request, self._service.limits.body_bytes)
        text = fields.require("text", str)
        fields.end()
        return JSONResponse({"ids": await asyncio.to_thread(tenant.engine.encode, text)})

    async def cancel(self, request: Request) -> ASGIApp:
        """``{"cancelled"}``: whether a request of that name was running."""
        tenant = await self._service.tenant(request)
        return JSONResponse({"cancelled": tenant.cancel(request.path_params["request_id"])})

    def _options(self, fields: Fields, known: Iterable[str], tenant: Tenant) -> Any:
        """The engine's options, with a timeout within the server's, and a source within the namespace."""
        options = read_options(fields.get("options", dict, {}), known)
        seconds = self._service.allowed_seconds(options.get("timeout"))
        return options | {"timeout": seconds, "source": tenant.source(options.get("source") or "")}

    def _deadline(self) -> Any:
        return _Deadline(self._service.limits.request_seconds)


class _Deadline:
    """A time limit that ends in the engine's own error."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._timeout = seconds, asyncio.timeout(seconds)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *exc_info: Any) -> None:
        try:
            await self._timeout.__aexit__(*exc_info)
        except TimeoutError as error:
            raise RequestTimeoutError(f"The request did not finish within {self._seconds:.3g} s.") from error


def _event(name: str, data: Json) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _error_event(error: AvpError) -> bytes:
    return _event("error", error_json(error, status_of(error)))
