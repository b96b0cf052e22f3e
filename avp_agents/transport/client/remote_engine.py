"""RemoteEngine: the engine of an `avp-agents serve`, used like one in this process."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import asdict
from functools import cached_property
from typing import Any, Self, Unpack
from urllib.parse import quote
from weakref import WeakKeyDictionary

import httpx

from avp_agents.answer.generation import Chunk, Generation
from avp_agents.answer.options import GenerateOptions, ThinkOptions
from avp_agents.answer.tool_format import ToolDefinition, ToolFormat
from avp_agents.context import Context
from avp_agents.engine.protocol import JoinStrategy
from avp_agents.errors import RequestTimeoutError, TransportError
from avp_agents.prompt.chat_messages import Message, Prompt
from avp_agents.protocol.handshake import Link
from avp_agents.store.base import AnyHandle, id_of_handle
from avp_agents.transport.client.connection import Connection, Event, cancelling
from avp_agents.transport.client.frames import fetch_context, send_context
from avp_agents.transport.client.remote_context import RemoteContext, remote_context
from avp_agents.transport.client.remote_store import RemoteNamespace, RemoteStore
from avp_agents.transport.client.server_info import ServerInfo
from avp_agents.transport.json_fields import Fields
from avp_agents.transport.wire import (
    API,
    ContextDescription,
    Json,
    chunk_from_json,
    generation_from_json,
    prompt_to_json,
)

PROBE_BYTES = (0, 0, 2**16, 2**18, 2**20, 2**22)
"""Downloads that measure a link, until one takes long enough to tell."""
PROBE_SECONDS = 0.02


class RemoteEngine:
    """Implements `avp_agents.engine.protocol.Engine` with the engine of a server. Thread-safe; works on any event loop.

    Contexts stay on the server; a context here knows its lineage and fetches latent values when somebody looks. What a
    request made lasts there for an hour after its last use, unless ``store.put`` keeps it. Contexts that were made
    elsewhere with the same model are sent when they are used.

    Errors are those of the engine on the server. Nothing is retried.

    Args:
        url: ``http://host:port`` or ``https://...``.
        token: Bearer token; the namespace is the one that it opens.
        seconds: How long an answer, or the next piece of one, may take.
        http2: Speak HTTP/2. Without TLS this is by prior knowledge; switch it off for proxies that know HTTP/1.1 only.
        verify: A file of certificates to trust instead of the system's, for a self-signed one.
        transport: Of httpx, for synchronous calls.

    Example:
        >>> engine = RemoteEngine("http://127.0.0.1:8300", token=token)
        >>> context = engine.think("Analyze: 24 * 17 + 3", steps=20)
        >>> engine.generate("Solve step by step: 24 * 17 + 3", context=context).text
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        seconds: float = 600.0,
        http2: bool = True,
        verify: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.connection = Connection(url, token=token, seconds=seconds, http2=http2, verify=verify, transport=transport)
        self._sent: WeakKeyDictionary[Context, RemoteContext] = WeakKeyDictionary()

    @cached_property
    def info(self) -> ServerInfo:
        """What the server said of itself; the first look asks it.

        Raises:
            TransportError: It cannot be reached.
            AuthenticationError: It does not know the token.
        """
        return ServerInfo.from_json(self.connection.ask("POST", f"{API}/handshake", {}))

    @property
    def fingerprint(self) -> str:
        """Digest of weights, architecture and tokenizer."""
        return self.info.hello.fingerprint

    @property
    def dtype(self) -> str:
        """``"float32"``, ``"bfloat16"`` or ``"float16"``."""
        return self.info.hello.dtype

    @property
    def model_path(self) -> str:
        """The name that the server gives its model."""
        return self.info.model

    @property
    def context_window(self) -> int:
        """Positions the model supports."""
        return self.info.context_window

    @property
    def store(self) -> RemoteStore:
        """The server's."""
        return self._store

    @cached_property
    def _store(self) -> RemoteStore:
        namespace = RemoteNamespace(self.info.namespace, self.info.tag)
        return RemoteStore(
            self.connection, namespace, self._reference, lambda handle, scope: self.resolve(handle, scope=scope)
        )

    def link(self) -> Link:
        """How fast bytes come from the server; measured at the first call, and by every transfer since."""
        if (known := self.connection.meter.link) is not None:
            return known
        for size in PROBE_BYTES:
            started = time.perf_counter()
            self.connection.get_bytes(f"{API}/probe", {"bytes": str(size)})
            if size and time.perf_counter() - started > PROBE_SECONDS:
                break
        return self.connection.meter.link or Link()

    @property
    def tool_format(self) -> ToolFormat:
        """How the model writes tool calls."""
        return self.info.tool_format

    def count_tokens(
        self,
        prompt: Prompt,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[ToolDefinition] = (),
    ) -> int:
        """Positions of the rendered prompt, its tools included."""
        body: Json = {"prompt": prompt_to_json(prompt, self._reference), "tools": list(tools)}
        body["chat_template_kwargs"] = dict(chat_template_kwargs) if chat_template_kwargs is not None else None
        return Fields(self.connection.ask("POST", f"{API}/count", body)).require("tokens", int)

    def encode(self, text: str) -> list[int]:
        """The ids of a text as message content."""
        return Fields(self.connection.ask("POST", f"{API}/encode", {"text": text})).require("ids", list)

    def think(
        self, prompt: Prompt, *, steps: int = 20, context: Context | None = None, **options: Unpack[ThinkOptions]
    ) -> RemoteContext:
        """See `LatentEngine.think`."""
        return self._work("think", self._asking(prompt, context, options) | {"steps": steps}, prompt, context)

    def generate(
        self, prompt: Prompt, *, context: Context | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """See `LatentEngine.generate`."""
        with closing(self.stream(prompt, context=context, **options)) as chunks:
            return _generation(list(chunks))

    def stream(
        self, prompt: Prompt, *, context: Context | None = None, **options: Unpack[GenerateOptions]
    ) -> Generator[Chunk, None, None]:
        """See `LatentEngine.stream`. The request begins with the first chunk that is asked for."""
        body = self._asking(prompt, context, options)
        with closing(self.connection.events(f"{API}/generate", body, _request_id())) as events:
            for event in events:
                yield self._chunk(event, prompt, context)

    def replay(self, context: Context) -> RemoteContext:
        """See `LatentEngine.replay`."""
        return self._work("replay", {"context": self._reference(context)}, [], context)

    def join(
        self,
        contexts: Sequence[Context],
        *,
        strategy: JoinStrategy = "replay",
        timeout: float | None = None,
        source: str = "",
    ) -> RemoteContext:
        """See `LatentEngine.join`."""
        body = self._joining(contexts, strategy, timeout, source)
        return self._work("join", body, [{"context": context} for context in contexts], None)

    def resolve(self, handle: AnyHandle, *, scope: str | None = None) -> RemoteContext:
        """See `LatentEngine.resolve`."""
        query = "" if scope is None else f"?scope={quote(scope, safe='')}"
        path = f"{API}/contexts/{quote(id_of_handle(handle), safe='')}{query}"
        return self._resolved(self.connection.ask("GET", path), scope)

    async def athink(
        self, prompt: Prompt, *, steps: int = 20, context: Context | None = None, **options: Unpack[ThinkOptions]
    ) -> RemoteContext:
        """Asynchronous `think`; cancelling the task frees the sequence."""
        await self._greeted()
        body = await asyncio.to_thread(self._asking, prompt, context, options)
        return await self._awork("think", body | {"steps": steps}, prompt, context)

    async def agenerate(
        self, prompt: Prompt, *, context: Context | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Asynchronous `generate`; cancelling the task frees the sequence."""
        async with aclosing(self.astream(prompt, context=context, **options)) as chunks:
            return _generation([chunk async for chunk in chunks])

    async def astream(
        self, prompt: Prompt, *, context: Context | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Chunk, None]:
        """Asynchronous `stream`; closing the generator frees the sequence."""
        await self._greeted()
        body = await asyncio.to_thread(self._asking, prompt, context, options)
        async with aclosing(self.connection.aevents(f"{API}/generate", body, _request_id())) as events:
            async for event in events:
                yield self._chunk(event, prompt, context)

    async def areplay(self, context: Context) -> RemoteContext:
        """Asynchronous `replay`."""
        body = {"context": await asyncio.to_thread(self._reference, context)}
        return await self._awork("replay", body, [], context)

    async def ajoin(
        self,
        contexts: Sequence[Context],
        *,
        strategy: JoinStrategy = "replay",
        timeout: float | None = None,
        source: str = "",
    ) -> RemoteContext:
        """Asynchronous `join`."""
        body = await asyncio.to_thread(self._joining, contexts, strategy, timeout, source)
        return await self._awork("join", body, [{"context": context} for context in contexts], None)

    async def aresolve(self, handle: AnyHandle, *, scope: str | None = None) -> RemoteContext:
        """Asynchronous `resolve`."""
        return await asyncio.to_thread(self.resolve, handle, scope=scope)

    def fetch(self, context: Context | AnyHandle, *, kv: bool = False, scope: str | None = None) -> Context:
        """All values of a context on the server, for an engine in this process that runs the same model.

        A transfer that breaks off goes on where it stopped.

        Args:
            context: One of the server's, or its handle.
            kv: Fetch the KV-cache too, if the server has it.
            scope: The scope that a handle must have been minted for.

        Raises:
            ContextLostError: The server does not have it.
            FrameError: What came is not the frame that was sent.
        """
        handle = self._reference(context) if isinstance(context, Context) else id_of_handle(context)
        return fetch_context(self.connection, handle, kv=kv, scope=scope)

    def send(self, context: Context, *, kv: bool = False) -> RemoteContext:
        """Send a context that an engine in this process made; the result stands for it on the server.

        Args:
            context: Of the same model and dtype.
            kv: Send the KV-cache too, if it has one; without it the server replays the lineage.

        Raises:
            FingerprintMismatchError: The server runs another model or dtype.
            LimitExceededError: It is larger than the server takes.
        """
        return self._remote(send_context(self.connection, context, kv=kv), [])

    def close(self) -> None:
        """Close the connections; the server and its contexts stay."""
        self.connection.close()

    async def aclose(self) -> None:
        """Close the connections of this event loop; the server and its contexts stay."""
        await self.connection.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _work(self, what: str, body: Json, prompt: Prompt, context: Context | None) -> RemoteContext:
        """A request that is answered with a context."""
        request_id = _request_id()
        try:
            answer = self.connection.ask("POST", f"{API}/{what}", body, request_id=request_id)
        except (RequestTimeoutError, KeyboardInterrupt, SystemExit):
            self.connection.cancel(request_id)
            raise
        return self._remote(answer, self._named(prompt, context))

    async def _awork(self, what: str, body: Json, prompt: Prompt, context: Context | None) -> RemoteContext:
        request_id = _request_id()
        async with cancelling(self.connection, request_id):
            answer = await self.connection.aask("POST", f"{API}/{what}", body, request_id=request_id)
        return self._remote(answer, self._named(prompt, context))

    def _asking(self, prompt: Prompt, context: Context | None, options: Mapping[str, Any]) -> Json:
        reference = self._reference
        return {
            "prompt": prompt_to_json(prompt, reference),
            "context": None if context is None else reference(context),
            "options": {name: _option_to_json(value) for name, value in options.items()},
        }

    def _joining(self, contexts: Sequence[Context], strategy: str, timeout: float | None, source: str) -> Json:
        references = [self._reference(context) for context in contexts]
        return {"contexts": references, "strategy": strategy, "timeout": timeout, "source": source}

    def _chunk(self, event: Event, prompt: Prompt, context: Context | None) -> Chunk:
        if event.name == "chunk":
            return chunk_from_json(event.data)
        if event.name != "generation":
            raise TransportError(f"The server sent an event {event.name!r}; client and server may differ in version.")
        fields, known = Fields(event.data, "The last event"), self._named(prompt, context)
        generation = generation_from_json(
            fields.require("generation", dict), lambda described: self._remote(described, known)
        )
        return chunk_from_json(fields.require("last", dict), generation)

    def _named(self, prompt: Prompt, context: Context | None) -> list[RemoteContext]:
        """The contexts that a request named, as the server has them."""
        messages: Sequence[Message] = [] if isinstance(prompt, str) else prompt
        named = [context, *(message.get("context") for message in messages)]
        return [self._on_server(each) for each in named if isinstance(each, Context)]

    def _reference(self, context: Context) -> str:
        """The id that a context has on the server; one that is not there is sent."""
        return self._on_server(context).reference

    def _on_server(self, context: Context) -> RemoteContext:
        if isinstance(context, RemoteContext) and context.server == self.info.tag:
            return context
        if context not in self._sent:
            self._sent[context] = self._remote(send_context(self.connection, context, kv=False), [])
        return self._sent[context]

    async def _greeted(self) -> None:
        """Have asked the server who it is, without blocking the event loop."""
        await asyncio.to_thread(lambda: self.info)

    def _remote(self, answer: object, known: Sequence[RemoteContext]) -> RemoteContext:
        described = ContextDescription.from_json(answer)
        return remote_context(
            described, self.info.tag, known, lambda: fetch_context(self.connection, described.handle.id, kv=False)
        )

    def _resolved(self, answer: object, scope: str | None) -> RemoteContext:
        described = ContextDescription.from_json(answer)
        context = self._remote(answer, [])
        context.attach(handle=described.handle)
        namespace = self.store.namespace
        assert isinstance(namespace, RemoteNamespace)
        for recipe_id, handle_id in zip(context.recipe_ids, described.prefix_ids, strict=False):
            namespace.learn(recipe_id, scope or "", handle_id)
        return context


def _generation(chunks: Sequence[Chunk]) -> Generation:
    last = chunks[-1].generation if chunks else None
    if last is None:
        raise TransportError("The answer ended early: the server closed the stream.")
    return last


def _option_to_json(value: Any) -> Any:
    """Options are JSON data, but for sequences of other kinds and for grammars."""
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    if isinstance(value, str) or not isinstance(value, Sequence):
        return value
    return list(value)


def _request_id() -> str:
    return secrets.token_hex(16)
