"""The KV-cache along a lineage: each segment's share holds the positions that it adds to what its ancestors' hold.

A cache may end short of its lineage, so a share may begin before its own segment does; what is read is the longest run
without a gap. A share may be gone at any time: its positions are replayed then.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from typing_extensions import override

from avp_agents.context import Segment
from avp_agents.errors import IntegrityError, StoreUnavailableError
from avp_agents.kv_cache import HostKv
from avp_agents.store.blobs import Payloads
from avp_agents.store.checked_blobs import CheckedBlobs, name_of
from avp_agents.store.kv_file import Extent, KvPart, join, kv_bytes, kv_chunks, parse_kv
from avp_agents.store.records import KvRecord, decode_kv_record, encode_kv_record, payload_bytes

log = logging.getLogger(__name__)


class KvShares(ABC):
    """Where a namespace's KV-caches lie, by segment. Thread-safe; raises as `Blobs` does."""

    @abstractmethod
    def extents(self, segment_ids: Sequence[str]) -> Mapping[str, Extent]:
        """The positions that those segments' shares hold, where they have one."""

    @abstractmethod
    def write(self, parts: Mapping[str, KvPart]) -> None:
        """Keep segments' shares, instead of those that they have.

        Not those of segments that are gone by then, nor those that somebody else's, written meanwhile, cover.
        """

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Bytes of all shares by segment, with what killed writers left of them."""

    @abstractmethod
    def remove(self, segment_ids: Collection[str]) -> None:
        """Remove segments' shares, where they have one. Within `Blobs.removing`."""

    @abstractmethod
    def remove_abandoned(self) -> None:
        """Remove what killed writers left behind. Within `Blobs.removing`."""

    def close(self) -> None:  # noqa: B027  (a folder holds nothing open)
        """Close connections."""


class PayloadShares(KvShares):
    """Shares on a server: a payload for the bytes, and a record that says what they hold and under which name they lie.

    A payload is written before anything refers to it, so it holds nobody up.
    """

    def __init__(self, records: CheckedBlobs, payloads: Payloads) -> None:
        self._records, self._payloads = records, payloads

    @override
    def extents(self, segment_ids: Sequence[str]) -> dict[str, _StoredShare]:
        found, _ = self._records.read("kv", segment_ids, decode_kv_record)
        return {own: _StoredShare(r.start, r.stop, r.content, own, r, self) for own, r in found.items()}

    @override
    def write(self, parts: Mapping[str, KvPart]) -> None:
        written = {segment_id: self._write_payload(segment_id, part) for segment_id, part in parts.items()}
        with self._records.blobs.writing():
            there = self._records.existing("segments", parts)
            before = self.extents(list(there))
            kept = {
                segment_id: record
                for segment_id, record in written.items()
                if segment_id in there and not (segment_id in before and before[segment_id].covers(parts[segment_id]))
            }
            self._refer(kept)
            lost = [record.payload for segment_id, record in written.items() if segment_id not in kept]
            replaced = [share.record.payload for segment_id, share in before.items() if segment_id in kept]
            self._payloads.remove_payloads(lost + replaced)

    @override
    def sizes(self) -> dict[str, int]:
        sizes = dict.fromkeys(self._records.blobs.ids("kv"), 0)
        for payload, size in self._payloads.payload_sizes().items():
            segment_id = _segment_of(payload)
            sizes[segment_id] = sizes.get(segment_id, 0) + size
        return sizes

    @override
    def remove(self, segment_ids: Collection[str]) -> None:
        self._records.blobs.remove([name_of("kv", segment_id) for segment_id in segment_ids])
        payloads = self._payloads.payload_sizes()
        self._payloads.remove_payloads([payload for payload in payloads if _segment_of(payload) in segment_ids])

    @override
    def remove_abandoned(self) -> None:
        shares = self.extents(self._records.blobs.ids("kv"))
        self._payloads.remove_abandoned({share.record.payload for share in shares.values()})

    @override
    def close(self) -> None:
        self._payloads.close()

    def fetch(self, segment_id: str, record: KvRecord) -> KvPart | None:
        """The share that a record tells of; None where its payload is gone, not authentic, or cannot be had now."""
        encryption = self._records.encryption
        try:
            data = self._payloads.read_payload(record.payload, record.size)
            if data is None:
                return None
            if encryption is not None:
                data = encryption.open(data, record.payload)
            part = parse_kv(data, segment_id, self._records.namespace)
        except IntegrityError as error:
            self._records.blobs.report(f"KV-cache of segment {segment_id}", error)
            return None
        except StoreUnavailableError as error:
            log.warning("A KV-cache cannot be read (its lineage is): %s", error)
            return None
        return part if (part.start, part.stop, part.content) == (record.start, record.stop, record.content) else None

    def _write_payload(self, segment_id: str, part: KvPart) -> KvRecord:
        """Write a share's bytes, to which nothing refers yet."""
        name, size = f"{segment_id}-{secrets.token_hex(8)}", kv_bytes(part)
        record = KvRecord(part.start, part.stop, part.content, name, self._records.stored_size(size))
        chunks = kv_chunks(part, segment_id, self._records.namespace)
        if self._records.encryption is not None:
            chunks = self._records.encryption.seal_chunks(chunks, size, name)
        self._payloads.write_payload(name, record.size, chunks)
        return record

    def _refer(self, records: Mapping[str, KvRecord]) -> None:
        """Make payloads the segments' shares. Within `Blobs.writing`."""
        for record in records.values():
            self._payloads.keep_payload(record.payload, record.size)
        namespace = self._records.namespace
        blobs = {name_of("kv", own): encode_kv_record(record, own, namespace) for own, record in records.items()}
        if blobs:
            self._records.blobs.write({name: self._records.sealed(data, name) for name, data in blobs.items()})


