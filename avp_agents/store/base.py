"""The ContextStore interface: where contexts live between the agents that share them.

A store keeps, per *namespace* (tenant), the lineage of every context put into it, durably as its kind allows, and the
KV-cache as a droppable companion. Ids are digests keyed by the namespace's key, over the context's recipe and scope:

- `put` is put-if-absent: the first writer's latent values win, later writers get the same handle;
- the same lineage put under two scopes (threads, users) has two handles and one copy of its bytes;
- a handle from another namespace or scope is simply unknown.

All methods are thread-safe, and each has an asynchronous twin (`aput`, ...) that does not block the event loop.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from avp_agents.context import Context
from avp_agents.handle import ContextHandle
from avp_agents.store.namespace import Namespace
from avp_agents.tracing import traced

_Store = TypeVar("_Store", bound="ContextStore")
_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

AnyHandle = ContextHandle | Mapping[str, Any] | str
"""A handle as the code has it, as graph state has it, or its bare id."""


def id_of_handle(handle: AnyHandle) -> str:
    """The id of a handle that may come from graph state.

    Raises:
        InvalidHandleError: It is malformed.
    """
    return ContextHandle.from_state(dict(handle) if isinstance(handle, Mapping) else handle).id


@dataclass(frozen=True)
class StoreStats:
    """Counts and bytes of what a store holds.

    Attributes:
        contexts: Stored handles.
        segments: Distinct segments; equal prefixes are kept once.
        pinned: Handles that eviction and TTL spare.
        lineage_bytes: Bytes of lineages and readouts.
        kv_bytes: Bytes of KV-caches that count against `byte_budget`.
        byte_budget: The limit, None where there is none.
        hits, misses: Answers of `get`.
        evictions: KV-caches or contexts dropped to keep the budget.
        integrity_failures: Records found torn or altered, and treated as absent.
    """

    contexts: int
    segments: int
    pinned: int
    lineage_bytes: int
    kv_bytes: int
    byte_budget: int | None
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    integrity_failures: int = 0


@dataclass(frozen=True)
class PruneReport:
    """Counts and bytes of what `prune` or `discard` removed."""

    contexts: int = 0
    segments: int = 0
    kv_bytes: int = 0
    lineage_bytes: int = 0


class Lookups:
    """Counts how often a store found what it was asked for. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hits = self._misses = 0

    def count(self, *, hit: bool) -> None:
        """Note one."""
        with self._lock:
            self._hits += hit
            self._misses += not hit

    def counts(self) -> tuple[int, int]:
        """Hits and misses so far."""
        with self._lock:
            return self._hits, self._misses


def _in_thread(
    verb: Callable[Concatenate[_Store, _Parameters], _Result],
) -> Callable[Concatenate[_Store, _Parameters], Coroutine[Any, Any, _Result]]:
    """A verb's asynchronous twin: the same on a thread, so that the event loop goes on."""

    @wraps(verb)
    async def twin(store: _Store, *arguments: _Parameters.args, **options: _Parameters.kwargs) -> _Result:
        return await asyncio.to_thread(getattr(store, verb.__name__), *arguments, **options)

    twin.__name__, twin.__doc__ = f"a{verb.__name__}", f"Asynchronous `{verb.__name__}`."
    vars(twin).pop("__isabstractmethod__", None)
    return twin


