"""Who uses which segment, and what goes first when room is needed. Plain bookkeeping over a listing; touches no file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


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


class Census:
    """What a store holds at one moment. A segment is in use while a handle ends in it or another segment follows it.

    Attributes:
        handles: By id.
        lineage: Bytes of each segment's record, by segment id.
        kv: Bytes of each segment's KV file, by segment id.
        unreadable: Ids of handles whose records are torn; they use nothing.
    """

    def __init__(
        self,
        handles: dict[str, StoredHandle],
        parents: dict[str, str | None],
        lineage: dict[str, int],
        kv: dict[str, int],
        unreadable: Iterable[str] = (),
    ) -> None:
        self.handles, self.lineage, self.kv = handles, lineage, kv
        self.unreadable = list(unreadable)
        self._parents = parents
        self._users = Counter(handle.head for handle in handles.values())
        self._users.update(parent for parent in parents.values() if parent is not None)
        self._wanted: set[str] = set()

    @property
    def total(self) -> int:
        """Bytes of lineages and KV-caches."""
        return sum(self.lineage.values()) + sum(self.kv.values())

    def want(self, segment_ids: Iterable[str]) -> None:
        """Spare these segments and their KV-caches: a context that uses them is being put."""
        for segment_id in segment_ids:
            self._users[segment_id] += 1
            self._wanted.add(segment_id)

    def lineage_of(self, handle_id: str) -> Iterator[str]:
        """The segments of a handle's lineage that are there, last one first."""
        segment_id = self.handles[handle_id].head
        while segment_id in self.lineage:
            yield segment_id
            segment_id = self._parents[segment_id]

    def used_only_by(self, handle_id: str) -> list[str]:
        """The segments that removing a handle would leave unused, last one first."""
        alone = []
        for segment_id in self.lineage_of(handle_id):
            if self._users[segment_id] > 1:
                break
            alone.append(segment_id)
        return alone

    def release(self, handle_id: str) -> list[str]:
        """Forget a handle and the segments that only it used; returns them, last one first."""
        alone = self.used_only_by(handle_id)
        self._users[self.handles.pop(handle_id).head] -= 1
        for segment_id in alone:
            self._forget(segment_id)
        return alone

    def release_orphans(self) -> list[str]:
        """Forget the segments that nothing uses, which a killed writer left; returns them, followers first."""
        orphans = []
        pending = [segment_id for segment_id in self.lineage if self._users[segment_id] == 0]
        while pending:
            segment_id = pending.pop()
            parent = self._parents[segment_id]
            self._forget(segment_id)
            orphans.append(segment_id)
            if parent in self.lineage and self._users[parent] == 0:
                pending.append(parent)
        orphans += self.kv.keys() - self.lineage.keys()
        for segment_id in orphans:
            self.kv.pop(segment_id, None)
        return orphans

    def idle_handles(self) -> list[str]:
        """Unpinned handles, least recently used first."""
        idle = [handle_id for handle_id, handle in self.handles.items() if not handle.pinned]
        return sorted(idle, key=lambda handle_id: self.handles[handle_id].last_use)

    def idle_kv(self) -> list[str]:
        """Segments whose KV-cache may go, least recently used first, and of one lineage the last first.

        A segment counts as used when the most recently used of its handles was; none of its handles may be pinned.
        """
        pinned = {s for h, handle in self.handles.items() if handle.pinned for s in self.lineage_of(h)}
        spared = pinned | self._wanted
        batches = []
        for handle_id in reversed(self.idle_handles()):
            batch = []
            for segment_id in self.lineage_of(handle_id):
                if segment_id in spared:
                    break
                batch.append(segment_id)
            spared.update(batch)
            batches.append(batch)
        return [s for batch in reversed(batches) for s in batch if s in self.kv]

    def _forget(self, segment_id: str) -> None:
        del self.lineage[segment_id]
        self.kv.pop(segment_id, None)
        parent = self._parents[segment_id]
        if parent is not None:
            self._users[parent] -= 1