@dataclass(frozen=True)
class _StoredShare(Extent):
    """A share that lies on a server."""

    segment_id: str
    record: KvRecord
    source: PayloadShares

    @override
    def load(self) -> KvPart | None:
        return self.source.fetch(self.segment_id, self.record)


@dataclass(frozen=True)
class ShareLink:
    """One segment of a stored lineage, as the KV-cache along it is concerned.

    Attributes:
        segment_id: Its id.
        stop: Positions up to and including it.
        content: Digest of all values up to and including it.
    """

    segment_id: str
    stop: int
    content: str


def links_of(segment_ids: Sequence[str], lineage: Sequence[Segment], dtype: str) -> list[ShareLink]:
    """A lineage's segments, first one first."""
    links, stop = [], 0
    for segment_id, segment, content in zip(segment_ids, lineage, content_digests(lineage, dtype), strict=True):
        stop += len(segment)
        links.append(ShareLink(segment_id, stop, content))
    return links


def content_digests(lineage: Iterable[Segment], dtype: str) -> list[str]:
    """One digest per prefix of a lineage, over its values (a recipe id is over how they were made).

    Raises:
        ConfigurationError: Values are out of range, not finite, or of another dtype.
    """
    digest, digests = b"", []
    for segment in lineage:
        digest = hashlib.blake2b(digest + payload_bytes(segment, dtype), digest_size=16).digest()
        digests.append(digest.hex())
    return digests


def read_kv(extents: Mapping[str, Extent], links: Iterable[ShareLink]) -> HostKv | None:
    """The longest cache without a gap that the shares along a lineage hold: views of one, or copies of several."""
    pieces: list[HostKv] = []
    covered, geometry = 0, None
    for link in links:
        extent = extents.get(link.segment_id)
        part = extent.load() if extent is not None and _continues(extent, link, covered) else None
        if part is None:
            continue
        if geometry not in (None, part.geometry):
            break
        pieces.append(part.kv.to_host(covered - part.start))
        covered, geometry = part.stop, part.geometry
    return join(pieces) if pieces else None


@dataclass(frozen=True)
class MissingKv:
    """Positions ``start:stop`` that belong into a link's share."""

    link: ShareLink
    start: int
    stop: int


def missing_kv(extents: Mapping[str, Extent], links: Iterable[ShareLink], length: int) -> list[MissingKv]:
    """The positions that a cache of `length` would add to the shares along a lineage.

    A share that is one position short of what it could hold stays: an answer's last token often has no KV yet, and the
    next segment's share takes it in.
    """
    missing = []
    covered = 0
    for link in links:
        extent = extents.get(link.segment_id)
        stop = min(link.stop, length)
        if extent is not None and _continues(extent, link, covered) and extent.stop >= stop - 1:
            covered = extent.stop
        elif stop > covered:
            missing.append(MissingKv(link, covered, stop))
            covered = stop
    return missing


def _continues(extent: Extent, link: ShareLink, covered: int) -> bool:
    """Whether a link's share was computed from just these values and leaves no gap after the `covered` positions."""
    return extent.content == link.content and extent.start <= covered < extent.stop


def _segment_of(payload: str) -> str:
    """The segment whose share a payload holds."""
    return payload.partition("-")[0]
