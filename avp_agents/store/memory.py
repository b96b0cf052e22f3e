"""Contexts in this process's memory, kept by reference."""

from __future__ import annotations

import builtins
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from time import monotonic

from typing_extensions import override

from avp_agents.context import Context
from avp_agents.errors import ContextLostError, StoreFullError
from avp_agents.handle import ContextHandle
from avp_agents.lineage import same_values
from avp_agents.store.base import AnyHandle, ContextStore, Lookups, PruneReport, StoreStats, id_of_handle
from avp_agents.store.namespace import Namespace
from avp_agents.store.references import References, Removals, StoredHandle


@dataclass
class _Entry(StoredHandle):
    """One stored handle. Its head names the context that it stands for."""

    handle: ContextHandle
    recipe_id: str
    ttl: float | None
    stored: int


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
        # by the head of the handles that stand for it; one head for each recipe
        self._contexts: dict[str, Context] = {}
        self._references = References[_Entry]({}, {}, {}, {}, ends=True)
        self._lookups = Lookups()
        self._stored = self._evictions = 0
        self._spill: Callable[[Context], None] | None = None

    def spill_to(self, spill: Callable[[Context], None]) -> None:
        """Hand each context whose KV-cache is evicted to `spill`, which runs in the evicting thread, unlocked."""
        self._spill = spill

    @override
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
                self._complete(entry.head, context)
            self._use(entry)
            evicted = self._evict(spare=handle.id)
            self._let_go()
        self._spill_all(evicted)
        return entry.handle

    @override
    def get(self, handle: AnyHandle, *, scope: str | None = None) -> Context:
        """The object that was put, unless another scope's put shares it."""
        handle_id = id_of_handle(handle)
        with self._lock:
            entry = self._live(handle_id)
            known = entry is not None and self.namespace.is_of(entry.handle.id, entry.recipe_id, scope)
            self._lookups.count(hit=known)
            if entry is None or not known:
                raise ContextLostError(f"{handle_id} is not in memory (for this namespace and scope), or no longer.")
            self._use(entry)
            self._recount(entry.head)
            return self._bound(entry)

    @override
    def contains(self, handle: AnyHandle) -> bool:
        with self._lock:
            return self._live(id_of_handle(handle)) is not None

    @override
    def touch(self, handle: AnyHandle) -> bool:
        with self._lock:
            entry = self._live(id_of_handle(handle))
            if entry is not None:
                self._use(entry)
            return entry is not None

    @override
    def delete(self, handle: AnyHandle) -> bool:
        handle_id = id_of_handle(handle)
        with self._lock:
            found = handle_id in self._references.handles
            if found:
                self._references.release(handle_id)
                self._let_go()
            return found

    @override
    def discard(self, handles: Iterable[AnyHandle], *, idle: float = 0.0, dry_run: bool = False) -> PruneReport:
        wanted = [id_of_handle(handle) for handle in handles]
        with self._lock:
            self._recount_all()
            references = self._references.copy() if dry_run else self._references
            references.release_idle(wanted, monotonic() - idle)
            return references.removals.report() if dry_run else self._let_go()

    @override
    def add_kv(self, context: Context) -> bool:
        handle_id = context.to_handle().id
        with self._lock:
            entry = self._live(handle_id)
            if entry is None:
                return False
            self._complete(entry.head, context)
            evicted = self._evict(spare=handle_id)
            self._let_go()
        self._spill_all(evicted)
        return True

    @override
    def drop_kv(self, handle: AnyHandle) -> int:
        """Counts the bytes of a KV-cache in an engine's memory too."""
        with self._lock:
            entry = self._live(id_of_handle(handle))
            if entry is None or not self._references.used_only_by(entry.handle.id):
                return 0
            kv = self._contexts[entry.head].kv
            self._references.drop_kv(entry.head)
            self._let_go()
            return kv.nbytes if kv is not None else 0

    @override
    def pin(self, handle: AnyHandle) -> None:
        handle_id = id_of_handle(handle)
        with self._lock:
            entry = self._live(handle_id)
            if entry is None:
                raise ContextLostError(f"{handle_id} cannot be pinned: it is not in memory, or no longer.")
            entry.pinned = True

    @override
    def unpin(self, handle: AnyHandle) -> None:
        with self._lock:
            entry = self._references.handles.get(id_of_handle(handle))
            if entry is not None and entry.pinned:
                entry.pinned = False
                self._use(entry)

    @override
    def list(self, *, scope: str | None = None) -> builtins.list[ContextHandle]:
        with self._lock:
            entries = [entry for entry in self._references.handles.values() if not self._has_expired(entry)]
            entries = [e for e in entries if self.namespace.is_of(e.handle.id, e.recipe_id, scope)]
            return [entry.handle for entry in sorted(entries, key=lambda entry: entry.stored)]

    @override
    def prune(self) -> PruneReport:
        with self._lock:
            self._recount_all()
            for handle_id in [own for own, entry in self._references.handles.items() if self._has_expired(entry)]:
                self._references.release(handle_id)
            evicted = self._evict()
            report = self._let_go()
        self._spill_all(evicted)
        return report

    @override
    def stats(self) -> StoreStats:
        with self._lock:
            self._recount_all()
            return self._references.stats(self._lookups, byte_budget=self.byte_budget, evictions=self._evictions)

    def _live(self, handle_id: str) -> _Entry | None:
        entry = self._references.handles.get(handle_id)
        if entry is not None and self._has_expired(entry):
            self._references.release(handle_id)
            self._let_go()
            return None
        return entry

    def _has_expired(self, entry: _Entry) -> bool:
        ttl = entry.ttl if entry.ttl is not None else self.ttl
        return ttl is not None and not entry.pinned and monotonic() >= entry.last_use + ttl

    def _use(self, entry: _Entry) -> None:
        self._references.use(entry.handle.id, monotonic())

    def _add(self, context: Context, handle: ContextHandle, *, kv: bool, ttl: float | None) -> _Entry:
        """Take in a new handle, and its context unless another handle holds it already."""
        head = f"context:{context.recipe_id}"
        sizes = {own: segment.nbytes for own, segment in zip(context.recipe_ids, context.lineage, strict=True)}
        sizes[head] = context.readout.nbytes if context.readout is not None else 0
        self._check_room(context, sizes)
        self._stored += 1
        entry = _Entry(head, monotonic(), False, handle, context.recipe_id, ttl, self._stored)
        self._references.add(handle.id, entry, sizes)
        if head not in self._contexts:
            self._contexts[head] = context if kv or context.kv is None else context.without_kv()
            self._recount(head)
        elif kv:
            self._complete(head, context)
        return entry

    def _complete(self, head: str, context: Context) -> None:
        """Take over what the held context lacks, if the other one holds the same values."""
        held = self._contexts[head]
        if held is not context and same_values(held, context):
            if held.readout is None and context.readout is not None:
                held = self._contexts[head] = replace(held, readout=context.readout)
                self._references.resize(head, lineage=context.readout.nbytes)
            kv, offered = held.kv, context.kv
            # a host copy is offered when an engine is about to lose its own
            if offered is not None and (
                kv is None or offered.length > kv.length or (kv.on_device and not offered.on_device)
            ):
                held.attach(kv=offered)
        self._recount(head)

    def _bound(self, entry: _Entry) -> Context:
        """The held context as this handle's; one that other handles share notes only the newest of them."""
        context = self._contexts[entry.head]
        if context.handle is not None and context.handle.id == entry.handle.id:
            return context
        twin = context.without_kv()
        twin.attach(kv=context.kv, handle=entry.handle)
        return twin

    def _check_room(self, context: Context, sizes: dict[str, int]) -> None:
        """Refuse a context that cannot fit beside what is pinned."""
        if self.byte_budget is None or self._references.total + context.nbytes <= self.byte_budget:
            return
        if self._references.bytes_beside_pinned(sizes) > self.byte_budget:
            raise StoreFullError(
                f"{context.nbytes} bytes do not fit under the budget of {self.byte_budget} beside what is pinned. "
                "Unpin or delete contexts, or raise byte_budget."
            )

    def _evict(self, *, spare: str | None = None) -> builtins.list[Context]:
        """Decide what goes to bring the store under its budget. Returns the contexts whose KV-caches go, with them."""
        references, budget = self._references, self.byte_budget
        if budget is None or references.total <= budget:
            return []
        before = len(references.removals.handles)
        references.shrink_kv(budget)
        evicted: builtins.list[Context] = []
        if references.removals.kv:
            latest = {entry.head: entry for entry in references.handles.values()}
            evicted = [self._bound(latest[head]) for head in references.removals.kv]
        references.shrink_handles(budget, spare=spare)
        self._evictions += len(evicted) + len(references.removals.handles) - before
        return evicted

    def _let_go(self) -> PruneReport:
        """Hold no longer what was decided on. Who else holds one of these contexts keeps it as it is, with its KV."""
        removals, self._references.removals = self._references.removals, Removals()
        for head in removals.kv:
            self._contexts[head] = self._contexts[head].without_kv()
        for head in removals.ends:
            del self._contexts[head]
        return removals.report()

    def _spill_all(self, evicted: builtins.list[Context]) -> None:
        if self._spill is not None:
            for context in evicted:
                self._spill(context)

    def _recount_all(self) -> None:
        """KV-caches move between device and host without this store being told."""
        for head in self._contexts:
            self._recount(head)

    def _recount(self, head: str) -> None:
        kv = self._contexts[head].kv
        self._references.resize(head, kv=kv.nbytes if kv is not None and not kv.on_device else 0)
