"""A lineage as the chain of its segments on disk, and the KV-cache that lies along it.

Each segment's KV file holds the positions that it adds to what its ancestors' files hold. A cache may end short of its
lineage, so a file may begin before its own segment does; what is read is the longest run without a gap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from avp_agents.context import Context, Readout, Segment
from avp_agents.kv_cache import HostKv
from avp_agents.store.kv_file import KvPart, join
from avp_agents.store.segment_record import SegmentRecord, payload_bytes


class SegmentReader(Protocol):
    """Where segments' records come from."""

    def read_segment(self, segment_id: str) -> SegmentRecord | None:
        """A segment's record; None where there is none, or none that is authentic."""
        ...


class KvReader(Protocol):
    """Where segments' shares of a KV-cache come from."""

    def read_kv(self, segment_id: str) -> KvPart | None:
        """A segment's share; None where there is none, or none that is authentic."""
        ...


class Extent(Protocol):
    """Which positions of which values a share of a KV-cache holds."""

    @property
    def start(self) -> int:
        """Its first position."""
        ...

    @property
    def stop(self) -> int:
        """The position after its last."""
        ...

    @property
    def content(self) -> str:
        """Digest of the lineage values that it was computed from."""
        ...


class ExtentReader(Protocol):
    """Where it is known what segments' shares of a KV-cache hold."""

    def read_extent(self, segment_id: str) -> Extent | None:
        """What a segment's share holds; None where there is none."""
        ...


@dataclass(frozen=True)
class Link:
    """One segment of a chain.

    Attributes:
        segment_id: Its id.
        segment: Its values.
        readout: What the model was about to say after it, where that was stored.
        content: Digest of all values up to and including it.
        stop: Positions up to and including it.
    """

    segment_id: str
    segment: Segment
    readout: Readout | None
    content: str
    stop: int


@dataclass(frozen=True)
class Chain:
    """A whole stored lineage, first segment first."""

    fingerprint: str
    dtype: str
    links: tuple[Link, ...]

    @property
    def lineage(self) -> tuple[Segment, ...]:
        """The segments."""
        return tuple(link.segment for link in self.links)

    @property
    def readout(self) -> Readout | None:
        """The last segment's readout."""
        return self.links[-1].readout

    def agreeing_with(self, own: Sequence[str]) -> Chain:
        """The leading links whose values have the digests `own`."""
        pairs = zip(self.links, own, strict=False)
        return replace(self, links=tuple(link for link, content in pairs if link.content == content))


def read_chain(folder: SegmentReader, head: str) -> Chain | None:
    """The lineage that ends in a segment; None unless all of it is there."""
    segment_ids: list[str] = []
    records: list[SegmentRecord] = []
    segment_id: str | None = head
    while segment_id is not None:
        record = folder.read_segment(segment_id)
        if record is None:
            return None
        segment_ids.append(segment_id)
        records.append(record)
        segment_id = record.parent
    segment_ids.reverse()
    records.reverse()
    last = records[-1]
    digests = content_digests((record.segment for record in records), last.dtype)
    links, stop = [], 0
    for own_id, record, content in zip(segment_ids, records, digests, strict=True):
        stop += len(record.segment)
        links.append(Link(own_id, record.segment, record.readout, content, stop))
    return Chain(last.fingerprint, last.dtype, tuple(links))


def lacking_records(
    folder: SegmentReader, context: Context, own: Sequence[str], segment_ids: Sequence[str]
) -> dict[str, SegmentRecord]:
    """What a store has to write so that it holds a context; what it has keeps its values.

    Args:
        folder: What is there.
        context: What is to be.
        own: `content_digests` of the context's lineage.
        segment_ids: Of its segments, in order.

    Returns:
        Records by id, in order: of segments that are absent, and of the last one where that lacks the readout (and was
        made from the same values).
    """
    lacking: dict[str, SegmentRecord] = {}
    adopted: list[Segment] = []
    parent: str | None = None
    for segment_id, segment in zip(segment_ids, context.lineage, strict=True):
        record = folder.read_segment(segment_id)
        adopted.append(record.segment if record is not None else segment)
        readout = context.readout if segment_id == segment_ids[-1] else None
        lacks_readout = record is not None and record.readout is None and readout is not None
        if record is None or (lacks_readout and content_digests(adopted, context.dtype)[-1] == own[-1]):
            lacking[segment_id] = SegmentRecord(adopted[-1], context.fingerprint, context.dtype, parent, readout)
        parent = segment_id
    return lacking


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


def read_kv(folder: KvReader, chain: Chain) -> HostKv | None:
    """The longest cache without a gap that the files along a chain hold: views of one file, or copies of several."""
    pieces: list[HostKv] = []
    covered, geometry = 0, None
    for link in chain.links:
        part = folder.read_kv(link.segment_id)
        if part is None or not _continues(part, link, covered):
            continue
        if geometry not in (None, part.geometry):
            break
        pieces.append(part.kv.to_host(covered - part.start))
        covered, geometry = part.stop, part.geometry
    return join(pieces) if pieces else None


@dataclass(frozen=True)
class MissingKv:
    """Positions ``start:stop`` that belong into a link's KV file."""

    link: Link
    start: int
    stop: int


def missing_kv(folder: ExtentReader, chain: Chain, length: int) -> list[MissingKv]:
    """What a cache of `length` positions would add to the files along a chain.

    A file that is one position short of what it could hold stays: an answer's last token often has no KV yet, and the
    next segment's file takes it in.
    """
    missing = []
    covered = 0
    for link in chain.links:
        part = folder.read_extent(link.segment_id)
        stop = min(link.stop, length)
        if part is not None and _continues(part, link, covered) and part.stop >= stop - 1:
            covered = part.stop
        elif stop > covered:
            missing.append(MissingKv(link, covered, stop))
            covered = stop
    return missing


def _continues(part: Extent, link: Link, covered: int) -> bool:
    """Whether a link's share was computed from just these values and leaves no gap after the `covered` positions."""
    return part.content == link.content and part.start <= covered < part.stop
