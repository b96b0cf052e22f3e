"""One engine for several namespaces: each has a store of its own, and sees nothing of the others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from avp_agents.context import Context
from avp_agents.crossing.sides import Crossing
from avp_agents.engine.protocol import Engine
from avp_agents.errors import ConfigurationError, PromptError, RequestCancelledError, StoreFullError
from avp_agents.handle import ContextHandle
from avp_agents.prompt.chat_messages import Prompt
from avp_agents.store import ContextStore
from avp_agents.transport.server.limits import ServerLimits
from avp_agents.transport.wire import ContextDescription, describe


class ServedEngine(Engine, Protocol):
    """What a server needs of an engine beyond what everybody does."""

    def accept(self, context: Context) -> Context:
        """A context that came from outside of this process, once it was checked."""
        ...

    @property
    def crossing(self) -> Crossing:
        """What its model tells others."""
        ...


EngineFor = Callable[[str], ServedEngine]
"""Makes the engine of a namespace: the same model, with that namespace's store."""

_COUNT_SECONDS = 5.0
_MAX_REQUEST_ID = 64
_EARLY_CANCELLATIONS = 256


@dataclass
class Tenant:
    """A namespace: its engine, and its requests that run.

    Attributes:
        name: The namespace.
        engine: The shared model, with this namespace's store.
        limits: See there.
        running: Requests that their client named, by that name.
    """

    name: str
    engine: ServedEngine
    limits: ServerLimits
    running: dict[str, asyncio.Task[Any]] = field(default_factory=dict)
    _cancelled: dict[str, bool] = field(default_factory=dict)
    _contexts: int = 0
    _counted: float = -_COUNT_SECONDS

    @property
    def store(self) -> ContextStore:
        """Where its contexts are."""
        return self.engine.store

    def source(self, asker: str) -> str:
        """Whom the engine's fair admission sees: nobody passes for another namespace."""
        return f"{self.name}/{asker}"

    async def prompt(self, data: object, given: str | None) -> Asked:
        """A request's prompt and context, with all references resolved.

        Args:
            data: The prompt; untrusted.
            given: Reference of the context that is handed over explicitly, if any.

        Raises:
            PromptError: The prompt is not a string or a list of objects.
            InvalidHandleError, ContextLostError: A reference is not one, or leads nowhere.
        """
        known: dict[str, Context] = {}
        context = await self._known(given, known) if given is not None else None
        if isinstance(data, str):
            return Asked(data, context, known)
        if not isinstance(data, list):
            raise PromptError("'prompt' must be a string or a list of messages.")
        messages: list[Mapping[str, Any]] = []
        for index, message in enumerate(data):
            if not isinstance(message, dict):
                raise PromptError(f"Message {index} must be an object with 'role' and 'content'.")
            reference = message.get("context")
            standing_for = {"context": await self._known(reference, known)} if reference is not None else {}
            messages.append(message | standing_for)
        return Asked(messages, context, known)

    async def contexts(self, references: Sequence[object]) -> dict[str, Context]:
        """The contexts of several references, by reference, in order.

        Raises:
            InvalidHandleError, ContextLostError: One is no reference, or leads nowhere.
        """
        known: dict[str, Context] = {}
        for reference in references:
            await self._known(reference, known)
        return known

    async def _known(self, reference: Any, known: dict[str, Context]) -> Context:
        handle = ContextHandle.from_state(reference)
        if handle.id not in known:
            known[handle.id] = await self.engine.aresolve(handle)
        return known[handle.id]

    async def keep(
        self, context: Context, *, scope: str = "", agent: str = "", text: str = "", seconds: float | None = None
    ) -> ContextHandle:
        """Put a context into the store; `seconds` after its last use it may go.

        Raises:
            StoreFullError: The namespace holds as many contexts as it may.
        """
        await self._check_count()
        handle = await self.store.aput(context, scope=scope, agent=agent, text=text, ttl=seconds)
        self._contexts += 1
        return handle

    async def keep_result(self, context: Context, known: Mapping[str, Context]) -> ContextDescription:
        """Keep what a request made for as long as results last, and describe it."""
        handle = await self.keep(context, seconds=self.limits.context_seconds)
        return describe(context, handle, known)

    async def _check_count(self) -> None:
        """Count what the store holds every few seconds, and in between what is put."""
        most = self.limits.contexts
        if time.monotonic() - self._counted >= _COUNT_SECONDS or self._contexts >= most:
            self._contexts, self._counted = (await self.store.astats()).contexts, time.monotonic()
        if self._contexts >= most:
            await self.store.aprune()
            self._contexts = (await self.store.astats()).contexts
        if self._contexts >= most:
            raise StoreFullError(f"This namespace holds {most} contexts, as many as it may. Delete or unpin some.")

    @asynccontextmanager
    async def cancellable(self, request_id: str | None) -> AsyncIterator[None]:
        """Let `cancel` end the current task's work while this is open.

        Raises:
            ConfigurationError: The name is too long, or another request has it.
            RequestCancelledError: It was cancelled.
        """
        task = asyncio.current_task()
        assert task is not None
        if request_id is None:
            yield
            return
        if len(request_id) > _MAX_REQUEST_ID or request_id in self.running:
            raise ConfigurationError(f"A request id has at most {_MAX_REQUEST_ID} characters and names one request.")
        if self._cancelled.pop(request_id, None):
            raise RequestCancelledError("The request was cancelled before it began.")
        self.running[request_id] = task
        try:
            yield
        except asyncio.CancelledError as error:
            if request_id in self.running:
                raise
            raise RequestCancelledError("The request was cancelled.") from error
        finally:
            self.running.pop(request_id, None)

    def cancel(self, request_id: str) -> bool:
        """Cancel a request by its name; False if no such request runs. One that has yet to begin will not."""
        task = self.running.pop(request_id, None)
        if task is not None:
            task.cancel()
            return True
        if len(request_id) <= _MAX_REQUEST_ID:
            self._cancelled[request_id] = True
            while len(self._cancelled) > _EARLY_CANCELLATIONS:
                self._cancelled.pop(next(iter(self._cancelled)))
        return False


@dataclass(frozen=True)
class Asked:
    """A request's prompt and context, and all contexts that it named, by reference."""

    prompt: Prompt
    context: Context | None
    known: Mapping[str, Context]


class Tenants:
    """All namespaces that anybody has asked for since the server started. Thread-safe.

    Args:
        engine_for: See `EngineFor`.
        limits: See there.
    """

    def __init__(self, engine_for: EngineFor, limits: ServerLimits) -> None:
        self._engine_for, self._limits = engine_for, limits
        self._tenants: dict[str, Tenant] = {}
        self._lock = threading.Lock()

    async def of(self, namespace: str) -> Tenant:
        """The tenant of a namespace."""
        tenant = self._tenants.get(namespace)
        return tenant or await asyncio.to_thread(self._make, namespace)

    def all(self) -> Sequence[Tenant]:
        """Those that anybody has asked for."""
        return list(self._tenants.values())

    def _make(self, namespace: str) -> Tenant:
        with self._lock:
            if namespace not in self._tenants:
                self._tenants[namespace] = Tenant(namespace, self._engine_for(namespace), self._limits)
            return self._tenants[namespace]
