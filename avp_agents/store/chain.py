"""A lineage as the chain of its segments on disk, and the KV-cache that lies along it.

Each segment's KV file holds the positions that it adds to what its ancestors' files hold. A cache may end short of its
lineage, so a file may begin before its own segment does; what is read is the longest run without a gap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from avp_agents.context import HostKv, Readout, Segment
from avp_agents.store.folder import NamespaceFolder
from avp_agents.store.kv_file import KvPart, join
from avp_agents.store.segment_record import payload_bytes


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


def read_chain(folder: NamespaceFolder, head: str) -> Chain | None:
    """The lineage that ends in a segment; None unless all of it is there."""
    segment_ids, records = [], []
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
    for segment_id, record, content in zip(segment_ids, records, digests, strict=True):
        stop += len(record.segment)
        links.append(Link(segment_id, record.segment, record.readout, content, stop))
    return Chain(last.fingerprint, last.dtype, tuple(links))


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


def stored_parts(folder: NamespaceFolder, chain: Chain) -> list[KvPart]:
    """The KV files along a chain that continue each other without a gap, computed from just these values."""
    parts: list[KvPart] = []
    for link in chain.links:
        part = folder.read_kv(link.segment_id)
        if part is not None and _continues(parts, part, link):
            parts.append(part)
    return parts


def joined_kv(parts: Sequence[KvPart]) -> HostKv | None:
    """Parts that continue each other as one cache, overlaps left out."""
    pieces, covered = [], 0
    for part in parts:
        pieces.append(replace(part, kv=part.kv.to_host(covered - part.start)))
        covered = part.stop
    return join(pieces) if pieces else None


def missing_parts(folder: NamespaceFolder, chain: Chain, length: int) -> list[tuple[Link, int, int]]:
    """What a cache of `length` positions would add to the files along a chain: ``(link, start, stop)`` each."""
    missing = []
    parts: list[KvPart] = []
    covered = 0
    for link in chain.links:
        part = folder.read_kv(link.segment_id)
        stop = min(link.stop, length)
        if part is not None and _continues(parts, part, link, covered):
            parts.append(part)
            covered = part.stop
        elif stop > covered:
            missing.append((link, covered, stop))
            covered = stop
    return missing


def _continues(parts: Sequence[KvPart], part: KvPart, link: Link, covered: int | None = None) -> bool:
    """Whether `part` goes on where `parts` end, was computed from the same values, and has the same geometry."""
    if covered is None:
        covered = parts[-1].stop if parts else 0
    fits = not parts or part.geometry == parts[0].geometry
    return fits and part.content == link.content and part.start <= covered < part.stop
