"""Where everything lies in a frame.

    header     64 bytes: magic, version, flags, lengths, the head's MAC
    metadata   msgpack
    sections   lineage, readout, hidden states, text      ┐ the head ends before the first keys
    sections   keys and values, layer by layer
    tail       one xxh3-128 of each section, the tail's MAC

Metadata and sections begin at multiples of 64 bytes; the bytes between are zero. Integers are little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

from avp_agents.errors import FrameError
from avp_agents.protocol.frame_mac import MAC_BYTES
from avp_agents.protocol.frame_metadata import Metadata, aligned
from avp_agents.protocol.limits import Limits

MAGIC = b"AVPF"
VERSION = 1
HEADER_BYTES = 64
MAC_OFFSET = HEADER_BYTES - MAC_BYTES
DIGEST_BYTES = 16
_FIELDS = struct.Struct("<4sHHQQQ")
_KV_AUTHENTICATED = 1
_SDK_MAGIC = b"AV\x01"


@dataclass(frozen=True)
class Header:
    """A frame's first 64 bytes.

    Attributes:
        kv_authenticated: Whether the tail's MAC covers the keys and values, or their checksums only.
        metadata_bytes: Length of the metadata.
        head_bytes: Length of all that lies before the first keys.
        frame_bytes: Length of the whole frame.
        mac: The head's MAC.
    """

    kv_authenticated: bool
    metadata_bytes: int
    head_bytes: int
    frame_bytes: int
    mac: bytes = bytes(MAC_BYTES)

    def pack(self) -> bytes:
        """The 64 bytes."""
        flags = _KV_AUTHENTICATED if self.kv_authenticated else 0
        lengths = (self.metadata_bytes, self.head_bytes, self.frame_bytes)
        return _FIELDS.pack(MAGIC, VERSION, flags, *lengths) + self.mac

    @classmethod
    def parse(cls, data: bytes | memoryview, limits: Limits) -> Header:
        """The header that `data` begins with.

        Raises:
            FrameError: It is none, or one of a later version.
            FrameLimitError: It announces more than `limits` allow.
        """
        if bytes(data[:3]) == _SDK_MAGIC:
            raise FrameError("This is a message of the reference SDK, not a frame; see avp_agents.protocol.sdk.")
        if len(data) < HEADER_BYTES:
            raise FrameError(f"{len(data)} bytes are too few for a frame.")
        magic, version, flags, metadata_bytes, head_bytes, frame_bytes = _FIELDS.unpack_from(data)
        if magic != MAGIC:
            raise FrameError("This is not a frame: it does not begin with AVPF.")
        if version != VERSION:
            raise FrameError(f"Frame version {version} is unknown; this release reads version {VERSION}.")
        if flags & ~_KV_AUTHENTICATED:
            raise FrameError(f"Frame flags {flags:#06x} are unknown to this release.")
        limits.check("metadata_bytes", metadata_bytes)
        limits.check("head_bytes", head_bytes)
        limits.check("frame_bytes", frame_bytes)
        if HEADER_BYTES + metadata_bytes > head_bytes or head_bytes + MAC_BYTES > frame_bytes:
            raise FrameError("The frame's lengths contradict each other.")
        mac = bytes(data[MAC_OFFSET:HEADER_BYTES])
        return cls(bool(flags), metadata_bytes, head_bytes, frame_bytes, mac)


@dataclass(frozen=True)
class FrameLayout:
    """A frame's header and metadata, and the offsets that follow from them."""

    header: Header
    metadata: Metadata

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each section begins, counted from the frame's first byte."""
        offsets, offset = [], aligned(HEADER_BYTES + self.header.metadata_bytes)
        for section in self.metadata.sections:
            offsets.append(offset)
            offset = aligned(offset + section.stored_bytes)
        return tuple(offsets)

    @cached_property
    def tail_offset(self) -> int:
        """Where the checksums begin."""
        return aligned(self.offsets[-1] + self.metadata.sections[-1].stored_bytes)

    @property
    def tail_bytes(self) -> int:
        """Length of checksums and MAC."""
        return DIGEST_BYTES * len(self.offsets) + MAC_BYTES

    @property
    def head_end(self) -> int:
        """Where the head ends, as the sections have it."""
        kv = (offset for offset, s in zip(self.offsets, self.metadata.sections, strict=True) if s.is_kv)
        return next(kv, self.tail_offset)

    def check(self) -> None:
        """Refuse lengths in the header that are not those of the sections.

        Raises:
            FrameError: They are not.
        """
        ends = (self.head_end, self.tail_offset + self.tail_bytes)
        if ends != (self.header.head_bytes, self.header.frame_bytes):
            raise FrameError(f"The frame's sections take {ends[1]} bytes, its header says {self.header.frame_bytes}.")


def lay_out(metadata: Metadata, metadata_bytes: int, *, kv_authenticated: bool) -> FrameLayout:
    """The layout of a frame with that metadata, its MAC still zero."""
    draft = FrameLayout(Header(kv_authenticated, metadata_bytes, 0, 0), metadata)
    frame_bytes = draft.tail_offset + draft.tail_bytes
    return FrameLayout(Header(kv_authenticated, metadata_bytes, draft.head_end, frame_bytes), metadata)
