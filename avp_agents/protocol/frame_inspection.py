"""What a frame holds, from its header, its metadata and its tail: a few kilobytes of however many gigabytes it has."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

from avp_agents.errors import FrameError, FrameIntegrityError
from avp_agents.protocol.frame_decoding import check_head
from avp_agents.protocol.frame_encoding import CHUNK_BYTES
from avp_agents.protocol.frame_layout import DIGEST_BYTES, HEADER_BYTES, VERSION, FrameLayout, Header
from avp_agents.protocol.frame_mac import MAC_BYTES, tail_mac
from avp_agents.protocol.frame_metadata import unpack_metadata
from avp_agents.protocol.limits import DEFAULT_LIMITS, Limits


class ByteSource(Protocol):
    """Something that bytes can be read from anywhere in it: a file, a URL that answers ranges."""

    def size(self) -> int:
        """Length in bytes."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Exactly so many bytes from there."""
        ...


class FileSource:
    """A file as a `ByteSource`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def size(self) -> int:
        """Length in bytes."""
        return os.stat(self._path).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from the file.

        Raises:
            FrameError: It ends before.
        """
        with self._path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) != length:
            raise FrameError("The frame ends early.")
        return data


@dataclass(frozen=True)
class FrameReport:
    """What `inspect_frame` found.

    Attributes:
        layout: Header, metadata and offsets; they are consistent with each other and with the source's size.
        digests: The xxh3-128 of each section as the tail has it, as hex digits.
        authentic: Whether the head's MAC, and the tail's as far as it was read, match the key; None without a key.
        verified: Whether every section was read and matched its checksum.
        bytes_read: How much was read to find out.
    """

    layout: FrameLayout
    digests: tuple[str, ...]
    authentic: bool | None
    verified: bool
    bytes_read: int

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON data."""
        header, metadata = self.layout.header, self.layout.metadata
        described = metadata.to_fields()
        places = zip(described["sections"], self.layout.offsets, self.digests, strict=True)
        return {
            "version": VERSION,
            "kind": metadata.kind,
            "fingerprint": metadata.fingerprint,
            "dtype": metadata.dtype,
            "positions": metadata.positions,
            "kv_positions": metadata.kv_positions,
            "layers": metadata.layers,
            "bytes": header.frame_bytes,
            "head_bytes": header.head_bytes,
            "metadata_bytes": header.metadata_bytes,
            "kv_authenticated": header.kv_authenticated,
            "authentic": self.authentic,
            "verified": self.verified,
            "bytes_read": self.bytes_read,
            "sections": [section | {"offset": at, "xxh3_128": digest} for section, at, digest in places],
            "splices": described.get("splices"),
        }


def inspect_frame(
    source: ByteSource, *, key: bytes | None = None, verify: bool = False, limits: Limits = DEFAULT_LIMITS
) -> FrameReport:
    """What a frame holds. Its payloads are not read, unless `verify` asks for their checksums.

    Args:
        source: Where it lies.
        key: The namespace's key. With it the head (lineage included) is read and its MAC checked, and the tail's MAC
            too where it does not cover keys and values, or these are read anyway.
        verify: Read everything, in chunks, and compare each section with its checksum.
        limits: What is accepted.

    Raises:
        FrameError, FrameLimitError: As for `open_frame`.
        FrameIntegrityError: A section does not match its checksum. That a MAC does not match is reported, not raised.
    """
    reading = _Reading(source)
    size = source.size()
    header = Header.parse(reading.read(0, min(HEADER_BYTES, size)), limits)
    if size != header.frame_bytes:
        raise FrameError(f"The frame says it has {header.frame_bytes} bytes, but {size} are there.")
    layout = FrameLayout(header, unpack_metadata(reading.read(HEADER_BYTES, header.metadata_bytes), limits))
    layout.check()
    tail = reading.read(layout.tail_offset, layout.tail_bytes)
    authentic = None if key is None else _head_is_authentic(reading, layout, key, limits)
    mac = None if key is None else tail_mac(key)
    if mac is not None:
        mac.update(header.mac)
    digests = [tail[start : start + DIGEST_BYTES] for start in range(0, len(tail) - MAC_BYTES, DIGEST_BYTES)]
    if verify:
        for index, digest in enumerate(digests):
            _verify(reading, layout, index, digest, mac if header.kv_authenticated else None)
    if mac is not None and (verify or not header.kv_authenticated or not layout.metadata.layers):
        mac.update(tail[:-MAC_BYTES])
        authentic = bool(authentic) and hmac.compare_digest(mac.digest(), tail[-MAC_BYTES:])
    return FrameReport(layout, tuple(digest.hex() for digest in digests), authentic, verify, reading.total)


class _Reading:
    """Counts what is read."""

    def __init__(self, source: ByteSource) -> None:
        self._source, self.total = source, 0

    def read(self, offset: int, length: int) -> bytes:
        self.total += length
        return self._source.read(offset, length)

    def chunks(self, offset: int, length: int) -> Iterator[bytes]:
        for start in range(0, length, CHUNK_BYTES):
            yield self.read(offset + start, min(CHUNK_BYTES, length - start))


def _verify(reading: _Reading, layout: FrameLayout, index: int, expected: bytes, mac: hashlib.blake2b | None) -> None:
    """Compare a section with its checksum; feed keys and values to the tail's MAC."""
    section = layout.metadata.sections[index]
    digest = xxhash.xxh3_128()
    for chunk in reading.chunks(layout.offsets[index], section.stored_bytes):
        digest.update(chunk)
        if mac is not None and section.is_kv:
            mac.update(chunk)
    if digest.digest() != expected:
        raise FrameIntegrityError(f"The frame's section {index} ({section.kind}) does not match its checksum.")


def _head_is_authentic(reading: _Reading, layout: FrameLayout, key: bytes, limits: Limits) -> bool:
    head = memoryview(reading.read(0, layout.header.head_bytes))
    try:
        check_head(layout.header, head, key=key, limits=limits, trust_kv=True)
    except FrameIntegrityError:
        return False
    return True
