"""Who uses which segment, and what goes first when room is needed. Bookkeeping over a listing; touches no file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Self, TypeVar

from avp_agents.store.base import Lookups, PruneReport, StoreStats

SLACK = 64
"""Other processes' writes are noticed after own writes of 1/64 of the budget; an eviction frees that much more."""


@dataclass
class StoredHandle:
    """A handle in a listing.

    Attributes:
        head: Id of the last segment of its lineage.
        last_use: Seconds since the epoch, or by another clock that is the same for all.
        pinned: Whether eviction and TTL spare it.
    """

    head: str
    last_use: float
    pinned: bool


@dataclass
class Removals:
    """Ids and bytes to be removed, in this order: handles, then segments with their KV-caches, then other KV-caches.

    Attributes:
        ends: The ends of lineages that are no segments.
    """

    handles: list[str] = field(default_factory=list)
    kv: list[str] = field(default_factory=list)
    segments: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    lineage_bytes: int = 0
    kv_bytes: int = 0

    def report(self) -> PruneReport:
        """How much that is."""
        return PruneReport(len(self.handles), len(self.segments), self.kv_bytes, self.lineage_bytes)


_Handle = TypeVar("_Handle", bound=StoredHandle)


class References(Generic[_Handle]):
    """A store's handles, segments and KV-caches at one moment, and those that are decided to be removed.

    A segment is in use while a handle ends in it or another segment follows it.

    Args:
        handles: By id.
        parents: The segment before each segment, by segment id; None before a first one.
        lineage: Bytes of each segment, by segment id.
        kv: Bytes of each segment's share of the KV-cache, by segment id.
        torn: Segments whose records cannot be read; they are treated as absent.
        ends: Whether the last "segment" of each lineage is none, but what a context has for itself alone, as in memory:
            its readout, and its whole KV-cache.

    Attributes:
        handles: What is left of them, least recently used first.
        lineage, kv: What is left of them.
        lineage_bytes, kv_bytes: Their sums.
        removals: What was forgotten since the listing.
    """

    def __init__(
        self,
        handles: dict[str, _Handle],
        parents: dict[str, str | None],
        lineage: dict[str, int],
        kv: dict[str, int],
        torn: Iterable[str] = (),
        *,
        ends: bool = False,
    ) -> None:
        self.handles = dict(sorted(handles.items(), key=lambda item: item[1].last_use))
        self.lineage, self.kv = lineage, kv
        self.lineage_bytes, self.kv_bytes = sum(lineage.values()), sum(kv.values())
        self.removals = Removals()
        self._parents, self._ends = parents, ends
        self._torn = list(torn)
        self._users = Counter(handle.head for handle in handles.values())
        self._users.update(parent for parent in parents.values() if parent is not None)
        self._wanted: set[str] = set()

    def copy(self) -> Self:
        """The same, to try on what removing would do."""
        parents, lineage, kv = dict(self._parents), dict(self.lineage), dict(self.kv)
        return type(self)(self.handles, parents, lineage, kv, self._torn, ends=self._ends)

    @property
    def total(self) -> int:
        """Bytes of lineages and KV-caches that are left."""
        return self.lineage_bytes + self.kv_bytes

    def add(self, handle_id: str, handle: _Handle, segments: Mapping[str, int]) -> None:
        """Take in a handle that is just being used.

        Args:
            handle_id: Its id.
            handle: What there is to know of it.
            segments: Bytes of its lineage's segments by id, in order.
        """
        parent = None
        for segment_id, size in segments.items():
            if segment_id not in self.lineage:
                self.lineage[segment_id], self._parents[segment_id] = size, parent
                self.lineage_bytes += size
                if parent is not None:
                    self._users[parent] += 1
            parent = segment_id
        self.handles[handle_id] = handle
        self._users[handle.head] += 1

    def use(self, handle_id: str, now: float) -> None:
        """Note a handle's use."""
        handle = self.handles[handle_id] = self.handles.pop(handle_id)
        handle.last_use = now

    def resize(self, segment_id: str, *, lineage: int | None = None, kv: int | None = None) -> None:
        """Note what a segment or its KV-cache takes by now."""
        if lineage is not None:
            self.lineage_bytes += lineage - self.lineage[segment_id]
            self.lineage[segment_id] = lineage
        if kv is not None:
            self.kv_bytes += kv - self.kv.get(segment_id, 0)
            self.kv[segment_id] = kv

    def want(self, segment_ids: Iterable[str]) -> None:
        """Spare these segments and their KV-caches: a context that uses them is being put."""
        for segment_id in segment_ids:
            self._users[segment_id] += 1
            self._wanted.add(segment_id)

    def is_whole(self, handle_id: str) -> bool:
        """Whether all segments of a handle's lineage are there."""
        *_, first = [None, *self._lineage_of(handle_id)]
        return first is not None and self._parents[first] is None

    def used_only_by(self, handle_id: str) -> list[str]:
        """The segments that removing a handle would leave unused, last one first."""
        alone = []
        for segment_id in self._lineage_of(handle_id):
            if self._users[segment_id] > 1:
                break
            alone.append(segment_id)
        return alone

    def bytes_beside_pinned(self, segments: Mapping[str, int]) -> int:
        """Bytes that segments (by id, in these sizes) would take together with what eviction spares."""
        pinned = {s for h, handle in self.handles.items() if handle.pinned for s in self._lineage_of(h)}
        new = sum(size for segment_id, size in segments.items() if segment_id not in pinned)
        return new + sum(self.lineage[segment_id] + self.kv.get(segment_id, 0) for segment_id in pinned)

    def release(self, handle_id: str) -> None:
        """Forget a handle, and the segments that only it used."""
        alone = self.used_only_by(handle_id)
        head = self.handles.pop(handle_id).head
        self._leave(head)
        self.removals.handles.append(handle_id)
        for segment_id in alone:
            self._forget(segment_id)
        if alone and self._ends:
            self.removals.segments.remove(head)
            self.removals.ends.append(head)

    def release_idle(self, handle_ids: Iterable[str], latest: float) -> None:
        """Forget those of many handles that are there, not pinned, and not used after `latest`."""
        for handle_id in handle_ids:
            handle = self.handles.get(handle_id)
            if handle is not None and not handle.pinned and handle.last_use <= latest:
                self.release(handle_id)

    def release_orphans(self) -> None:
        """Forget what a killed writer left: segments that nothing uses, torn ones, KV-caches without a segment."""
        pending = [segment_id for segment_id in self.lineage if self._users[segment_id] == 0]
        while pending:
            segment_id = pending.pop()
            parent = self._parents[segment_id]
            self._forget(segment_id)
            if parent in self.lineage and self._users[parent] == 0:
                pending.append(parent)
        for segment_id in self.kv.keys() - self.lineage.keys():
            self.drop_kv(segment_id)
        self.removals.segments += self._torn
        self._torn.clear()

    def release_lost(self, handle_ids: Iterable[str], is_live: Callable[[str], bool]) -> None:
        """Forget handles that cannot be read, have expired or lack a segment, and what killed writers left.

        Args:
            handle_ids: All that are stored, readable or not.
            is_live: Whether a handle has not expired.
        """
        for handle_id in handle_ids:
            if handle_id not in self.handles:
                self.removals.handles.append(handle_id)
            elif not is_live(handle_id) or not self.is_whole(handle_id):
                self.release(handle_id)
        self.release_orphans()

    def stats(
        self, lookups: Lookups, *, byte_budget: int | None, evictions: int, integrity_failures: int = 0
    ) -> StoreStats:
        """Counts and bytes of what is left, with what only the store has counted."""
        hits, misses = lookups.counts()
        ends = len({handle.head for handle in self.handles.values()}) if self._ends else 0
        return StoreStats(
            contexts=len(self.handles),
            segments=len(self.lineage) - ends,
            pinned=sum(handle.pinned for handle in self.handles.values()),
            lineage_bytes=self.lineage_bytes,
            kv_bytes=self.kv_bytes,
            byte_budget=byte_budget,
            hits=hits,
            misses=misses,
            evictions=evictions,
            integrity_failures=integrity_failures,
        )

    def drop_kv(self, segment_id: str) -> None:
        """Forget a segment's KV-cache, if it has one."""
        if segment_id in self.kv:
            self.removals.kv.append(segment_id)
            self._forget_kv(segment_id)

    def shrink(self, excess: int, *, kv_only: bool = False, spare: str | None = None) -> int:
        """Forget idle KV-caches, then idle handles, least recently used first, until `excess` bytes are gone.

        Returns:
            The bytes that are still too many; 0 or less when it succeeded.
        """
        goal = self.total - excess
        self.shrink_kv(goal)
        if not kv_only:
            self.shrink_handles(goal, spare=spare)
        return self.total - goal

    def shrink_kv(self, goal: int) -> None:
        """Forget idle KV-caches, least recently used first, until only `goal` bytes are left."""
        for segment_id in self._idle_kv() if self.total > goal else ():
            if self.total <= goal:
                break
            self.drop_kv(segment_id)

    def shrink_handles(self, goal: int, *, spare: str | None = None) -> None:
        """Forget idle handles, least recently used first, until only `goal` bytes are left."""
        pending = [] if self.total <= goal else [handle_id for handle_id in self._idle_handles() if handle_id != spare]
        while self.total > goal and pending:
            # a handle whose segments all have other users frees nothing until those are gone
            shared = self._release_until(goal, pending)
            if len(shared) == len(pending):
                self.release(shared.pop(0))
            pending = shared

    def _release_until(self, goal: int, handle_ids: Iterable[str]) -> list[str]:
        """Release handles in this order until only `goal` bytes are left; returns those that would free no segment."""
        shared = []
        for handle_id in handle_ids:
            if self.total <= goal:
                break
            if len(self.used_only_by(handle_id)) > self._ends:
                self.release(handle_id)
            else:
                shared.append(handle_id)
        return shared

    def _lineage_of(self, handle_id: str) -> Iterator[str]:
        """The segments of a handle's lineage that are there, last one first."""
        segment_id: str | None = self.handles[handle_id].head
        while segment_id is not None and segment_id in self.lineage:
            yield segment_id
            segment_id = self._parents[segment_id]

    def _idle_handles(self) -> list[str]:
        """Unpinned handles, least recently used first."""
        return [handle_id for handle_id, handle in self.handles.items() if not handle.pinned]

    def _idle_kv(self) -> list[str]:
        """Segments whose KV-cache may go, least recently used first, and of one lineage the last first.

        A segment was used when the most recently used of its handles was; none of its handles may be pinned.
        """
        if self._ends:
            pinned = {handle.head for handle in self.handles.values() if handle.pinned}
            latest = dict.fromkeys(handle.head for handle in reversed(self.handles.values()))
            return [head for head in reversed(latest) if self.kv.get(head) and head not in pinned]
        spared = {s for h, handle in self.handles.items() if handle.pinned for s in self._lineage_of(h)} | self._wanted
        batches = []
        for handle_id in reversed(self._idle_handles()):
            batch = []
            for segment_id in self._lineage_of(handle_id):
                if segment_id in spared:
                    break
                batch.append(segment_id)
            spared.update(batch)
            batches.append(batch)
        return [s for batch in reversed(batches) for s in batch if self.kv.get(s)]

    def _forget(self, segment_id: str) -> None:
        size = self.lineage.pop(segment_id)
        self.lineage_bytes -= size
        self.removals.lineage_bytes += size
        self.removals.segments.append(segment_id)
        self._forget_kv(segment_id)
        parent = self._parents.pop(segment_id)
        if parent is not None:
            self._leave(parent)

    def _forget_kv(self, segment_id: str) -> None:
        size = self.kv.pop(segment_id, 0)
        self.kv_bytes -= size
        self.removals.kv_bytes += size

    def _leave(self, segment_id: str) -> None:
        """Count a segment's users one fewer."""
        self._users[segment_id] -= 1
        if not self._users[segment_id]:
            del self._users[segment_id]


