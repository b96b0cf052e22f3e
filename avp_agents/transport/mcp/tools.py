"""The tools: think, generate, describe, delete."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import mcp_types as types

from avp_agents.context import Context
from avp_agents.errors import ConfigurationError, ContextLostError
from avp_agents.handle import ContextHandle
from avp_agents.transport.json_fields import Fields
from avp_agents.transport.mcp.asking import SCOPE, Asking, described, explained, resolved, tenant_of
from avp_agents.transport.mcp.names import ERROR_KEY
from avp_agents.transport.server.service import Service
from avp_agents.transport.server.tenants import Tenant
from avp_agents.transport.wire import Json

_CONTEXT = {"type": "string", "description": "A context's handle id, as `think` and `generate` return it."}
_PROMPT = {"type": "string", "description": "What the user says."}
_HANDLE = {"type": "object", "description": "The context's handle; its id is the resource's URI."}
_DESCRIPTION: Json = {
    "handle": _HANDLE,
    "model": {"type": "string"},
    "positions": {"type": "integer", "description": "Tokens and latent steps that it holds."},
    "latent_steps": {"type": "integer"},
    "lineage_bytes": {"type": "integer"},
    "kv_bytes": {"type": ["integer", "null"]},
}


def _object(properties: Json, required: list[str]) -> Json:
    return {"type": "object", "properties": properties, "required": required}


def _arguments(properties: Json, required: list[str]) -> Json:
    return _object(properties, required) | {"additionalProperties": False}


_DESCRIBED = _object(_DESCRIPTION, list(_DESCRIPTION))
TOOLS = [
    types.Tool(
        name="think",
        title="Think in latent steps",
        description=(
            "Let the model think about a prompt without writing anything. Returns a context that holds the thought: "
            "pass its handle id to `generate` for an answer in words, or to `think` to think on."
        ),
        input_schema=_arguments(
            {
                "prompt": _PROMPT,
                "context": _CONTEXT,
                "steps": {"type": "integer", "minimum": 0, "description": "Latent steps; 10 to 20 are usual."},
            },
            ["prompt"],
        ),
        output_schema=_DESCRIBED,
        annotations=types.ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=True),
    ),
    types.Tool(
        name="generate",
        title="Answer on top of a context",
        description=(
            "Let the model write, on top of a context if one is given. Without a prompt it goes on with the context, "
            "and says in words what it holds."
        ),
        input_schema=_arguments(
            {
                "prompt": _PROMPT,
                "context": _CONTEXT,
                "max_tokens": {"type": "integer", "minimum": 1},
                "temperature": {"type": "number", "minimum": 0, "description": "0, the default, is greedy."},
            },
            [],
        ),
        output_schema=_object(
            {
                "text": {"type": "string"},
                "finish_reason": {"type": "string"},
                "context": _DESCRIBED,
                "handoff": {"type": "object", "description": "How the given context was used."},
            },
            ["text", "finish_reason", "context", "handoff"],
        ),
        annotations=types.ToolAnnotations(read_only_hint=False, destructive_hint=False),
    ),
    types.Tool(
        name="describe",
        title="Describe a context",
        description="Which model a context is of, and how large it is.",
        input_schema=_arguments({"context": _CONTEXT}, ["context"]),
        output_schema=_DESCRIBED,
        annotations=types.ToolAnnotations(read_only_hint=True),
    ),
    types.Tool(
        name="delete",
        title="Delete a context",
        description="Delete a context; its handle then leads nowhere.",
        input_schema=_arguments({"context": _CONTEXT}, ["context"]),
        output_schema=_object({"deleted": {"type": "boolean"}}, ["deleted"]),
        annotations=types.ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=True),
    ),
]

_Tool = Callable[[Tenant, Fields], Awaitable[types.CallToolResult]]


class ContextTools:
    """Handlers of ``tools/list`` and ``tools/call``.

    Args:
        service: What they work with.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tools: dict[str, _Tool] = {
            "think": self._think,
            "generate": self._generate,
            "describe": self._describe,
            "delete": self._delete,
        }

    async def list(self, asking: Asking, params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        """All of them."""
        return types.ListToolsResult(tools=TOOLS)

    async def call(self, asking: Asking, params: types.CallToolRequestParams) -> types.CallToolResult:
        """Call one. An error is a result that says so; its ``_meta`` has the class."""
        try:
            tool = self._tools.get(params.name)
            if tool is None:
                known = ", ".join(self._tools)
                raise ConfigurationError(f"There is no tool {params.name[:60]!r}; there are {known}.")
            fields = Fields(params.arguments or {}, "The arguments")
            return await tool(await tenant_of(self._service, asking), fields)
        except Exception as error:
            text, told = explained(error)
            return types.CallToolResult(
                content=[types.TextContent(text=text)], is_error=True, _meta={ERROR_KEY: told["error"]}
            )

    async def _think(self, tenant: Tenant, fields: Fields) -> types.CallToolResult:
        prompt, given, steps = fields.require("prompt", str), fields.get("context", str), fields.get("steps", int, 20)
        fields.end()
        base = None if given is None else await resolved(tenant, given)
        context = await tenant.engine.athink(prompt, steps=steps, context=base, **self._admission(tenant))
        self._service.note_usage(context.usage)
        handle = await self._keep(tenant, context, prompt)
        told = described(context, handle, self._service.model)
        text = (
            f"Thought {told['latent_steps']} latent steps, without words. The context {handle.id} holds the thought: "
            "pass this id to `generate` as its `context`."
        )
        return _result(text, told, handle)

    async def _generate(self, tenant: Tenant, fields: Fields) -> types.CallToolResult:
        prompt, given = fields.get("prompt", str), fields.get("context", str)
        max_tokens, temperature = fields.get("max_tokens", int), fields.get("temperature", float, 0.0)
        fields.end()
        if prompt is None and given is None:
            raise ConfigurationError("generate needs a prompt, a context, or both.")
        base = None if given is None else await resolved(tenant, given)
        options = self._admission(tenant) | {"max_tokens": max_tokens, "temperature": temperature}
        answer = await tenant.engine.agenerate([] if prompt is None else prompt, context=base, **options)
        self._service.note_usage(answer.usage)
        handle = await self._keep(tenant, answer.context, " ".join(answer.text.split()))
        told = {
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "context": described(answer.context, handle, self._service.model),
            "handoff": answer.handoff.to_metadata(),
        }
        return _result(answer.text, told, handle)

    async def _describe(self, tenant: Tenant, fields: Fields) -> types.CallToolResult:
        given = fields.require("context", str)
        fields.end()
        context = await resolved(tenant, given)
        handle = context.to_handle()
        told = described(context, handle, self._service.model)
        text = f"{told['positions']} positions of {told['model']}, {told['latent_steps']} of them latent steps."
        return _result(text, told, handle)

    async def _delete(self, tenant: Tenant, fields: Fields) -> types.CallToolResult:
        given = fields.require("context", str)
        fields.end()
        try:
            await resolved(tenant, given)
        except ContextLostError:
            deleted = False
        else:
            deleted = await tenant.store.adelete(ContextHandle(id=given))
        text = "Deleted." if deleted else "There was no such context."
        return types.CallToolResult(content=[types.TextContent(text=text)], structured_content={"deleted": deleted})

    async def _keep(self, tenant: Tenant, context: Context, line: str) -> ContextHandle:
        return await tenant.keep(context, scope=SCOPE, text=line, seconds=self._service.limits.context_seconds)

    def _admission(self, tenant: Tenant) -> Any:
        return {"timeout": self._service.allowed_seconds(None), "source": tenant.source("mcp")}


def _result(text: str, told: Json, handle: ContextHandle) -> types.CallToolResult:
    link = types.ResourceLink(
        name=handle.id, uri=handle.id, mime_type="text/plain", description=handle.text or "A context."
    )
    return types.CallToolResult(content=[types.TextContent(text=text), link], structured_content=told)
