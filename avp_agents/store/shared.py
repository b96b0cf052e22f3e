"""Contexts on a server that many machines share. What the server is, its `Blobs` know; everything else is here."""

from __future__ import annotations

import builtins
import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from avp_agents.context import Context
from avp_agents.errors import ConfigurationError, ContextLostError, KvMemoryError, StoreFullError, StoreUnavailableError
from avp_agents.handle import ContextHandle
from avp_agents.kv_cache import HostKv
from avp_agents.store.base import AnyHandle, ContextStore, PruneReport, StoreStats, id_of_handle
from avp_agents.store.blobs import Blobs, Payloads
from avp_agents.store.byte_budget import ByteBudget
from avp_agents.store.chain import Chain, MissingKv, content_digests, lacking_records, missing_kv, read_chain, read_kv
from avp_agents.store.encryption import Encryption
from avp_agents.store.handle_record import HandleRecord
from avp_agents.store.kv_file import KvPart, check_layers
from avp_agents.store.lookups import Lookups
from avp_agents.store.namespace import Namespace
from avp_agents.store.shared_records import Extents, SharedRecords

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Comparison:
    """What a store has of a context's segments.

    Attributes:
        found: Those that are there, by id.
        absent: Those that are not, encoded.
        outdated: Those that are there torn, or without the readout that they should have, encoded.
    """

    found: list[str]
    absent: dict[str, bytes]
    outdated: dict[str, bytes]

    @property
    def is_complete(self) -> bool:
        """Whether nothing is lacking."""
        return not self.absent and not self.outdated

    @property
    def lacking_bytes(self) -> int:
        """Bytes of what is lacking."""
        return sum(len(data) for data in (*self.absent.values(), *self.outdated.values()))