class ByteBudget:
    """The budget of one namespace, kept without listing it at each write. All methods are called under one lock.

    Attributes:
        limit: The bytes it allows, None where there is no limit.
        evictions: KV-caches and handles that went to keep it.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.evictions = 0
        self._known_bytes: int | None = None
        self._written = 0

    def takes(self, size: int) -> bool:
        """Whether `size` more bytes fit for sure, as far as is known without a listing. Then they count as written."""
        if self.limit is None:
            return True
        written = self._written + size
        if self._known_bytes is None or self._known_bytes + written > self.limit or written * SLACK > self.limit:
            return False
        self._written = written
        return True

    def make_room(
        self,
        references: References[StoredHandle],
        size: int,
        segment_ids: Iterable[str],
        *,
        kv_only: bool = False,
        spare: str | None = None,
    ) -> bool:
        """Decide what must go so that `size` more bytes fit.

        Args:
            references: What is there.
            size: Bytes about to be written.
            segment_ids: Segments that are needed together with them, so they stay.
            kv_only: Evict KV-caches only.
            spare: A handle that stays.

        Returns:
            False if they cannot be made to fit; then nothing may be removed.
        """
        references.want(segment_ids)
        references.release_orphans()
        return self._shrink(references, size, kv_only=kv_only, spare=spare)

    def keep(self, references: References[StoredHandle]) -> None:
        """Decide what must go for the budget to hold."""
        self._shrink(references, 0)

    def counted(self, references: References[StoredHandle], written: int = 0) -> None:
        """Note that the removals are carried out, and that `written` bytes are about to be added."""
        self._known_bytes, self._written = references.total, written

    def _shrink(
        self, references: References[StoredHandle], size: int, *, kv_only: bool = False, spare: str | None = None
    ) -> bool:
        if self.limit is None or references.total + size <= self.limit:
            return True
        slack, removals = self.limit // SLACK, references.removals
        before = len(removals.handles) + len(removals.kv)
        lacking = references.shrink(references.total + size - self.limit + slack, kv_only=kv_only, spare=spare)
        if lacking > slack:
            return False
        self.evictions += len(removals.handles) + len(removals.kv) - before
        return True
