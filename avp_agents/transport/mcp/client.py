"""The client: contexts and latent thinking that an MCP server offers, for a graph in this process."""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import httpx2
import mcp_types as types
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

from avp_agents.context import Context
from avp_agents.crossing.take_in import AsyncFetch, Offer, atake_in
from avp_agents.crossing.thought import TELL
from avp_agents.errors import AvpError, TransportError
from avp_agents.handle import ContextHandle
from avp_agents.protocol.handshake import CrossingMode, Hello, Link, LinkMeter, Shipment
from avp_agents.protocol.limits import Limits
from avp_agents.transport.json_fields import Fields, parse_json
from avp_agents.transport.mcp.names import ERROR_KEY, EXTENSION
from avp_agents.transport.problems import error_from_json
from avp_agents.transport.wire import Json, frame_key, handoff_from_json
from avp_agents.usage import Handoff

if TYPE_CHECKING:
    from avp_agents.engine.latent_engine import LatentEngine

CONNECT_SECONDS = 10.0
MAX_RESOURCE_BYTES = 64 * 2**20
"""Largest payload that is taken; as base64 in one event."""
_MAX_EVENT = MAX_RESOURCE_BYTES // 3 * 4 + 2**16
_LIMITS = Limits(frame_bytes=MAX_RESOURCE_BYTES, value_bytes=4 * MAX_RESOURCE_BYTES, head_bytes=MAX_RESOURCE_BYTES)


@dataclass(frozen=True)
class McpAnswer:
    """What a server's model wrote.

    Attributes:
        text: The words.
        finish_reason: ``"stop"`` or ``"length"``.
        handle: Of the context that includes the answer; on the server.
        handoff: How the given context was used there.
    """

    text: str
    finish_reason: str
    handle: ContextHandle
    handoff: Handoff