class SharedStore(ContextStore):
    """Keeps contexts on a server: one record and one payload per segment, shared by all contexts that begin with it.

    A killed process leaves whole contexts or none. Reading waits for nobody. Every method raises
    `StoreUnavailableError` where the server does not answer in time; then it is not asked again for a few seconds.

    Args:
        blobs: The server, and this namespace's place on it.
        payloads: Where KV-caches lie: the same, or another server.
        namespace, byte_budget, ttl: As for every store. Every worker needs the same namespace and key. The budget
            counts bytes as they are stored, handles not included; workers with the same budget keep to it together, to
            within 1/64 for each and what they write at the same moment.
        max_kv_bytes: KV-caches that would add more than this to the store are not kept; None keeps all, 0 none.
        encryption: Seals everything that goes to the server.
    """

    def __init__(
        self,
        blobs: Blobs,
        payloads: Payloads,
        *,
        namespace: Namespace,
        byte_budget: int | None,
        ttl: float | None,
        max_kv_bytes: int | None,
        encryption: Encryption | None,
    ) -> None:
        super().__init__(namespace=namespace, byte_budget=byte_budget, ttl=ttl)
        self.place, self.max_kv_bytes = blobs.place, max_kv_bytes
        self.encryption = encryption
        self.blobs, self.payloads = blobs, payloads
        self._records = SharedRecords(blobs, payloads, namespace, encryption)
        self._budget = ByteBudget(self._records, byte_budget)
        self._budget_lock = threading.Lock()
        self._lookups = Lookups()

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
        """See `ContextStore.put`. Lineage and KV-cache are on the server when this returns.

        Raises:
            ConfigurationError: The context's values cannot be stored: ids out of range, tensors not finite or of the
                wrong shape or dtype, or a KV-cache longer than the lineage.
            StoreFullError: Pinned contexts leave no room.
            StoreUnavailableError: The server does not answer.
        """
        own = content_digests(context.lineage, context.dtype)
        handle = self.new_handle(context, scope=scope, agent=agent, text=text)
        handle = self._put_lineage(context, own, handle, ttl)
        context.attach(handle=handle)
        if kv:
            try:
                self._put_kv(context, own)
            except StoreUnavailableError as error:
                log.warning("A KV-cache was not kept (its lineage is): %s", error)
        return handle

    def get(self, handle: AnyHandle, *, scope: str | None = None) -> Context:
        """See `ContextStore.get`."""
        handle_id = id_of_handle(handle)
        record = self._live(handle_id)
        known = record is not None and self.namespace.is_of(record.handle.id, record.recipe_id, scope)
        chain = self._chain(record) if record is not None and known else None
        self._lookups.count(hit=chain is not None)
        if record is None or chain is None:
            raise ContextLostError(f"{handle_id} is not in {self.place} (for this namespace and scope), or no longer.")
        self._records.use(handle_id)
        context = Context(chain.fingerprint, chain.dtype, chain.lineage, chain.readout)
        context.attach(kv=read_kv(self._records.read_extents(record.segments), chain), handle=record.handle)
        return context

    def contains(self, handle: AnyHandle) -> bool:
        """See `ContextStore.contains`."""
        record = self._live(id_of_handle(handle))
        return record is not None and self._chain(record) is not None

    def touch(self, handle: AnyHandle) -> bool:
        """See `ContextStore.touch`."""
        handle_id = id_of_handle(handle)
        if self._live(handle_id) is None:
            return False
        self._records.use(handle_id)
        return True

    def delete(self, handle: AnyHandle) -> bool:
        """See `ContextStore.delete`."""
        handle_id = id_of_handle(handle)
        with self.blobs.removing():
            if not self._records.existing("handles", [handle_id]):
                return False
            census = self._records.census()
            if handle_id in census.handles:
                census.release(handle_id)
            else:
                census.removals.handles.append(handle_id)
            self._records.remove(census.removals)
        return True

    def discard(self, handles: Iterable[AnyHandle], *, idle: float = 0.0, dry_run: bool = False) -> PruneReport:
        """See `ContextStore.discard`."""
        wanted = [id_of_handle(handle) for handle in handles]
        with self.blobs.removing():
            census = self._records.census()
            latest = self.blobs.now() - idle
            for handle_id in wanted:
                stored = census.handles.get(handle_id)
                if stored is not None and not stored.pinned and stored.last_use <= latest:
                    census.release(handle_id)
            if not dry_run:
                self._records.remove(census.removals)
        return census.removals.report()

    def add_kv(self, context: Context) -> bool:
        """See `ContextStore.add_kv`."""
        handle_id = context.to_handle().id
        if self._live(handle_id) is None:
            return False
        self._put_kv(context, content_digests(context.lineage, context.dtype))
        return bool(self._records.existing("handles", [handle_id]))

    def drop_kv(self, handle: AnyHandle) -> int:
        """See `ContextStore.drop_kv`."""
        handle_id = id_of_handle(handle)
        with self.blobs.removing():
            census = self._records.census()
            if handle_id not in census.handles:
                return 0
            for segment_id in census.used_only_by(handle_id):
                census.drop_kv(segment_id)
            self._records.remove(census.removals)
        return census.removals.kv_bytes

    def pin(self, handle: AnyHandle) -> None:
        """See `ContextStore.pin`."""
        handle_id = id_of_handle(handle)
        with self.blobs.removing():
            if self._live(handle_id) is None:
                raise ContextLostError(f"{handle_id} cannot be pinned: it is not in {self.place}, or no longer.")
            self._records.set_pinned(handle_id, True)

    def unpin(self, handle: AnyHandle) -> None:
        """See `ContextStore.unpin`."""
        handle_id = id_of_handle(handle)
        with self.blobs.removing():
            if self._records.existing("pins", [handle_id]):
                self._records.use(handle_id)
                self._records.set_pinned(handle_id, False)

    def list(self, *, scope: str | None = None) -> builtins.list[ContextHandle]:
        """See `ContextStore.list`."""
        records = [r for r in self._all_live() if self.namespace.is_of(r.handle.id, r.recipe_id, scope)]
        return [record.handle for record in sorted(records, key=lambda record: record.stored)]

    def prune(self) -> PruneReport:
        """See `ContextStore.prune`. Also removes what killed processes left and what can no longer be read."""
        with self.blobs.removing(), self._budget_lock:
            self._records.remove_abandoned()
            census = self._records.census()
            live = {record.handle.id for record in self._all_live()}
            census.release_lost(self._records.handle_ids(), live.__contains__)
            self._budget.keep(census)
            self._budget.apply(census)
        return census.removals.report()

    def stats(self) -> StoreStats:
        """See `ContextStore.stats`. Bytes are those that are stored."""
        census = self._records.census()
        return census.stats(
            self._lookups,
            byte_budget=self.byte_budget,
            evictions=self._budget.evictions,
            integrity_failures=self._records.integrity_failures,
        )

    def close(self) -> None:
        """Close the connections. Stored contexts stay."""
        self.payloads.close()
        self.blobs.close()

    def _put_lineage(
        self, context: Context, own: Sequence[str], handle: ContextHandle, ttl: float | None
    ) -> ContextHandle:
        """Write the segments that are not there yet, then the handle. Returns the handle of the first put."""
        segment_ids = self.namespace.segment_ids(context.recipe_ids)
        known, there = self._live(handle.id), self._compare(context, own, segment_ids)
        if known is not None and there.is_complete:
            self._records.use(handle.id)
            return known.handle
        if not self._make_room(there.lacking_bytes, segment_ids, spare=handle.id):
            raise StoreFullError(
                f"{there.lacking_bytes} bytes do not fit under the budget of {self.byte_budget} beside what is pinned. "
                "Unpin or delete contexts, or raise byte_budget."
            )
        record = known or HandleRecord(handle, context.recipe_id, ttl, self.blobs.now(), tuple(segment_ids))
        with self.blobs.writing():
            if self._records.existing("segments", there.found) != set(there.found):
                # somebody removed some of them meanwhile, and cannot do so from here on
                there = self._compare(context, own, segment_ids)
            self._records.use(handle.id)
            self._records.replace_segments(there.outdated)
            if not self._records.add(there.absent, record):
                first = self._live(handle.id)
                if first is not None:
                    return first.handle
                self._records.replace_handle(record)
        return record.handle

    def _compare(self, context: Context, own: Sequence[str], segment_ids: Sequence[str]) -> _Comparison:
        """What is there of a context's segments, which keep their values, and what is not."""
        stored = self._records.read_segments(segment_ids)
        lacking = lacking_records(stored, context, own, segment_ids)
        encoded = {id_: self._records.encoded_segment(id_, record) for id_, record in lacking.items()}
        there = stored.records.keys() | stored.unreadable
        return _Comparison(
            found=[id_ for id_ in segment_ids if id_ not in lacking],
            absent={id_: data for id_, data in encoded.items() if id_ not in there},
            outdated={id_: data for id_, data in encoded.items() if id_ in there},
        )

    def _put_kv(self, context: Context, own: Sequence[str]) -> None:
        """Write the positions of a context's KV-cache that are not there yet."""
        cache = context.kv
        if cache is None or self.max_kv_bytes == 0:
            return
        if cache.length > len(context):
            raise ConfigurationError(f"The KV-cache has {cache.length} positions, its lineage only {len(context)}.")
        segment_ids = self.namespace.segment_ids(context.recipe_ids)
        extents = self._records.read_extents(segment_ids)
        chain = read_chain(self._records.read_segments(segment_ids), segment_ids[-1])
        missing = missing_kv(extents, chain.agreeing_with(own), cache.length) if chain is not None else []
        if not missing:
            return
        start, stop = missing[0].start, missing[-1].stop
        size = (stop - start) * cache.nbytes // max(1, cache.length)
        if self.max_kv_bytes is not None and size > self.max_kv_bytes:
            log.info("A KV-cache of %d bytes was not kept: max_kv_bytes is %d.", size, self.max_kv_bytes)
            return
        try:
            host = cache.to_host(start, stop)
        except KvMemoryError:
            return
        check_layers(host)
        self._write_kv(segment_ids, missing, host, start, extents)

    def _write_kv(
        self, segment_ids: Sequence[str], missing: Sequence[MissingKv], host: HostKv, start: int, replaced: Extents
    ) -> None:
        """Write the missing positions out of `host`, which begins at `start`."""
        parts = {
            part.link.segment_id: KvPart(
                part.start, part.stop, part.link.content, host.to_host(part.start - start, part.stop - start)
            )
            for part in missing
        }
        size = sum(self._records.stored_size(part) for part in parts.values())
        if not self._make_room(size, segment_ids, kv_only=True):
            log.info("A KV-cache of %d bytes was not kept: the budget of %s is taken.", size, self.byte_budget)
            return
        records = {segment_id: self._records.write_payload(segment_id, part) for segment_id, part in parts.items()}
        with self.blobs.writing():
            self._records.refer(records, replaced)

    def _make_room(
        self, size: int, segment_ids: Sequence[str], *, kv_only: bool = False, spare: str | None = None
    ) -> bool:
        """Evict so that `size` more bytes fit; see `ByteBudget.make_room`."""
        with self._budget_lock:
            if not self._budget.must_look(size):
                return self._budget.make_room(size, segment_ids)
            with self.blobs.removing():
                return self._budget.make_room(size, segment_ids, kv_only=kv_only, spare=spare)

    def _live(self, handle_id: str) -> HandleRecord | None:
        """A handle's record, unless it has expired."""
        return next(iter(self._live_of(self._records.read_handles([handle_id]), handle_id)), None)

    def _all_live(self) -> builtins.list[HandleRecord]:
        """All records of handles that have not expired."""
        return self._live_of(self._records.read_handles(self._records.handle_ids()))

    def _live_of(self, records: dict[str, HandleRecord], handle_id: str | None = None) -> builtins.list[HandleRecord]:
        """Those that have not expired: all of them, or the only one, `handle_id`."""
        lifetimes = {own: r.ttl if r.ttl is not None else self.ttl for own, r in records.items()}
        mortal = [own for own, ttl in lifetimes.items() if ttl is not None]
        if not mortal:
            return list(records.values())
        now, uses, pinned = self.blobs.now(), self._records.uses(handle_id), self._records.existing("pins", mortal)
        return [
            record
            for own, record in records.items()
            if (ttl := lifetimes[own]) is None or own in pinned or now < uses.get(own, 0.0) + ttl
        ]

    def _chain(self, record: HandleRecord) -> Chain | None:
        return read_chain(self._records.read_segments(record.segments), self.namespace.segment_id(record.recipe_id))
