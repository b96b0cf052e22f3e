"""A small fast store over a large durable one."""

from __future__ import annotations

import builtins
import contextlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace

from typing_extensions import override

from avp_agents.context import Context
from avp_agents.errors import (
    ConfigurationError,
    ContextLostError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)
from avp_agents.handle import ContextHandle
from avp_agents.lineage import same_values
from avp_agents.store.base import AnyHandle, ContextStore, Lookups, PruneReport, StoreStats, id_of_handle
from avp_agents.store.files import DiskStore
from avp_agents.store.memory import MemoryStore
from avp_agents.store.namespace import Namespace

log = logging.getLogger(__name__)

DEFAULT_MEMORY_BYTES = 1 << 30
DEFAULT_DISK_BYTES = 10 << 30


def default_store(namespace: Namespace | str = "default") -> TieredStore:
    """Memory (1 GiB) over a folder in the user's cache folder (10 GiB).

    Raises:
        NamespaceKeyError: The namespace's key cannot be used.
        StoreError: The folder cannot be created.
    """
    tenant = Namespace.of(namespace)
    return TieredStore(
        MemoryStore(namespace=tenant, byte_budget=DEFAULT_MEMORY_BYTES),
        DiskStore(namespace=tenant, byte_budget=DEFAULT_DISK_BYTES),
    )


@dataclass(frozen=True)
class _Wanted:
    """How a context was put."""

    kv: bool
    scope: str
    agent: str
    text: str
    ttl: float | None