class ContextStore(ABC):
    """Where contexts live. See the module's summary for the invariants.

    Args:
        namespace: The tenant and its key; by default ``"default"`` with the user's own key.
        byte_budget: Bytes that lineages and host KV-caches may take. Over it, unpinned KV-caches go first, least
            recently used first, then unpinned contexts.
        ttl: Seconds after its last use until an unpinned context may be pruned; None keeps it.

    Example:
        >>> store = MemoryStore()
        >>> handle = store.put(context, scope="thread-1", agent="researcher")
        >>> store.get(handle, scope="thread-1").recipe_id == context.recipe_id
        True
    """

    def __init__(
        self, *, namespace: Namespace | str = "default", byte_budget: int | None = None, ttl: float | None = None
    ) -> None:
        self.namespace = Namespace.of(namespace)
        self.byte_budget = byte_budget
        self.ttl = ttl

    def __init_subclass__(cls, **options: Any) -> None:
        """Whoever wrote a store, its `put` and `get` are traced."""
        super().__init_subclass__(**options)
        for verb in cls.__dict__.keys() & {"put", "get"}:
            setattr(cls, verb, traced(f"avp.store.{verb}", _traits)(cls.__dict__[verb]))

    def id_of(self, context: Context, *, scope: str = "") -> str:
        """The handle id this store gives to `context` in `scope`, stored or not."""
        return self.namespace.handle_id(context.recipe_id, scope)

    def new_handle(self, context: Context, *, scope: str = "", agent: str = "", text: str = "") -> ContextHandle:
        """The handle that a first `put` gives to `context`."""
        return ContextHandle(
            id=self.id_of(context, scope=scope),
            model=context.fingerprint[:16],
            tokens=len(context),
            bytes=context.nbytes,
            agent=agent,
            text=text,
        )

    @abstractmethod
    def put(
        self,
        context: Context,
        *,
        kv: bool = True,
        scope: str = "",
        agent: str = "",
        text: str = "",
        ttl: float | None = None,
    ) -> ContextHandle:
        """Store a context unless it is there already, and note the handle on it (`context.to_handle()`).

        Args:
            context: What to store.
            kv: Also store its KV-cache, where it has one. A KV-cache missing from an earlier put is added.
            scope: The thread or user the handle is honoured in.
            agent: Who made it, for people.
            text: One line for people.
            ttl: Seconds, instead of the store's.

        Returns:
            The handle. When this returns, the lineage is as durable as the store's kind allows.

        Raises:
            StoreFullError: Pinned contexts leave no room.
        """

    @abstractmethod
    def get(self, handle: AnyHandle, *, scope: str | None = None) -> Context:
        """The context a handle stands for, with its KV-cache attached where the store has one.

        Args:
            handle: Untrusted: its form, scope, record and MAC are checked before anything is used.
            scope: The scope the handle must have been minted for; None asks no question.

        Raises:
            InvalidHandleError: The handle is malformed.
            ContextLostError: Unknown here (also: another namespace or scope), expired, deleted, torn or altered.
        """

    @abstractmethod
    def contains(self, handle: AnyHandle) -> bool:
        """Whether `get` would find the lineage."""

    @abstractmethod
    def touch(self, handle: AnyHandle) -> bool:
        """Count as a use, for TTL and eviction, without reading anything. False if it is not there."""

    @abstractmethod
    def delete(self, handle: AnyHandle) -> bool:
        """Remove a handle, and every segment that nothing else uses. False if it was not there."""

    @abstractmethod
    def discard(self, handles: Iterable[AnyHandle], *, idle: float = 0.0, dry_run: bool = False) -> PruneReport:
        """Remove those of many handles that are there, not pinned, and not in use; cheaper than deleting each.

        Args:
            handles: Which ones. What a garbage collector found that nobody refers to.
            idle: Spare those that were put or used within so many seconds.
            dry_run: Remove nothing; report what would be.

        Raises:
            InvalidHandleError: One is malformed; nothing was removed.
        """

    @abstractmethod
    def add_kv(self, context: Context) -> bool:
        """Keep the KV-cache of a context that was put before, under the handle noted on it. Brings nothing else back.

        Args:
            context: With a KV-cache attached. It is not kept where the store holds other latent values of the same
                recipe, or where nothing may be evicted to make room.

        Returns:
            Whether the handle is still there.

        Raises:
            NotStoredError: The context was never put.
        """

    @abstractmethod
    def drop_kv(self, handle: AnyHandle) -> int:
        """Drop the KV-cache that only this handle uses; the lineage stays. Returns the bytes freed."""

    @abstractmethod
    def pin(self, handle: AnyHandle) -> None:
        """Spare a context from TTL and eviction until `unpin`.

        Raises:
            ContextLostError: It is not there.
        """

    @abstractmethod
    def unpin(self, handle: AnyHandle) -> None:
        """Undo `pin`. Unknown handles are ignored."""

    @abstractmethod
    def list(self, *, scope: str | None = None) -> list[ContextHandle]:
        """All handles (of one scope), oldest first."""

    @abstractmethod
    def prune(self) -> PruneReport:
        """Remove what has outlived its TTL, and bring the store under its budget."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """Counts and bytes of what the store holds."""

    def close(self) -> None:  # noqa: B027  (most stores hold nothing open)
        """Release files and connections. Stored contexts stay."""

    # what overrides a verb is what its twin calls
    aput = _in_thread(put)
    aget = _in_thread(get)
    acontains = _in_thread(contains)
    atouch = _in_thread(touch)
    adelete = _in_thread(delete)
    adiscard = _in_thread(discard)
    aadd_kv = _in_thread(add_kv)
    adrop_kv = _in_thread(drop_kv)
    apin = _in_thread(pin)
    aunpin = _in_thread(unpin)
    alist = _in_thread(list)
    aprune = _in_thread(prune)
    astats = _in_thread(stats)


def _traits(result: Context | ContextHandle) -> dict[str, Any]:
    """A span's attributes for the context that was put or got."""
    handle = result if isinstance(result, ContextHandle) else result.to_handle()
    return {"avp.context.id": handle.id, "avp.context.positions": handle.tokens, "avp.context.bytes": handle.bytes}