class McpContexts:
    """The contexts of an `avp-agents serve --mcp`, over MCP. Use it as an asynchronous context manager.

    A server that does not speak the extension can be read from, too: `hand_over` takes any of its text resources.

    Args:
        url: The MCP endpoint, such as ``http://127.0.0.1:8300/mcp``.
        token: Bearer token; it opens a namespace.
        seconds: How long an answer may take.

    Raises (each method):
        TransportError: The server cannot be reached, or its answer makes no sense.
        AvpError: As the server reports it.

    Example:
        >>> async with McpContexts("http://127.0.0.1:8300/mcp", token=token) as researcher:
        ...     handle = await researcher.think("Read this report. ...", steps=20)
        ...     context = await researcher.hand_over(handle, engine)
        >>> engine.generate("Who built the lighthouse?", context=context).text
    """

    def __init__(self, url: str, *, token: str | None = None, seconds: float = 600.0) -> None:
        self.url = url
        self._seconds, self._key = seconds, frame_key(token)
        self._headers = {"authorization": f"Bearer {token}"} if token is not None else {}
        self._meter = LinkMeter()
        self._stack = AsyncExitStack()
        self._entered: Client | None = None
        self._told: tuple[Hello, int] | None = None

    async def __aenter__(self) -> Self:
        timeout = httpx2.Timeout(self._seconds, connect=CONNECT_SECONDS)
        async with AsyncExitStack() as stack:
            with _translated(self.url):
                http = await stack.enter_async_context(
                    httpx2.AsyncClient(headers=self._headers, timeout=timeout, trust_env=False)
                )
                transport = streamable_http_client(self.url, http_client=http, max_sse_event_size=_MAX_EVENT)
                client = Client(transport, read_timeout_seconds=self._seconds, cache=None)
                self._entered = await stack.enter_async_context(client)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        self._entered = None
        await self._stack.aclose()

    @property
    def speaks_extension(self) -> bool:
        """Whether the server offers contexts; a server that does not offers text."""
        return EXTENSION in (self._client.server_capabilities.extensions or {})

    async def think(self, prompt: str, *, steps: int = 20, context: ContextHandle | str | None = None) -> ContextHandle:
        """Let the server's model think; nothing is decoded. The handle is the server's."""
        told = await self._call("think", prompt=prompt, steps=steps, context=_id(context))
        return ContextHandle.from_state(told.require("handle", dict))

    async def generate(
        self,
        prompt: str | None = None,
        *,
        context: ContextHandle | str | None = None,
        max_tokens: int | None = None,
        temperature: float = 0.0,
    ) -> McpAnswer:
        """Let the server's model answer, on top of a context of the server's if one is given."""
        told = await self._call(
            "generate", prompt=prompt, context=_id(context), max_tokens=max_tokens, temperature=temperature
        )
        described = Fields(told.require("context", dict), "The answer's context")
        return McpAnswer(
            text=told.require("text", str),
            finish_reason=told.require("finish_reason", str),
            handle=ContextHandle.from_state(described.require("handle", dict)),
            handoff=handoff_from_json(told.require("handoff", dict)),
        )

    async def describe(self, context: ContextHandle | str) -> Json:
        """What the server says of a context: model, positions, bytes."""
        return await self._structured("describe", {"context": _id(context)})

    async def delete(self, context: ContextHandle | str) -> bool:
        """Delete a context on the server; False if it was not there."""
        return (await self._call("delete", context=_id(context))).require("deleted", bool)

    async def hand_over(
        self,
        context: ContextHandle | str,
        target: LatentEngine,
        *,
        mode: CrossingMode | None = None,
        text_tokens: int = 256,
    ) -> Context:
        """A context of `target` that goes on from one on the server.

        Args:
            context: Its handle or URI. Of a server that does not speak the extension, the URI of a text resource.
            target: The engine that goes on.
            mode: How; by default as the handshake chooses for the measured link and prefill speed.
            text_tokens: Most tokens of the source's text, where only text crosses.

        Returns:
            The context; its `handoff` tells mode, reason, bytes and milliseconds.

        Raises:
            HandshakeError: The two models cannot use that mode.
            ContextLostError: The server does not have the context.
        """
        uri = _id(context) or ""
        if self.speaks_extension:
            link = await self._link() if mode is None else Link()
            offer = await self._offer(uri, text_tokens, link)
        else:
            offer = Offer[AsyncFetch](None, {"text": partial(self._read, uri)}, speaker="user")
        return (await atake_in(offer, target.crossing, target.replay, mode=mode)).context

    async def _offer(self, uri: str, text_tokens: int, link: Link) -> Offer[AsyncFetch]:
        shipment = Shipment.from_wire(await self.describe(uri))
        hello, most = await self._greeted()
        if shipment.kv_bytes is not None and shipment.kv_bytes + shipment.lineage_bytes > most:
            shipment = replace(shipment, kv_bytes=None)
        payloads: dict[CrossingMode, AsyncFetch] = {
            "kv": partial(self._read, f"{uri}/kv"),
            "replay": partial(self._read, f"{uri}/frame"),
            "projection": partial(self._read, f"{uri}/thought"),
            "text": partial(self._words, uri, text_tokens),
        }
        return Offer(hello, payloads, shipment, link=link, key=self._key, limits=_LIMITS)

    async def _words(self, uri: str, text_tokens: int) -> str:
        return (await self.generate(TELL, context=uri, max_tokens=text_tokens)).text

    async def _link(self) -> Link:
        """How fast resources come; measured at the first call, and by every read since."""
        if (known := self._meter.link) is None:
            for uri in ("avp:handshake", "avp:probe"):
                await self._read(uri)
            known = self._meter.link
        return known or Link()

    async def _greeted(self) -> tuple[Hello, int]:
        """The server's side of the handshake, and the largest resource that it gives."""
        if self._told is None:
            told = Fields(parse_json(bytes(await self._read("avp:handshake"))), "The server's handshake")
            most = min(told.require("resource_bytes", int), MAX_RESOURCE_BYTES)
            self._told = Hello.from_wire(told.require("hello", dict)), most
        return self._told

    async def _read(self, uri: str) -> bytearray:
        """A resource's bytes; of several contents, all of them, a line apart."""
        started = time.perf_counter()
        with _translated(self.url):
            result = await self._client.read_resource(uri)
        data = b"\n".join(_bytes(content) for content in result.contents)
        self._meter.note(len(data), time.perf_counter() - started)
        return bytearray(data)

    async def _call(self, tool: str, **arguments: Any) -> Fields:
        return Fields(await self._structured(tool, arguments), f"The answer of {tool}")

    async def _structured(self, tool: str, arguments: Mapping[str, Any]) -> Json:
        given = {name: value for name, value in arguments.items() if value is not None}
        with _translated(self.url):
            result = await self._client.call_tool(tool, given)
        assert isinstance(result, types.CallToolResult), "this client answers no questions of a server"
        if result.is_error:
            raise _error(result)
        if not isinstance(result.structured_content, dict):
            raise TransportError(f"The tool {tool!r} of {self.url} does not answer as this extension's does.")
        return result.structured_content

    @property
    def _client(self) -> Client:
        if self._entered is None:
            raise TransportError("McpContexts is not connected; use it as: async with McpContexts(url) as contexts")
        return self._entered


def _id(context: ContextHandle | str | None) -> str | None:
    return context.id if isinstance(context, ContextHandle) else context


def _bytes(content: types.TextResourceContents | types.BlobResourceContents) -> bytes:
    if isinstance(content, types.TextResourceContents):
        return content.text.encode()
    try:
        return base64.b64decode(content.blob, validate=True)
    except (binascii.Error, ValueError) as error:
        raise TransportError("The server sent a resource that is not base64.") from error


def _error(result: types.CallToolResult) -> AvpError:
    told = (result.meta or {}).get(ERROR_KEY)
    if isinstance(told, dict):
        return error_from_json(0, {"error": told})
    text = " ".join(content.text for content in result.content if isinstance(content, types.TextContent))
    return TransportError(f"The server's tool failed: {text}")


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Errors of MCP and of HTTP as ours."""
    try:
        yield
    except MCPError as error:
        if isinstance(error.data, dict) and "error" in error.data:
            raise error_from_json(0, error.data) from error
        raise TransportError(f"{url} answers: {error}") from error
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise TransportError(f"{url} cannot be reached over MCP: {str(error) or type(error).__name__}.") from error
    except BaseExceptionGroup as group:
        raise TransportError(f"{url} cannot be reached over MCP: {_first(group)}.") from group


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
