"""Who uses which segment, and what goes first when room is needed. Bookkeeping over a listing; touches no file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from avp_agents.store.base import PruneReport, StoreStats
from avp_agents.store.lookups import Lookups


@dataclass(frozen=True)
class StoredHandle:
    """A handle in a listing.

    Attributes:
        head: Id of the last segment of its lineage.
        last_use: Seconds since the epoch.
        pinned: Whether eviction and TTL spare it.
    """

    head: str
    last_use: float
    pinned: bool


@dataclass
class Removals:
    """What is to be removed, in this order: handles, then KV files, then segments with theirs, followers first."""

    handles: list[str] = field(default_factory=list)
    kv: list[str] = field(default_factory=list)
    segments: list[str] = field(default_factory=list)
    lineage_bytes: int = 0
    kv_bytes: int = 0

    def report(self) -> PruneReport:
        """How much that is."""
        return PruneReport(len(self.handles), len(self.segments), self.kv_bytes, self.lineage_bytes)


class Census:
    """What a store holds at one moment, and what is decided to be removed of it.

    A segment is in use while a handle ends in it or another segment follows it.

    Args:
        handles: By id.
        parents: The segment before each segment, by segment id; None before a first one.
        lineage: Bytes of each segment's record, by segment id.
        kv: Bytes of each segment's KV file, by segment id.
        torn: Segments whose records cannot be read; they are treated as absent.

    Attributes:
        handles, lineage, kv: What is left of them.
        removals: What was forgotten since the listing.
    """

    def __init__(
        self,
        handles: dict[str, StoredHandle],
        parents: dict[str, str | None],
        lineage: dict[str, int],
        kv: dict[str, int],
        torn: Iterable[str] = (),
    ) -> None:
        self.handles, self.lineage, self.kv = handles, lineage, kv
        self.removals = Removals()
        self._parents = parents
        self._torn = list(torn)
        self._users = Counter(handle.head for handle in handles.values())
        self._users.update(parent for parent in parents.values() if parent is not None)
        self._wanted: set[str] = set()
        self._listed_bytes = sum(lineage.values()) + sum(kv.values())

    @property
    def total(self) -> int:
        """Bytes of lineages and KV-caches that are left."""
        return self._listed_bytes - self.removals.lineage_bytes - self.removals.kv_bytes

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

    def release(self, handle_id: str) -> None:
        """Forget a handle, and the segments that only it used."""
        alone = self.used_only_by(handle_id)
        self._users[self.handles.pop(handle_id).head] -= 1
        self.removals.handles.append(handle_id)
        for segment_id in alone:
            self._forget(segment_id)

    def release_orphans(self) -> None:
        """Forget what a killed writer left: segments that nothing uses, torn ones, KV files without a segment."""
        pending = [segment_id for segment_id in self.lineage if self._users[segment_id] == 0]
        while pending:
            segment_id = pending.pop()
            self._forget(segment_id)
            parent = self._parents[segment_id]
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
        self, lookups: Lookups, *, byte_budget: int | None, evictions: int, integrity_failures: int
    ) -> StoreStats:
        """What the store holds, with what only it has counted."""
        hits, misses = lookups.counts()
        return StoreStats(
            contexts=len(self.handles),
            segments=len(self.lineage),
            pinned=sum(handle.pinned for handle in self.handles.values()),
            lineage_bytes=sum(self.lineage.values()),
            kv_bytes=sum(self.kv.values()),
            byte_budget=byte_budget,
            hits=hits,
            misses=misses,
            evictions=evictions,
            integrity_failures=integrity_failures,
        )

    def drop_kv(self, segment_id: str) -> None:
        """Forget a segment's KV file, if it has one."""
        if segment_id in self.kv:
            self.removals.kv.append(segment_id)
            self.removals.kv_bytes += self.kv.pop(segment_id)

    def shrink(self, excess: int, *, kv_only: bool = False, spare: str | None = None) -> int:
        """Forget idle KV files, then idle handles, least recently used first, until `excess` bytes are gone.

        Returns:
            The bytes that are still too many; 0 or less when it succeeded.
        """
        goal = self.total - excess
        for segment_id in self._idle_kv():
            if self.total <= goal:
                break
            self.drop_kv(segment_id)
        pending = [] if kv_only else [handle_id for handle_id in self._idle_handles() if handle_id != spare]
        while self.total > goal and pending:
            # a handle whose segments all have other users frees nothing until those are gone
            shared = self._release_until(goal, pending)
            if len(shared) == len(pending):
                self.release(shared.pop(0))
            pending = shared
        return self.total - goal

    def _release_until(self, goal: int, handle_ids: Iterable[str]) -> list[str]:
        """Release handles in this order until only `goal` bytes are left; returns those that would free nothing."""
        shared = []
        for handle_id in handle_ids:
            if self.total <= goal:
                break
            if self.used_only_by(handle_id):
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
        idle = [handle_id for handle_id, handle in self.handles.items() if not handle.pinned]
        return sorted(idle, key=lambda handle_id: self.handles[handle_id].last_use)

    def _idle_kv(self) -> list[str]:
        """Segments whose KV file may go, least recently used first, and of one lineage the last first.

        A segment was used when the most recently used of its handles was; none of its handles may be pinned.
        """
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
        return [s for batch in reversed(batches) for s in batch if s in self.kv]

    def _forget(self, segment_id: str) -> None:
        self.removals.segments.append(segment_id)
        self.removals.lineage_bytes += self.lineage.pop(segment_id)
        self.removals.kv_bytes += self.kv.pop(segment_id, 0)
        parent = self._parents[segment_id]
        if parent is not None:
            self._users[parent] -= 1
