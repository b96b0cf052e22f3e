"""Contexts in this process's memory, kept by reference."""

from __future__ import annotations

import builtins
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, replace
from time import monotonic

from avp_agents.context import Context
from avp_agents.errors import ContextLostError, StoreFullError
from avp_agents.handle import ContextHandle
from avp_agents.lineage import same_values
from avp_agents.store.base import AnyHandle, ContextStore, PruneReport, StoreStats, id_of_handle
from avp_agents.store.namespace import Namespace


@dataclass
class _Entry:
    """One stored handle."""

    handle: ContextHandle
    recipe_id: str
    ttl: float | None
    stored: int
    last_use: float = 0.0
    pinned: bool = False


@dataclass
class _Held:
    """One recipe's context, the handles that stand for it, and the bytes of its KV-cache when last looked at."""

    context: Context
    handles: int = 0
    kv_bytes: int = 0


class MemoryStore(ContextStore):
    """Keeps contexts by reference: `get` returns the object that was put, with its KV-cache wherever that lies.

    A KV-cache in an engine's own memory counts nothing against the budget; the engine may evict it. Evicting or
    dropping a KV-cache here lets go of this store's reference; a caller that holds the context keeps it.
    """

    def __init__(
        self, *, namespace: Namespace | str = "default", byte_budget: int | None = None, ttl: float | None = None
    ) -> None:
        super().__init__(namespace=namespace, byte_budget=byte_budget, ttl=ttl)
        self._lock = threading.Lock()
        # in order of use, oldest first
        self._entries: dict[str, _Entry] = {}
        self._held: dict[str, _Held] = {}
        self._segment_users: Counter[str] = Counter()
        self._lineage_bytes = self._kv_bytes = 0
        self._stored = self._hits = self._misses = self._evictions = 0
        self._spill: Callable[[Context], None] | None = None

    def spill_to(self, spill: Callable[[Context], None]) -> None:
        """Hand each context whose KV-cache is evicted to `spill`, which runs in the evicting thread, unlocked."""
        self._spill = spill

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
        """See `ContextStore.put`."""
        handle = self.keep(context, self.new_handle(context, scope=scope, agent=agent, text=text), kv=kv, ttl=ttl)
        context.attach(handle=handle)
        return handle

    def keep(
        self, context: Context, handle: ContextHandle, *, kv: bool = True, ttl: float | None = None
    ) -> ContextHandle:
        """`put` under a handle that was minted already, as by another tier of the same namespace.

        Returns:
            The handle as it was first put.

        Raises:
            StoreFullError: Pinned contexts leave no room.
        """
        with self._lock:
            entry = self._live(handle.id)
            if entry is None:
                entry = self._add(context, handle, kv=kv, ttl=ttl)
            elif kv:
                self._complete(self._held[entry.recipe_id], context)
            self._use(entry)
            evicted = self._evict(spare=handle.id)
        self._spill_all(evicted)
        return entry.handle

    def get(self, handle: AnyHandle, *, scope: str | None = None) -> Context:
        """See `ContextStore.get`. The object that was put, unless another scope's put shares it."""
        handle_id = id_of_handle(handle)
        with self._lock:
            entry = self._live(handle_id)
            if entry is None or not self.namespace.is_of(entry.handle.id, entry.recipe_id, scope):
                self._misses += 1
                raise ContextLostError(f"{handle_id} is not in memory (for this namespace and scope), or no longer.")
            self._hits += 1
            self._use(entry)
            self._recount(self._held[entry.recipe_id])
            return self._bound(entry)

    def contains(self, handle: AnyHandle) -> bool:
        """See `ContextStore.contains`."""
        with self._lock:
            return self._live(id_of_handle(handle)) is not None

    def touch(self, handle: AnyHandle) -> bool:
        """See `ContextStore.touch`."""
        with self._lock:
            entry = self._live(id_of_handle(handle))
            if entry is not None:
                self._use(entry)
            return entry is not None

    def delete(self, handle: AnyHandle) -> bool:
        """See `ContextStore.delete`."""
        with self._lock:
            entry = self._entries.get(id_of_handle(handle))
            if entry is not None:
                self._remove(entry)
            return entry is not None

    def discard(self, handles: Iterable[AnyHandle], *, idle: float = 0.0, dry_run: bool = False) -> PruneReport:
        """See `ContextStore.discard`."""
        wanted = dict.fromkeys(id_of_handle(handle) for handle in handles)
        with self._lock:
            self._recount_all()
            before, latest = self._sizes(), monotonic() - idle
            removed_from = self._copy() if dry_run else self
            for entry in [entry for handle_id in wanted if (entry := self._entries.get(handle_id)) is not None]:
                if not entry.pinned and entry.last_use <= latest:
                    removed_from._remove(entry)
            return _difference(before, removed_from._sizes())

    def add_kv(self, context: Context) -> bool:
        """See `ContextStore.add_kv`."""
        handle_id = context.to_handle().id
        with self._lock:
            entry = self._live(handle_id)
            if entry is None:
                return False
            self._complete(self._held[entry.recipe_id], context)
            evicted = self._evict(spare=handle_id)
        self._spill_all(evicted)
        return True

    def drop_kv(self, handle: AnyHandle) -> int:
        """See `ContextStore.drop_kv`. Counts the bytes of a KV-cache in an engine's memory too."""
        with self._lock:
            entry = self._live(id_of_handle(handle))
            if entry is None or self._held[entry.recipe_id].handles > 1:
                return 0
            held = self._held[entry.recipe_id]
            kv = held.context.kv
            self._let_go_of_kv(held)
            return kv.nbytes if kv is not None else 0

    def pin(self, handle: AnyHandle) -> None:
        """See `ContextStore.pin`."""
        handle_id = id_of_handle(handle)
        with self._lock:
            entry = self._live(handle_id)
            if entry is None:
                raise ContextLostError(f"{handle_id} cannot be pinned: it is not in memory, or no longer.")
            entry.pinned = True

    def unpin(self, handle: AnyHandle) -> None:
        """See `ContextStore.unpin`."""
        with self._lock:
            entry = self._entries.get(id_of_handle(handle))
            if entry is not None and entry.pinned:
                entry.pinned = False
                self._use(entry)

    def list(self, *, scope: str | None = None) -> builtins.list[ContextHandle]:
        """See `ContextStore.list`."""
        with self._lock:
            entries = [entry for entry in self._entries.values() if not self._has_expired(entry)]
            entries = [e for e in entries if self.namespace.is_of(e.handle.id, e.recipe_id, scope)]
            return [entry.handle for entry in sorted(entries, key=lambda entry: entry.stored)]

    def prune(self) -> PruneReport:
        """See `ContextStore.prune`."""
        with self._lock:
            self._recount_all()
            before = self._sizes()
            for entry in [entry for entry in self._entries.values() if self._has_expired(entry)]:
                self._remove(entry)
            evicted = self._evict()
            after = self._sizes()
        self._spill_all(evicted)
        return _difference(before, after)

    def stats(self) -> StoreStats:
        """See `ContextStore.stats`."""
        with self._lock:
            self._recount_all()
            contexts, segments, kv_bytes, lineage_bytes = self._sizes()
            return StoreStats(
                contexts=contexts,
                segments=segments,
                pinned=sum(entry.pinned for entry in self._entries.values()),
                lineage_bytes=lineage_bytes,
                kv_bytes=kv_bytes,
                byte_budget=self.byte_budget,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
            )

    def _live(self, handle_id: str) -> _Entry | None:
        entry = self._entries.get(handle_id)
        if entry is not None and self._has_expired(entry):
            self._remove(entry)
            return None
        return entry

    def _has_expired(self, entry: _Entry) -> bool:
        ttl = entry.ttl if entry.ttl is not None else self.ttl
        return ttl is not None and not entry.pinned and monotonic() >= entry.last_use + ttl

    def _use(self, entry: _Entry) -> None:
        entry.last_use = monotonic()
        self._entries[entry.handle.id] = self._entries.pop(entry.handle.id)

    def _add(self, context: Context, handle: ContextHandle, *, kv: bool, ttl: float | None) -> _Entry:
        """Take in a new handle, and its context unless another handle holds it already."""
        self._check_room(context)
        recipe_id = context.recipe_id
        if recipe_id not in self._held:
            self._held[recipe_id] = _Held(context if kv or context.kv is None else context.without_kv())
            self._count_segments(context, 1)
            self._recount(self._held[recipe_id])
        elif kv:
            self._complete(self._held[recipe_id], context)
        self._held[recipe_id].handles += 1
        self._stored += 1
        entry = _Entry(handle, recipe_id, ttl, stored=self._stored)
        self._entries[handle.id] = entry
        return entry

    def _remove(self, entry: _Entry) -> None:
        del self._entries[entry.handle.id]
        held = self._held[entry.recipe_id]
        held.handles -= 1
        if held.handles == 0:
            del self._held[entry.recipe_id]
            self._kv_bytes -= held.kv_bytes
            self._count_segments(held.context, -1)

    def _copy(self) -> MemoryStore:
        """A store with the same content and counts, to try on what removing would do."""
        twin = copy(self)
        twin._entries, twin._segment_users = dict(self._entries), Counter(self._segment_users)
        twin._held = {recipe_id: replace(held) for recipe_id, held in self._held.items()}
        return twin

    def _complete(self, held: _Held, context: Context) -> None:
        """Take over what the held context lacks, if the other one holds the same values."""
        if held.context is not context and same_values(held.context, context):
            if held.context.readout is None and context.readout is not None:
                self._lineage_bytes += context.readout.nbytes
                held.context = replace(held.context, readout=context.readout)
            kv, offered = held.context.kv, context.kv
            # a host copy is offered when an engine is about to lose its own
            if offered is not None and (
                kv is None or offered.length > kv.length or (kv.on_device and not offered.on_device)
            ):
                held.context.attach(kv=offered)
        self._recount(held)

    def _bound(self, entry: _Entry) -> Context:
        """The held context as this handle's; one that other handles share notes only the newest of them."""
        context = self._held[entry.recipe_id].context
        if context.handle is not None and context.handle.id == entry.handle.id:
            return context
        twin = context.without_kv()
        twin.attach(kv=context.kv, handle=entry.handle)
        return twin

    def _let_go_of_kv(self, held: _Held) -> None:
        """Hold the context without its KV-cache. Who else holds the object keeps it as it is."""
        held.context = held.context.without_kv()
        self._recount(held)

    def _check_room(self, context: Context) -> None:
        """Refuse a context that cannot fit beside what is pinned."""
        if self.byte_budget is None or self._bytes + context.nbytes <= self.byte_budget:
            return
        pinned = {entry.recipe_id: self._held[entry.recipe_id] for entry in self._entries.values() if entry.pinned}
        contexts = [held.context for held in pinned.values()] + [context]
        segments = {i: s.nbytes for c in contexts for i, s in zip(c.recipe_ids, c.lineage, strict=True)}
        readouts = {c.recipe_id: c.readout.nbytes for c in contexts if c.readout is not None}
        needed = sum(segments.values()) + sum(readouts.values()) + sum(held.kv_bytes for held in pinned.values())
        if needed > self.byte_budget:
            raise StoreFullError(
                f"{context.nbytes} bytes do not fit under the budget of {self.byte_budget} beside what is pinned. "
                "Unpin or delete contexts, or raise byte_budget."
            )

    def _evict(self, *, spare: str | None = None) -> builtins.list[Context]:
        """Bring the store under its budget. Returns the contexts whose KV-caches went, with them."""
        evicted: builtins.list[Context] = []
        pinned = {entry.recipe_id for entry in self._entries.values() if entry.pinned}
        newest: dict[str, _Entry] = {}
        for entry in reversed(self._entries.values()):
            newest.setdefault(entry.recipe_id, entry)
        for entry in reversed(newest.values()):
            if self._fits:
                return evicted
            held = self._held[entry.recipe_id]
            if held.kv_bytes and entry.recipe_id not in pinned:
                evicted.append(self._bound(entry))
                self._let_go_of_kv(held)
                self._evictions += 1
        pending = [entry for entry in self._entries.values() if not entry.pinned and entry.handle.id != spare]
        while not self._fits and pending:
            # a handle whose segments all have other users frees nothing until those are gone
            shared = self._remove_until_it_fits(pending)
            if len(shared) == len(pending):
                self._remove(shared.pop(0))
                self._evictions += 1
            pending = shared
        return evicted

    def _remove_until_it_fits(self, entries: builtins.list[_Entry]) -> builtins.list[_Entry]:
        """Remove entries in this order; returns those that would free nothing."""
        shared = []
        for entry in entries:
            if self._fits:
                break
            if self._held[entry.recipe_id].handles == 1 and self._segment_users[entry.recipe_id] == 1:
                self._remove(entry)
                self._evictions += 1
            else:
                shared.append(entry)
        return shared

    def _spill_all(self, evicted: builtins.list[Context]) -> None:
        if self._spill is not None:
            for context in evicted:
                self._spill(context)

    @property
    def _bytes(self) -> int:
        return self._lineage_bytes + self._kv_bytes

    @property
    def _fits(self) -> bool:
        return self.byte_budget is None or self._bytes <= self.byte_budget

    def _sizes(self) -> tuple[int, int, int, int]:
        """Handles, segments, KV bytes and lineage bytes."""
        return len(self._entries), len(self._segment_users), self._kv_bytes, self._lineage_bytes

    def _recount_all(self) -> None:
        """KV-caches move between device and host without this store being told."""
        for held in self._held.values():
            self._recount(held)

    def _recount(self, held: _Held) -> None:
        kv = held.context.kv
        counted = kv.nbytes if kv is not None and not kv.on_device else 0
        self._kv_bytes += counted - held.kv_bytes
        held.kv_bytes = counted

    def _count_segments(self, context: Context, step: int) -> None:
        """Count a context's segments in (+1) or out (-1); each counts its bytes once."""
        for recipe_id, segment in zip(context.recipe_ids, context.lineage, strict=True):
            users = self._segment_users[recipe_id] + step
            if users == (1 if step > 0 else 0):
                self._lineage_bytes += step * segment.nbytes
            if users:
                self._segment_users[recipe_id] = users
            else:
                del self._segment_users[recipe_id]
        if context.readout is not None:
            self._lineage_bytes += step * context.readout.nbytes


def _difference(before: tuple[int, int, int, int], after: tuple[int, int, int, int]) -> PruneReport:
    return PruneReport(*(was - now for was, now in zip(before, after, strict=True)))
