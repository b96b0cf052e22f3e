"""Typed records of one namespace on a server: handles, segments, shares of KV-caches; checked, and sealed by option.

A record whose MAC does not fit is counted, reported and treated as absent. A handle's record names all segments of its
lineage, so a context is read in two requests however long its thread is.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from avp_agents.errors import EncryptionKeyError, IntegrityError, StoreUnavailableError
from avp_agents.store.blobs import Blobs, Kind, Payloads
from avp_agents.store.census import Census, Removals, StoredHandle
from avp_agents.store.encryption import Encryption, is_sealed, sealed_size
from avp_agents.store.handle_record import HandleRecord, decode_handle, encode_handle
from avp_agents.store.kv_file import KvPart, kv_bytes, kv_chunks, parse_kv
from avp_agents.store.kv_record import KvRecord, decode_kv_record, encode_kv_record
from avp_agents.store.namespace import Namespace
from avp_agents.store.segment_record import SegmentRecord, decode_segment, encode_segment

log = logging.getLogger(__name__)

_Record = TypeVar("_Record")
_HANDLE_PREFIX = "avp:1:"


class SharedRecords:
    """Reads and writes one namespace's records; knows nothing of budgets and lifetimes.

    Attributes:
        integrity_failures: Records found torn or altered by this object.
    """

    def __init__(self, blobs: Blobs, payloads: Payloads, namespace: Namespace, encryption: Encryption | None) -> None:
        self.integrity_failures = 0
        self._blobs, self._payloads = blobs, payloads
        self._namespace, self._encryption = namespace, encryption
        self._count_lock = threading.Lock()
        # follows from the id alone, so what was read once stays true whatever other processes do
        self._lineages: dict[str, tuple[str, ...]] = {}

    def read_handles(self, handle_ids: Sequence[str]) -> dict[str, HandleRecord]:
        """Those handles' records that are there."""
        found, _ = self._decoded("handles", handle_ids, decode_handle)
        self._lineages |= {handle_id: record.segments for handle_id, record in found.items()}
        return found

    def read_segments(self, segment_ids: Sequence[str]) -> Segments:
        """Those segments' records that are there."""
        return Segments(*self._decoded("segments", segment_ids, decode_segment))

    def read_extents(self, segment_ids: Sequence[str]) -> Extents:
        """What those segments' shares of the KV-cache hold, where they have one."""
        found, _ = self._decoded("kv", segment_ids, decode_kv_record)
        return Extents(found, self)

    def read_payload(self, segment_id: str, record: KvRecord) -> KvPart | None:
        """A segment's share of the KV-cache."""
        try:
            data = self._payloads.read_payload(record.payload, record.size)
            if data is None:
                return None
            if self._encryption is not None:
                data = self._encryption.open(data, record.payload)
            part = parse_kv(data, segment_id, self._namespace)
        except IntegrityError as error:
            self._report(f"{segment_id} (KV-cache)", error)
            return None
        except StoreUnavailableError as error:
            log.warning("A KV-cache cannot be read (its lineage is): %s", error)
            return None
        return part if (part.start, part.stop, part.content) == (record.start, record.stop, record.content) else None

    def encoded_segment(self, segment_id: str, record: SegmentRecord) -> bytes:
        """A segment as it is stored.

        Raises:
            ConfigurationError: Its values are out of range, not finite, or of the wrong shape or dtype.
        """
        return self._sealed(encode_segment(record, segment_id, self._namespace), _name("segments", segment_id))

    def replace_segments(self, segments: dict[str, bytes]) -> None:
        """Write encoded segments over those that are there. Within `Blobs.writing`."""
        if segments:
            self._blobs.write({_name("segments", segment_id): data for segment_id, data in segments.items()})

    def add(self, segments: dict[str, bytes], record: HandleRecord) -> bool:
        """Write encoded segments and a handle where they are not there yet. Within `Blobs.writing`.

        Returns:
            Whether the handle was not there.
        """
        name, data = self._encoded_handle(record)
        blobs = {_name("segments", segment_id): segment for segment_id, segment in segments.items()}
        return name in self._blobs.add({**blobs, name: data})

    def replace_handle(self, record: HandleRecord) -> None:
        """Write a handle over the one that is there. Within `Blobs.writing`."""
        self._blobs.write(dict([self._encoded_handle(record)]))

    def stored_size(self, part: KvPart) -> int:
        """Bytes that a share of the KV-cache will take."""
        return sealed_size(kv_bytes(part)) if self._encryption is not None else kv_bytes(part)

    def write_payload(self, segment_id: str, part: KvPart) -> KvRecord:
        """Write a share's bytes, to which nothing refers yet."""
        record = KvRecord(
            part.start, part.stop, part.content, f"{segment_id}-{secrets.token_hex(8)}", self.stored_size(part)
        )
        chunks = kv_chunks(part, segment_id, self._namespace)
        if self._encryption is not None:
            chunks = self._encryption.seal_chunks(chunks, kv_bytes(part), record.payload)
        self._payloads.write_payload(record.payload, record.size, chunks)
        return record

    def refer(self, records: dict[str, KvRecord], replaced: Extents) -> None:
        """Make payloads the segments' shares of the KV-cache, instead of earlier ones. Within `Blobs.writing`.

        Shares of segments that are gone, and those that are replaced, are removed.
        """
        there = self.existing("segments", list(records))
        kept = {segment_id: record for segment_id, record in records.items() if segment_id in there}
        for record in kept.values():
            self._payloads.keep_payload(record.payload, record.size)
        blobs = {
            _name("kv", segment_id): encode_kv_record(record, segment_id, self._namespace)
            for segment_id, record in kept.items()
        }
        self._blobs.write({name: self._sealed(data, name) for name, data in blobs.items()})
        orphaned = [record.payload for segment_id, record in records.items() if segment_id not in there]
        self._payloads.remove_payloads([r.payload for s, r in replaced.records.items() if s in kept] + orphaned)

    def existing(self, kind: Kind, ids: Sequence[str]) -> set[str]:
        """Those of the ids that have a blob of this kind, whatever is in it."""
        names = {_name(kind, own_id): own_id for own_id in ids}
        return {names[name] for name in self._blobs.existing(list(names))} if names else set()

    def set_pinned(self, handle_id: str, pinned: bool) -> None:
        """Pin or unpin a handle. Within `Blobs.removing`."""
        name = _name("pins", handle_id)
        if pinned:
            self._blobs.write({name: b"pinned"})
        else:
            self._blobs.remove([name])

    def use(self, handle_id: str) -> None:
        """Note a handle's use as of now."""
        self._blobs.use(_bare(handle_id))

    def uses(self, handle_id: str | None = None) -> dict[str, float]:
        """When handles (one, or all) were last used."""
        found = self._blobs.uses(_bare(handle_id) if handle_id is not None else None)
        return {_HANDLE_PREFIX + name: last_use for name, last_use in found.items()}

    def handle_ids(self) -> list[str]:
        """All handles, readable or not, in no order."""
        return [_HANDLE_PREFIX + name for name in self._blobs.sizes("handles")]

    def census(self) -> Census:
        """All readable handles, and all segments. Within `Blobs.removing`, else what just changes may be missing."""
        handle_ids = self.handle_ids()
        self.read_handles([handle_id for handle_id in handle_ids if handle_id not in self._lineages])
        uses, pins = self.uses(), self._blobs.sizes("pins")
        lineage = self._blobs.sizes("segments")
        kv = dict.fromkeys(self._blobs.sizes("kv"), 0)
        for payload, size in self._payloads.payload_sizes().items():
            segment_id = payload.partition("-")[0]
            kv[segment_id] = kv.get(segment_id, 0) + size
        handles, parents = {}, dict.fromkeys(lineage)
        for handle_id in handle_ids:
            segment_ids = self._lineages.get(handle_id)
            if segment_ids:
                last_use, pinned = uses.get(handle_id, 0.0), _bare(handle_id) in pins
                handles[handle_id] = StoredHandle(segment_ids[-1], last_use, pinned)
                parents |= {one: before for before, one in pairwise(segment_ids) if one in lineage}
        return Census(handles, parents, lineage, kv)

    def remove(self, removals: Removals) -> None:
        """Remove what a census decided on. Within `Blobs.removing`. No handle outlives its segments."""
        bare = [_bare(handle_id) for handle_id in removals.handles]
        without_kv = {*removals.kv, *removals.segments}
        payloads = (
            [p for p in self._payloads.payload_sizes() if p.partition("-")[0] in without_kv] if without_kv else []
        )
        self._blobs.remove(
            [
                *(f"{kind}/{name}" for name in bare for kind in ("pins", "handles")),
                *(_name("kv", segment_id) for segment_id in without_kv),
                *(_name("segments", segment_id) for segment_id in removals.segments),
            ]
        )
        self._payloads.remove_payloads(payloads)
        self._blobs.forget_uses(bare)
        for handle_id in removals.handles:
            self._lineages.pop(handle_id, None)

    def remove_abandoned(self) -> None:
        """Remove what killed writers left behind. Within `Blobs.removing`."""
        extents = self.read_extents(list(self._blobs.sizes("kv")))
        self._payloads.remove_abandoned({record.payload for record in extents.records.values()})
        self._blobs.forget_uses(list(self._blobs.uses().keys() - self._blobs.sizes("handles").keys()))

    def _decoded(
        self, kind: Kind, ids: Sequence[str], decode: Callable[[bytes, str, Namespace], _Record]
    ) -> tuple[dict[str, _Record], set[str]]:
        """Those of the ids whose record is there and authentic, and those whose record is there and is not."""
        found: dict[str, _Record] = {}
        unreadable: set[str] = set()
        names = [_name(kind, own_id) for own_id in ids]
        for own_id, name, data in zip(ids, names, self._blobs.read(names), strict=True):
            if data is None:
                continue
            try:
                found[own_id] = decode(self._opened(data, name), own_id, self._namespace)
            except IntegrityError as error:
                unreadable.add(own_id)
                self._report(f"{own_id} ({kind})", error)
        return found, unreadable

    def _encoded_handle(self, record: HandleRecord) -> tuple[str, bytes]:
        """A handle's blob: its name, and its bytes."""
        name = _name("handles", record.handle.id)
        return name, self._sealed(encode_handle(record, self._namespace), name)

    def _sealed(self, data: bytes, name: str) -> bytes:
        return self._encryption.seal(data, name) if self._encryption is not None else data

    def _opened(self, data: bytes, name: str) -> bytes:
        if self._encryption is not None:
            return bytes(self._encryption.open(data, name))
        if is_sealed(data):
            raise EncryptionKeyError(
                f"{self._blobs.place} holds encrypted data. Open it with encryption=Encryption.from_environment()."
            )
        return data

    def _report(self, what: str, reason: IntegrityError) -> None:
        """Count and log a record that will be treated as absent."""
        with self._count_lock:
            self.integrity_failures += 1
        log.warning("%s in %s is torn or altered (%s); it is treated as absent.", what, self._blobs.place, reason)


@dataclass(frozen=True)
class Segments:
    """Segments' records that were read, by id; and those that are there but torn or altered."""

    records: dict[str, SegmentRecord]
    unreadable: set[str]

    def read_segment(self, segment_id: str) -> SegmentRecord | None:
        """One of them."""
        return self.records.get(segment_id)


@dataclass(frozen=True)
class Extents:
    """What segments' shares of the KV-cache hold, by id."""

    records: dict[str, KvRecord]
    source: SharedRecords

    def read_extent(self, segment_id: str) -> KvRecord | None:
        """Of one of them."""
        return self.records.get(segment_id)

    def read_kv(self, segment_id: str) -> KvPart | None:
        """The share itself, fetched now."""
        record = self.records.get(segment_id)
        return self.source.read_payload(segment_id, record) if record is not None else None


def _bare(own_id: str) -> str:
    return own_id.removeprefix(_HANDLE_PREFIX)


def _name(kind: Kind, own_id: str) -> str:
    return f"{kind}/{_bare(own_id)}"