class TieredStore(ContextStore):
    """Lineages go to both tiers at once, KV-caches to the lower one only when the upper one evicts them.

    The lower tier decides what exists: what was deleted or has expired there, by whichever process, is gone here too.
    The upper one makes it fast. While a server below is not available, what is put is kept above, and stored below at
    its next use after the server is back; what is only below cannot be had.

    Args:
        upper: The fast tier. It belongs to this store from now on.
        lower: The durable tier, perhaps shared with other processes.
        share_kv: Send KV-caches to the lower tier with the lineage, for workers on other machines that are to get them
            from there. Without it, those replay the lineage.

    Raises:
        ConfigurationError: The tiers have different namespaces or keys.
    """

    def __init__(self, upper: MemoryStore, lower: ContextStore, *, share_kv: bool = False) -> None:
        if upper.namespace != lower.namespace:
            raise ConfigurationError(
                f"Both tiers need one namespace and key; got {upper.namespace.name!r} and {lower.namespace.name!r}."
            )
        budgets = upper.byte_budget, lower.byte_budget
        total = None if None in budgets else sum(budget for budget in budgets if budget is not None)
        super().__init__(namespace=lower.namespace, byte_budget=total, ttl=lower.ttl)
        self.upper, self.lower = upper, lower
        self._share_kv = share_kv
        # what the lower tier does not have yet
        self._owed: dict[str, _Wanted] = {}
        self._lookups = Lookups()
        upper.spill_to(self._spill)

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
        """The lineage is in the lower tier when this returns, the KV-cache in the upper."""
        wanted = _Wanted(kv, scope, agent, text, ttl)
        try:
            return self._put_below(context, wanted)
        except StoreUnavailableError as error:
            log.warning("A context is kept in memory until the store below is back: %s", error)
            handle = self.upper.put(context, kv=kv, scope=scope, agent=agent, text=text, ttl=ttl)
            self._owed[handle.id] = wanted
            return handle

    @override
    def get(self, handle: AnyHandle, *, scope: str | None = None) -> Context:
        """A context that only the lower tier has is promoted."""
        try:
            context = self._find(id_of_handle(handle), scope)
        except ContextLostError:
            self._lookups.count(hit=False)
            raise
        self._lookups.count(hit=True)
        return context

    @override
    def contains(self, handle: AnyHandle) -> bool:
        try:
            self._settle(id_of_handle(handle))
            return self.lower.contains(handle) or (self.upper.contains(handle) and self.lower.touch(handle))
        except StoreUnavailableError:
            return self.upper.contains(handle)

    @override
    def touch(self, handle: AnyHandle) -> bool:
        above = self.upper.touch(handle)
        try:
            return self.lower.touch(handle)
        except StoreUnavailableError:
            return above

    @override
    def delete(self, handle: AnyHandle) -> bool:
        found = self.lower.delete(handle)
        owed = self._owed.pop(id_of_handle(handle), None)
        self.upper.delete(handle)
        return found or owed is not None

    @override
    def discard(self, handles: Iterable[AnyHandle], *, idle: float = 0.0, dry_run: bool = False) -> PruneReport:
        """Reports what left the lower tier."""
        report = self.lower.discard(handles, idle=idle, dry_run=dry_run)
        self._forget_above()
        return report

    @override
    def add_kv(self, context: Context) -> bool:
        """It goes to the upper tier where that has the context, else to the lower."""
        try:
            if not self.lower.contains(context.to_handle()):
                return False
        except StoreUnavailableError:
            return self.upper.add_kv(context)
        return self.upper.add_kv(context) or self.lower.add_kv(context)

    @override
    def drop_kv(self, handle: AnyHandle) -> int:
        return self.upper.drop_kv(handle) + self.lower.drop_kv(handle)

    @override
    def pin(self, handle: AnyHandle) -> None:
        self.lower.pin(handle)
        with contextlib.suppress(ContextLostError):
            self.upper.pin(handle)

    @override
    def unpin(self, handle: AnyHandle) -> None:
        self.lower.unpin(handle)
        self.upper.unpin(handle)

    @override
    def list(self, *, scope: str | None = None) -> builtins.list[ContextHandle]:
        return self.lower.list(scope=scope)

    @override
    def prune(self) -> PruneReport:
        """Reports what left the lower tier."""
        self.upper.prune()
        report = self.lower.prune()
        self._forget_above()
        return report

    @override
    def stats(self) -> StoreStats:
        """Contexts, segments and pins are the lower tier's; bytes are those of both."""
        upper, lower = self.upper.stats(), self.lower.stats()
        hits, misses = self._lookups.counts()
        return replace(
            lower,
            lineage_bytes=upper.lineage_bytes + lower.lineage_bytes,
            kv_bytes=upper.kv_bytes + lower.kv_bytes,
            byte_budget=self.byte_budget,
            hits=hits,
            misses=misses,
            evictions=upper.evictions + lower.evictions,
            integrity_failures=upper.integrity_failures + lower.integrity_failures,
        )

    @override
    def close(self) -> None:
        """Close both tiers."""
        self.upper.close()
        self.lower.close()

    def _find(self, handle_id: str, scope: str | None) -> Context:
        """From the upper tier, or from the lower if that has more of it."""
        try:
            self._settle(handle_id)
            return self._find_below(handle_id, scope)
        except StoreUnavailableError as error:
            try:
                return self.upper.get(handle_id, scope=scope)
            except ContextLostError:
                raise error from None

    def _find_below(self, handle_id: str, scope: str | None) -> Context:
        """As the lower tier decides.

        Raises:
            StoreUnavailableError: It cannot be asked.
        """
        if not self.lower.touch(handle_id):
            self.upper.delete(handle_id)
            raise ContextLostError(f"{handle_id} is in no tier (for this namespace and scope), or no longer.")
        try:
            context = self.upper.get(handle_id, scope=scope)
        except ContextLostError:
            stored = self.lower.get(handle_id, scope=scope)
            self._keep_above(stored)
            return stored
        return context if context.has_whole_kv else self._with_stored_kv(context, handle_id, scope)

    def _with_stored_kv(self, context: Context, handle_id: str, scope: str | None) -> Context:
        """A context of the upper tier with the KV-cache that the lower one has of it, if that has more."""
        try:
            stored = self.lower.get(handle_id, scope=scope)
        except ContextLostError:
            return context
        if stored.kv_len <= context.kv_len or not same_values(stored, context):
            return context
        self._keep_above(stored)
        return stored

    def _put_below(self, context: Context, wanted: _Wanted) -> ContextHandle:
        """Put a context into both tiers.

        Raises:
            StoreUnavailableError: The lower one cannot be asked.
        """
        known = self.lower.contains(self.id_of(context, scope=wanted.scope))
        below = wanted.kv and self._share_kv
        handle = self.lower.put(
            context, kv=below, scope=wanted.scope, agent=wanted.agent, text=wanted.text, ttl=wanted.ttl
        )
        if known and not self.upper.contains(handle):
            stored = self.lower.get(handle, scope=wanted.scope)
            if not same_values(stored, context):
                self._keep_above(stored)
                return handle
        self._keep_above(context, kv=wanted.kv)
        return handle

    def _settle(self, handle_id: str) -> None:
        """Put a context into the lower tier that could not be put there before.

        Raises:
            StoreUnavailableError: It still cannot.
        """
        owed = self._owed.get(handle_id)
        if owed is None:
            return
        if self.upper.contains(handle_id):
            context = self.upper.get(handle_id)
            self._put_below(context, owed)
        self._owed.pop(handle_id, None)

    def _keep_above(self, context: Context, *, kv: bool = True) -> None:
        """Keep a context of the lower tier in the upper, if it fits there."""
        try:
            self.upper.keep(context, context.to_handle(), kv=kv)
        except StoreFullError:
            if kv:
                self.lower.add_kv(context)

    def _forget_above(self) -> None:
        """Drop from the upper tier what the lower one no longer has."""
        alive = {handle.id for handle in self.lower.list()} | self._owed.keys()
        for handle in self.upper.list():
            if handle.id not in alive:
                self.upper.delete(handle)

    def _spill(self, context: Context) -> None:
        """Keep in the lower tier what the upper evicted."""
        try:
            self.lower.add_kv(context)
        except StoreError as error:
            log.warning("An evicted KV-cache was not kept (its lineage is): %s", error)
