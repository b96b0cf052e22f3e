"""Contexts on disk, shared by all processes of a user."""

from __future__ import annotations

import builtins
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from avp_agents.context import Context
from avp_agents.errors import ConfigurationError, ContextLostError, KvMemoryError, StoreError, StoreFullError
from avp_agents.handle import ContextHandle
from avp_agents.kv_cache import HostKv
from avp_agents.store.base import AnyHandle, ContextStore, PruneReport, StoreStats, id_of_handle
from avp_agents.store.byte_budget import ByteBudget
from avp_agents.store.chain import Chain, MissingKv, content_digests, lacking_records, missing_kv, read_chain, read_kv
from avp_agents.store.durable import make_private_folder
from avp_agents.store.folder import NamespaceFolder
from avp_agents.store.handle_record import HandleRecord
from avp_agents.store.kv_file import KvPart, check_layers
from avp_agents.store.lookups import Lookups
from avp_agents.store.namespace import Namespace
from avp_agents.store.segment_record import encode_segment

log = logging.getLogger(__name__)


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Say what went wrong when the file system refuses."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"The store on disk cannot be used: {error}. Check space, permissions and path.") from error


class DiskStore(ContextStore):
    """Keeps contexts in a folder: one lineage record and one KV file per segment, shared by all that begin with it.

    A killed process leaves whole contexts or none. Several processes may use a folder at once. Reading takes no lock.

    Args:
        path: The folder; by default one in the user's cache folder.
        namespace, byte_budget, ttl: As for every store. The budget counts bytes of files, handles not included; other
            processes with the same budget keep to it too, to within 1/64 for each.

    Raises:
        StoreError: The folder cannot be created.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        namespace: Namespace | str = "default",
        byte_budget: int | None = None,
        ttl: float | None = None,
    ) -> None:
        super().__init__(namespace=namespace, byte_budget=byte_budget, ttl=ttl)
        self.path = Path(path) if path is not None else platformdirs.user_cache_path("avp-agents") / "contexts"
        with _disk_errors():
            make_private_folder(self.path)
        self._folder = NamespaceFolder(self.path, self.namespace)
        self._budget = ByteBudget(self._folder, byte_budget)
        self._lookups = Lookups()

    @_disk_errors()
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
        """See `ContextStore.put`. The lineage is on the disk when this returns, and so is the KV-cache.

        Raises:
            ConfigurationError: The context's values cannot be stored: ids out of range, tensors not finite or of the
                wrong shape or dtype, or a KV-cache longer than the lineage.
            StoreFullError: Pinned contexts leave no room.
            StoreError: The file system refuses.
        """
        own = content_digests(context.lineage, context.dtype)
        handle = self.new_handle(context, scope=scope, agent=agent, text=text)
        handle = self._put_lineage(context, own, handle, ttl)
        context.attach(handle=handle)
        if kv:
            self._put_kv(context, own)
        return handle

    @_disk_errors()
    def get(self, handle: AnyHandle, *, scope: str | None = None) -> Context:
        """See `ContextStore.get`. A KV-cache that lies in one file is memory-mapped, not copied."""
        handle_id = id_of_handle(handle)
        record = self._live(handle_id)
        known = record is not None and self.namespace.is_of(record.handle.id, record.recipe_id, scope)
        chain = self._chain(record) if record is not None and known else None
        self._lookups.count(hit=chain is not None)
        if record is None or chain is None:
            raise ContextLostError(f"{handle_id} is not in {self.path} (for this namespace and scope), or no longer.")
        self._folder.touch(handle_id)
        context = Context(chain.fingerprint, chain.dtype, chain.lineage, chain.readout)
        context.attach(kv=read_kv(self._folder, chain), handle=record.handle)
        return context

    @_disk_errors()
    def contains(self, handle: AnyHandle) -> bool:
        """See `ContextStore.contains`."""
        record = self._live(id_of_handle(handle))
        return record is not None and self._chain(record) is not None

    @_disk_errors()
    def touch(self, handle: AnyHandle) -> bool:
        """See `ContextStore.touch`."""
        handle_id = id_of_handle(handle)
        return self._live(handle_id) is not None and self._folder.touch(handle_id)

    @_disk_errors()
    def delete(self, handle: AnyHandle) -> bool:
        """See `ContextStore.delete`."""
        handle_id = id_of_handle(handle)
        with self._folder.lock():
            if not self._folder.has_handle(handle_id):
                return False
            census = self._folder.census()
            if handle_id in census.handles:
                census.release(handle_id)
            else:
                census.removals.handles.append(handle_id)
            self._folder.remove(census.removals)
        return True

    @_disk_errors()
    def discard(self, handles: Iterable[AnyHandle], *, idle: float = 0.0, dry_run: bool = False) -> PruneReport:
        """See `ContextStore.discard`."""
        wanted = [id_of_handle(handle) for handle in handles]
        with self._folder.lock():
            census = self._folder.census()
            latest = time.time() - idle
            for handle_id in wanted:
                stored = census.handles.get(handle_id)
                if stored is not None and not stored.pinned and stored.last_use <= latest:
                    census.release(handle_id)
            if not dry_run:
                self._folder.remove(census.removals)
        return census.removals.report()

    @_disk_errors()
    def delete_namespace(self) -> None:
        """Remove everything of this namespace, and nothing else."""
        with self._folder.kv_lock(), self._folder.lock():
            self._folder.remove_everything()

    @_disk_errors()
    def add_kv(self, context: Context) -> bool:
        """See `ContextStore.add_kv`."""
        handle_id = context.to_handle().id
        if self._live(handle_id) is None:
            return False
        self._put_kv(context, content_digests(context.lineage, context.dtype))
        return self._folder.has_handle(handle_id)

    @_disk_errors()
    def drop_kv(self, handle: AnyHandle) -> int:
        """See `ContextStore.drop_kv`."""
        handle_id = id_of_handle(handle)
        with self._folder.lock():
            census = self._folder.census()
            if handle_id not in census.handles:
                return 0
            for segment_id in census.used_only_by(handle_id):
                census.drop_kv(segment_id)
            self._folder.remove(census.removals)
        return census.removals.kv_bytes

    @_disk_errors()
    def pin(self, handle: AnyHandle) -> None:
        """See `ContextStore.pin`."""
        handle_id = id_of_handle(handle)
        with self._folder.lock():
            if self._live(handle_id) is None:
                raise ContextLostError(f"{handle_id} cannot be pinned: it is not in {self.path}, or no longer.")
            self._folder.set_pinned(handle_id, True)

    @_disk_errors()
    def unpin(self, handle: AnyHandle) -> None:
        """See `ContextStore.unpin`."""
        handle_id = id_of_handle(handle)
        with self._folder.lock():
            if self._folder.is_pinned(handle_id):
                self._folder.touch(handle_id)
                self._folder.set_pinned(handle_id, False)

    @_disk_errors()
    def list(self, *, scope: str | None = None) -> builtins.list[ContextHandle]:
        """See `ContextStore.list`."""
        records = [r for handle_id in self._folder.handle_ids() if (r := self._live(handle_id)) is not None]
        records = [r for r in records if self.namespace.is_of(r.handle.id, r.recipe_id, scope)]
        return [record.handle for record in sorted(records, key=lambda record: record.stored)]

    @_disk_errors()
    def prune(self) -> PruneReport:
        """See `ContextStore.prune`. Also removes what killed processes left and what can no longer be read."""
        with self._folder.kv_lock(), self._folder.lock():
            self._folder.remove_temporaries()
            census = self._folder.census()
            census.release_lost(self._folder.handle_ids(), lambda handle_id: self._live(handle_id) is not None)
            self._budget.keep(census)
            self._budget.apply(census)
        return census.removals.report()

    @_disk_errors()
    def stats(self) -> StoreStats:
        """See `ContextStore.stats`. Bytes are those of the files."""
        census = self._folder.census()
        return census.stats(
            self._lookups,
            byte_budget=self.byte_budget,
            evictions=self._budget.evictions,
            integrity_failures=self._folder.integrity_failures,
        )

    def _put_lineage(
        self, context: Context, own: Sequence[str], handle: ContextHandle, ttl: float | None
    ) -> ContextHandle:
        """Write the segments that are not there yet, then the handle. Returns the handle of the first put."""
        segment_ids = self.namespace.segment_ids(context.recipe_ids)
        with self._folder.lock():
            self._folder.make()
            known = self._live(handle.id)
            lacking = lacking_records(self._folder, context, own, segment_ids)
            missing = {id_: encode_segment(record, id_, self.namespace) for id_, record in lacking.items()}
            if known is not None and not missing:
                self._folder.touch(handle.id)
                return known.handle
            size = sum(len(data) for data in missing.values())
            if not self._budget.make_room(size, segment_ids, spare=handle.id):
                raise StoreFullError(
                    f"{size} bytes do not fit under the budget of {self.byte_budget} beside what is pinned. "
                    "Unpin or delete contexts, or raise byte_budget."
                )
            for segment_id, data in missing.items():
                self._folder.write_segment(segment_id, data)
            self._folder.sync_segments()
            record = known or HandleRecord(handle, context.recipe_id, ttl, time.time())
            self._folder.write_handle(record)
        return record.handle

    def _put_kv(self, context: Context, own: Sequence[str]) -> None:
        """Write the positions of a context's KV-cache that are not there yet."""
        cache = context.kv
        if cache is None:
            return
        if cache.length > len(context):
            raise ConfigurationError(f"The KV-cache has {cache.length} positions, its lineage only {len(context)}.")
        missing = self._missing_kv(context, own, cache.length)
        if not missing:
            return
        start, stop = missing[0].start, missing[-1].stop
        try:
            # an engine may hold its own lock here and wait for ours, so ours is taken later
            host = cache.to_host(start, stop)
        except KvMemoryError:
            return
        check_layers(host)
        with self._folder.kv_lock():
            missing = self._missing_kv(context, own, stop)
            if missing and missing[0].start >= start:
                self._write_kv(context, missing, host, start)

    def _missing_kv(self, context: Context, own: Sequence[str], length: int) -> builtins.list[MissingKv]:
        chain = read_chain(self._folder, self.namespace.segment_id(context.recipe_id))
        return missing_kv(self._folder, chain.agreeing_with(own), length) if chain is not None else []

    def _write_kv(self, context: Context, missing: Sequence[MissingKv], host: HostKv, start: int) -> None:
        """Write the missing positions out of `host`, which begins at `start`. Under the KV lock."""
        size = sum(part.stop - part.start for part in missing) * host.nbytes // host.length
        with self._folder.lock():
            if not self._budget.make_room(size, self.namespace.segment_ids(context.recipe_ids), kv_only=True):
                log.info("A KV-cache of %d bytes was not kept: the budget of %s is taken.", size, self.byte_budget)
                return
        for part in missing:
            kv = host.to_host(part.start - start, part.stop - start)
            self._folder.write_kv(part.link.segment_id, KvPart(part.start, part.stop, part.link.content, kv))
        self._folder.sync_segments()
        with self._folder.lock():
            for part in missing:
                if not self._folder.has_segment(part.link.segment_id):
                    self._folder.remove_kv(part.link.segment_id)

    def _live(self, handle_id: str) -> HandleRecord | None:
        """A handle's record, unless it has expired."""
        record = self._folder.read_handle(handle_id)
        if record is None:
            return None
        ttl = record.ttl if record.ttl is not None else self.ttl
        if ttl is None or self._folder.is_pinned(handle_id):
            return record
        last_use = self._folder.last_use(handle_id)
        return record if last_use is not None and time.time() < last_use + ttl else None

    def _chain(self, record: HandleRecord) -> Chain | None:
        return read_chain(self._folder, self.namespace.segment_id(record.recipe_id))
