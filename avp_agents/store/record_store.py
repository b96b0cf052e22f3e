"""The durable store: everything that stores in a folder, on a server and in a bucket have in common.

What the place is, its `Blobs` know; where KV-caches lie, its `KvShares`. Everything else is here.
"""

from __future__ import annotations

import builtins
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence

from typing_extensions import override

from avp_agents.context import Context
from avp_agents.errors import ConfigurationError, ContextLostError, KvMemoryError, StoreFullError, StoreUnavailableError
from avp_agents.handle import ContextHandle
from avp_agents.store.base import AnyHandle, ContextStore, Lookups, PruneReport, StoreStats, id_of_handle
from avp_agents.store.checked_blobs import CheckedBlobs
from avp_agents.store.kv_file import KvPart, check_layers, kv_bytes
from avp_agents.store.kv_shares import KvShares, MissingKv, content_digests, links_of, missing_kv, read_kv
from avp_agents.store.lineage_records import LineageRecords
from avp_agents.store.records import HandleRecord
from avp_agents.store.references import ByteBudget

log = logging.getLogger(__name__)


class RecordStore(ContextStore):
    """Keeps contexts as one record and one share of the KV-cache per segment, shared by all that begin with it.

    A killed process leaves whole contexts or none. Reading waits for nobody. On a server, every method raises
    `StoreUnavailableError` where it does not answer in time; then it is not asked again for a few seconds.

    Args:
        records: Where records lie, whose they are, and what seals them. Every worker needs the same namespace and key.
        kv: Where KV-caches lie.
        byte_budget, ttl: As for every store. The budget counts bytes as they are stored, handles not included; workers
            with the same budget keep to it together, to within 1/64 for each and what they write at the same moment.
        max_kv_bytes: KV-caches that would add more than this to the store are not kept; None keeps all, 0 none.

    Attributes:
        records, blobs: Where records lie.
        place: The same for people, without credentials.
    """

    def __init__(
        self,
        records: CheckedBlobs,
        kv: KvShares,
        *,
        byte_budget: int | None,
        ttl: float | None,
        max_kv_bytes: int | None = None,
    ) -> None:
        super().__init__(namespace=records.namespace, byte_budget=byte_budget, ttl=ttl)
        self.records, self.blobs = records, records.blobs
        self.place, self.max_kv_bytes = records.blobs.place, max_kv_bytes
        self._kv = kv
        self._lineages = LineageRecords(records, kv)
        self._budget = ByteBudget(byte_budget)
        # taken before the place's own locks
        self._budget_lock = threading.Lock()
        self._lookups = Lookups()

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
        """Lineage and KV-cache are on the disk, or on the server, when this returns.

        Raises:
            ConfigurationError: The context's values cannot be stored: ids out of range, tensors not finite or of the
                wrong shape or dtype, or a KV-cache longer than the lineage.
            StoreFullError: Pinned contexts leave no room.
            StoreUnavailableError: The server does not answer.
            StoreError: The file system refuses.
        """
        digests = content_digests(context.lineage, context.dtype)
        handle = self.new_handle(context, scope=scope, agent=agent, text=text)
        handle = self._put_lineage(context, digests, handle, ttl)
        context.attach(handle=handle)
        if kv:
            try:
                self._put_kv(context, digests)
            except StoreUnavailableError as error:
                log.warning("A KV-cache was not kept (its lineage is): %s", error)
        return handle

    @override
    def get(self, handle: AnyHandle, *, scope: str | None = None) -> Context:
        handle_id = id_of_handle(handle)
        record = self._live(handle_id)
        known = record is not None and self.namespace.is_of(record.handle.id, record.recipe_id, scope)
        segments = self._lineages.read_lineage(record.segments) if record is not None and known else None
        self._lookups.count(hit=segments is not None)
        if record is None or segments is None:
            raise ContextLostError(f"{handle_id} is not in {self.place} (for this namespace and scope), or no longer.")
        self._lineages.use(handle_id)
        last = segments[-1]
        context = Context(last.fingerprint, last.dtype, tuple(each.segment for each in segments), last.readout)
        extents = self._kv.extents(record.segments)
        kv = read_kv(extents, links_of(record.segments, context.lineage, context.dtype)) if extents else None
        context.attach(kv=kv, handle=record.handle)
        return context

    @override
    def contains(self, handle: AnyHandle) -> bool:
        record = self._live(id_of_handle(handle))
        return record is not None and self._lineages.read_lineage(record.segments) is not None

    @override
    def touch(self, handle: AnyHandle) -> bool:
        handle_id = id_of_handle(handle)
        if self._live(handle_id) is None:
            return False
        self._lineages.use(handle_id)
        return True

    @override
    def delete(self, handle: AnyHandle) -> bool:
        handle_id = id_of_handle(handle)
        with self.blobs.removing():
            if not self.records.existing("handles", [handle_id]):
                return False
            references = self._lineages.references()
            if handle_id in references.handles:
                references.release(handle_id)
            else:
                references.removals.handles.append(handle_id)
            self._lineages.remove(references.removals)
        return True

    @override
    def discard(self, handles: Iterable[AnyHandle], *, idle: float = 0.0, dry_run: bool = False) -> PruneReport:
        wanted, latest = [id_of_handle(handle) for handle in handles], self.blobs.now() - idle
        with self.blobs.removing():
            references = self._lineages.references()
            references.release_idle(wanted, latest)
            if not dry_run:
                self._lineages.remove(references.removals)
        return references.removals.report()

    @override
    def add_kv(self, context: Context) -> bool:
        handle_id = context.to_handle().id
        if self._live(handle_id) is None:
            return False
        self._put_kv(context, content_digests(context.lineage, context.dtype))
        return bool(self.records.existing("handles", [handle_id]))

    @override
    def drop_kv(self, handle: AnyHandle) -> int:
        handle_id = id_of_handle(handle)
        with self.blobs.removing():
            references = self._lineages.references()
            if handle_id not in references.handles:
                return 0
            for segment_id in references.used_only_by(handle_id):
                references.drop_kv(segment_id)
            self._lineages.remove(references.removals)
        return references.removals.kv_bytes

    @override
    def pin(self, handle: AnyHandle) -> None:
        handle_id = id_of_handle(handle)
        with self.blobs.removing():
            if self._live(handle_id) is None:
                raise ContextLostError(f"{handle_id} cannot be pinned: it is not in {self.place}, or no longer.")
            self._lineages.set_pinned(handle_id, True)

    @override
    def unpin(self, handle: AnyHandle) -> None:
        handle_id = id_of_handle(handle)
        with self.blobs.removing():
            if self.records.existing("pins", [handle_id]):
                self._lineages.use(handle_id)
                self._lineages.set_pinned(handle_id, False)

    @override
    def list(self, *, scope: str | None = None) -> builtins.list[ContextHandle]:
        records = [r for r in self._all_live() if self.namespace.is_of(r.handle.id, r.recipe_id, scope)]
        return [record.handle for record in sorted(records, key=lambda record: record.stored)]

    @override
    def prune(self) -> PruneReport:
        """Also removes what killed processes left and what can no longer be read."""
        with self._budget_lock, self.blobs.removing():
            self._lineages.remove_abandoned()
            references = self._lineages.references(checked=True)
            live = {record.handle.id for record in self._all_live()}
            references.release_lost(self._lineages.handle_ids(), live.__contains__)
            self._budget.keep(references)
            self._lineages.remove(references.removals)
            self._budget.counted(references)
        return references.removals.report()

    @override
    def stats(self) -> StoreStats:
        """Bytes are those that are stored."""
        return self._lineages.references().stats(
            self._lookups,
            byte_budget=self.byte_budget,
            evictions=self._budget.evictions,
            integrity_failures=self.blobs.integrity_failures,
        )

    @override
    def close(self) -> None:
        self._kv.close()
        self.blobs.close()

    def _put_lineage(
        self, context: Context, digests: Sequence[str], handle: ContextHandle, ttl: float | None
    ) -> ContextHandle:
        """Write the segments that are not there yet, then the handle. Returns the handle of the first put."""
        segment_ids = self.namespace.segment_ids(context.recipe_ids)
        stored = self._lineages.read_handles([handle.id])
        known = next(iter(self._live_of(stored, handle.id)), None)
        lacking = self._lineages.lacking(context, digests, segment_ids)
        if known is not None and not lacking:
            self._lineages.use(handle.id)
            return known.handle
        if not self._make_room(lacking.size, segment_ids, spare=handle.id):
            raise StoreFullError(
                f"{lacking.size} bytes do not fit under the budget of {self.byte_budget} beside what is pinned. "
                "Unpin or delete contexts, or raise byte_budget."
            )
        record = known or HandleRecord(handle, context.recipe_id, ttl, self.blobs.now(), tuple(segment_ids))
        there = set(segment_ids) - lacking.absent.keys()
        with self.blobs.writing():
            if self.records.existing("segments", there) != there:
                # somebody removed some of them meanwhile, and cannot do so from here on
                lacking = self._lineages.lacking(context, digests, segment_ids)
            self._lineages.use(handle.id)
            self._lineages.replace_segments(lacking.outdated)
            added = self._lineages.add(lacking.absent, record)
            if not lacking.absent.keys() <= added:
                # what somebody else has written meanwhile may lack our readout
                self._lineages.replace_segments(self._lineages.lacking(context, digests, segment_ids).outdated)
            if handle.id not in added:
                first = self._live(handle.id) if known or not stored else None
                if first is not None:
                    return first.handle
                # it was torn, or had expired before it was used just now
                self._lineages.replace_handle(record)
        return record.handle

    def _put_kv(self, context: Context, digests: Sequence[str]) -> None:
        """Write the positions of a context's KV-cache that are not there yet."""
        cache = context.kv
        if cache is None or self.max_kv_bytes == 0:
            return
        if cache.length > len(context):
            raise ConfigurationError(f"The KV-cache has {cache.length} positions, its lineage only {len(context)}.")
        segment_ids = self.namespace.segment_ids(context.recipe_ids)
        missing = self._missing_kv(segment_ids, digests, context.dtype, cache.length)
        if not missing:
            return
        start, stop = missing[0].start, missing[-1].stop
        size = (stop - start) * cache.nbytes // max(1, cache.length)
        if self.max_kv_bytes is not None and size > self.max_kv_bytes:
            log.info("A KV-cache of %d bytes was not kept: max_kv_bytes is %d.", size, self.max_kv_bytes)
            return
        try:
            # an engine may hold its own lock here and wait for ours, so ours are taken later
            host = cache.to_host(start, stop)
        except KvMemoryError:
            return
        check_layers(host)
        parts = {
            part.link.segment_id: KvPart(
                part.start, part.stop, part.link.content, host.to_host(part.start - start, part.stop - start)
            )
            for part in missing
        }
        size = sum(self.records.stored_size(kv_bytes(part)) for part in parts.values())
        if not self._make_room(size, segment_ids, kv_only=True):
            log.info("A KV-cache of %d bytes was not kept: the budget of %s is taken.", size, self.byte_budget)
            return
        self._kv.write(parts)

    def _missing_kv(
        self, segment_ids: Sequence[str], digests: Sequence[str], dtype: str, length: int
    ) -> builtins.list[MissingKv]:
        """The positions that a cache of `length` would add, as far as what is stored has the values that it is of."""
        segments = self._lineages.read_lineage(segment_ids)
        if segments is None:
            return []
        links = links_of(segment_ids, [each.segment for each in segments], dtype)
        agreeing = [link for link, own in zip(links, digests, strict=True) if link.content == own]
        return missing_kv(self._kv.extents(segment_ids), agreeing, length)

    def _make_room(
        self, size: int, segment_ids: Sequence[str], *, kv_only: bool = False, spare: str | None = None
    ) -> bool:
        """Evict so that `size` more bytes fit; see `ByteBudget.make_room`."""
        with self._budget_lock:
            if self._budget.takes(size):
                return True
            with self.blobs.removing():
                references = self._lineages.references()
                if not self._budget.make_room(references, size, segment_ids, kv_only=kv_only, spare=spare):
                    return False
                self._lineages.remove(references.removals)
                self._budget.counted(references, size)
            return True

    def _live(self, handle_id: str) -> HandleRecord | None:
        """A handle's record, unless it has expired."""
        return next(iter(self._live_of(self._lineages.read_handles([handle_id]), handle_id)), None)

    def _all_live(self) -> builtins.list[HandleRecord]:
        """All records of handles that have not expired."""
        return self._live_of(self._lineages.read_handles(self._lineages.handle_ids()))

    def _live_of(
        self, records: Mapping[str, HandleRecord], handle_id: str | None = None
    ) -> builtins.list[HandleRecord]:
        """Those that have not expired: all of them, or the only one, `handle_id`."""
        lifetimes = {own: r.ttl if r.ttl is not None else self.ttl for own, r in records.items()}
        mortal = [own for own, ttl in lifetimes.items() if ttl is not None]
        if not mortal:
            return list(records.values())
        now, pinned = self.blobs.now(), self.records.existing("pins", mortal)
        uses = self._lineages.uses(handle_id)
        return [
            record
            for own, record in records.items()
            if (ttl := lifetimes[own]) is None or own in pinned or now < uses.get(own, 0.0) + ttl
        ]
