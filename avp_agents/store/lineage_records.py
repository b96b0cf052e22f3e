"""A namespace's lineages on `Blobs`: handles, pins, segments and their shares of KV-caches; checked, sealed by option.

A handle's record names all segments of its lineage, so a context is read in two requests however long its thread is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from avp_agents.context import Context, Segment
from avp_agents.store.blobs import in_batches
from avp_agents.store.checked_blobs import HANDLE_PREFIX, CheckedBlobs, bare, name_of
from avp_agents.store.kv_shares import KvShares, content_digests
from avp_agents.store.records import (
    HandleRecord,
    SegmentRecord,
    decode_handle,
    decode_segment,
    encode_handle,
    encode_segment,
)
from avp_agents.store.references import References, Removals, StoredHandle


@dataclass(frozen=True)
class Lacking:
    """Records to write so that a context's segments are there; those that are keep their values.

    Attributes:
        absent: Those that are not there, encoded, by id.
        outdated: Those that are there torn, or without the readout that they should have, encoded.
    """

    absent: dict[str, bytes]
    outdated: dict[str, bytes]

    def __bool__(self) -> bool:
        return bool(self.absent or self.outdated)

    @property
    def size(self) -> int:
        """Their bytes."""
        return sum(len(data) for data in (*self.absent.values(), *self.outdated.values()))


class LineageRecords:
    """Reads and writes one namespace's lineages; knows nothing of budgets and lifetimes."""

    def __init__(self, records: CheckedBlobs, kv: KvShares) -> None:
        self._records, self._kv = records, kv
        self._blobs, self._namespace = records.blobs, records.namespace
        # these follow from the id alone, so what was read once stays true whatever other processes do
        self._lineages: dict[str, tuple[str, ...]] = {}
        self._authentic: set[str] = set()

    def read_handles(self, handle_ids: Sequence[str]) -> dict[str, HandleRecord]:
        """Those handles' records that are there."""
        found, _ = self._records.read("handles", handle_ids, decode_handle)
        self._lineages |= {handle_id: record.segments for handle_id, record in found.items()}
        return found

    def read_lineage(self, segment_ids: Sequence[str]) -> list[SegmentRecord] | None:
        """The records of a lineage's segments, in order; None unless all of them are there."""
        found, _ = self._records.read("segments", segment_ids, decode_segment)
        return [found[segment_id] for segment_id in segment_ids] if len(found) == len(segment_ids) else None

    def lacking(self, context: Context, digests: Sequence[str], segment_ids: Sequence[str]) -> Lacking:
        """The records to write so that a context's segments are there.

        Args:
            context: What is to be stored.
            digests: `content_digests` of its lineage.
            segment_ids: Of its segments, in order.
        """
        stored, unreadable = self._records.read("segments", segment_ids, decode_segment)
        encoded = {
            own: self._records.sealed(encode_segment(record, own, self._namespace), name_of("segments", own))
            for own, record in _lacking(stored, context, digests, segment_ids).items()
        }
        there = stored.keys() | unreadable
        return Lacking(
            absent={own: data for own, data in encoded.items() if own not in there},
            outdated={own: data for own, data in encoded.items() if own in there},
        )

    def replace_segments(self, segments: Mapping[str, bytes]) -> None:
        """Write encoded segments over those that are there. Within `Blobs.writing`."""
        if segments:
            self._blobs.write({name_of("segments", segment_id): data for segment_id, data in segments.items()})

    def add(self, segments: Mapping[str, bytes], record: HandleRecord) -> set[str]:
        """Write encoded segments and a handle where they are not there yet. Within `Blobs.writing`.

        Returns:
            The ids of those that were not there.
        """
        name, data = self._encoded_handle(record)
        blobs = {name_of("segments", own): segment for own, segment in segments.items()}
        added = self._blobs.add({**blobs, name: data})
        return {own for own in segments if name_of("segments", own) in added} | (
            {record.handle.id} if name in added else set()
        )

    def replace_handle(self, record: HandleRecord) -> None:
        """Write a handle over the one that is there. Within `Blobs.writing`."""
        self._blobs.write(dict([self._encoded_handle(record)]))

    def set_pinned(self, handle_id: str, pinned: bool) -> None:
        """Pin or unpin a handle. Within `Blobs.removing`."""
        name = name_of("pins", handle_id)
        if pinned:
            self._blobs.write({name: b"pinned"})
        else:
            self._blobs.remove([name])

    def use(self, handle_id: str) -> None:
        """Note a handle's use as of now."""
        self._blobs.use(bare(handle_id))

    def uses(self, handle_id: str | None = None) -> dict[str, float]:
        """When handles (one, or all) were last used."""
        found = self._blobs.uses(bare(handle_id) if handle_id is not None else None)
        return {HANDLE_PREFIX + name: last_use for name, last_use in found.items()}

    def handle_ids(self) -> list[str]:
        """All handles, readable or not, in no order."""
        return [HANDLE_PREFIX + name for name in self._blobs.ids("handles")]

    def references(self, *, checked: bool = False) -> References:
        """Who uses which segment. Within `Blobs.removing`, else what is just being changed may be missing.

        Args:
            checked: Read all segments that this object has not read yet, where that is cheap, to find those that are
                torn.
        """
        handle_ids = self.handle_ids()
        self.read_handles([handle_id for handle_id in handle_ids if handle_id not in self._lineages])
        uses, pins = self.uses(), set(self._blobs.ids("pins"))
        lineage = self._blobs.sizes("segments")
        torn = self._torn(lineage) if checked and self._blobs.cheap_to_read else set()
        lineage = {segment_id: size for segment_id, size in lineage.items() if segment_id not in torn}
        handles, parents = {}, dict.fromkeys(lineage)
        for handle_id in handle_ids:
            segment_ids = self._lineages.get(handle_id)
            if segment_ids:
                last_use, pinned = uses.get(handle_id, 0.0), bare(handle_id) in pins
                handles[handle_id] = StoredHandle(segment_ids[-1], last_use, pinned)
                parents |= {one: before for before, one in pairwise(segment_ids) if one in lineage}
        return References(handles, parents, lineage, self._kv.sizes(), torn)

    def remove(self, removals: Removals) -> None:
        """Remove what was decided on. Within `Blobs.removing`. No handle outlives its segments."""
        handles = [f"{kind}/{bare(handle_id)}" for handle_id in removals.handles for kind in ("pins", "handles")]
        segments = [name_of("segments", segment_id) for segment_id in removals.segments]
        if handles or segments:
            self._blobs.remove(handles + segments)
        if shares := {*removals.kv, *removals.segments}:
            self._kv.remove(shares)
        self._blobs.forget_uses([bare(handle_id) for handle_id in removals.handles])
        for handle_id in removals.handles:
            self._lineages.pop(handle_id, None)
        self._authentic.difference_update(removals.segments)

    def remove_abandoned(self) -> None:
        """Remove what killed writers left behind. Within `Blobs.removing`."""
        self._kv.remove_abandoned()
        self._blobs.forget_uses(list(self._blobs.uses().keys() - set(self._blobs.ids("handles"))))

    def _torn(self, segment_ids: Mapping[str, int]) -> set[str]:
        """Those of the segments that cannot be read."""
        torn: set[str] = set()
        for some in in_batches(list(segment_ids.keys() - self._authentic), 64):
            found, unreadable = self._records.read("segments", some, decode_segment)
            self._authentic |= found.keys()
            torn |= unreadable
        return torn

    def _encoded_handle(self, record: HandleRecord) -> tuple[str, bytes]:
        """A handle's name, and its bytes."""
        name = name_of("handles", record.handle.id)
        return name, self._records.sealed(encode_handle(record, self._namespace), name)


def _lacking(
    stored: Mapping[str, SegmentRecord], context: Context, digests: Sequence[str], segment_ids: Sequence[str]
) -> dict[str, SegmentRecord]:
    """The records to write so that a context is there; those that are keep their values.

    Returns:
        Records by id, in order: of segments that are absent, and of the last one where that lacks the readout (and was
        made from the same values).
    """
    lacking: dict[str, SegmentRecord] = {}
    adopted: list[Segment] = []
    for segment_id, segment in zip(segment_ids, context.lineage, strict=True):
        record = stored.get(segment_id)
        adopted.append(record.segment if record is not None else segment)
        readout = context.readout if segment_id == segment_ids[-1] else None
        lacks_readout = record is not None and record.readout is None and readout is not None
        if record is None or (lacks_readout and content_digests(adopted, context.dtype)[-1] == digests[-1]):
            lacking[segment_id] = SegmentRecord(adopted[-1], context.fingerprint, context.dtype, readout)
    return lacking
