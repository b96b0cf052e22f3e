"""Opening a frame. No memory is taken before its lengths are checked, and nothing is used before its head's MAC is.

`open_frame` takes a frame that lies in memory, `read_frame` maps a file, and a `FrameReader` takes chunks as they
arrive. All three end in a `Frame`, whose sections are views of the memory they arrived in.
"""

from __future__ import annotations

import hmac
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from avp_agents.errors import FrameError, FrameIntegrityError, FrameLimitError
from avp_agents.protocol.frame_layout import DIGEST_BYTES, HEADER_BYTES, MAC_OFFSET, FrameLayout, Header
from avp_agents.protocol.frame_mac import MAC_BYTES, head_mac, tail_mac
from avp_agents.protocol.frame_metadata import Metadata, Section, unpack_metadata
from avp_agents.protocol.limits import DEFAULT_LIMITS, Limits
from avp_agents.protocol.tensor_bytes import empty_buffer

Buffer = bytes | bytearray | memoryview | mmap.mmap


@dataclass(frozen=True)
class Frame:
    """A frame whose MACs and checksums were found right. `decode_context` and its kin take the value out of it.

    Attributes:
        layout: Where everything lies.
    """

    layout: FrameLayout
    _head: memoryview
    _body: memoryview

    @property
    def metadata(self) -> Metadata:
        """What the frame holds."""
        return self.layout.metadata

    def sections(self) -> Iterator[tuple[Section, memoryview]]:
        """Each section and its stored bytes."""
        boundary = len(self._head)
        for section, offset in zip(self.metadata.sections, self.layout.offsets, strict=True):
            memory, start = (self._head, offset) if offset < boundary else (self._body, offset - boundary)
            yield section, memory[start : start + section.stored_bytes]


def open_frame(data: Buffer, *, key: bytes, limits: Limits = DEFAULT_LIMITS, trust_kv: bool = False) -> Frame:
    """A frame that lies in memory, checked.

    Args:
        data: Exactly one frame. Keys and values stay views of it where it is writable.
        key: The namespace's key, which the sender used.
        limits: What is accepted.
        trust_kv: Accept keys and values that no MAC covers, because they came by a way nobody else can write to.

    Raises:
        FrameError: It is torn, has bytes left over, contradicts itself, or is of a version or kind unknown here.
        FrameLimitError: It is larger than `limits` allow.
        FrameIntegrityError: A MAC or a checksum does not match, or a MAC over keys and values is missing.
    """
    view = memoryview(data).cast("B")
    header = Header.parse(view[:HEADER_BYTES], limits)
    if len(view) != header.frame_bytes:
        raise FrameError(f"The frame says it has {header.frame_bytes} bytes, but {len(view)} are there.")
    head = view[: header.head_bytes]
    layout = check_head(header, head, key=key, limits=limits, trust_kv=trust_kv)
    return _checked(Frame(layout, head, view[header.head_bytes :]), key)


def read_frame(path: Path, *, key: bytes, limits: Limits = DEFAULT_LIMITS, trust_kv: bool = False) -> Frame:
    """A frame in a file, mapped into memory. It stays readable after the file was removed.

    Args:
        path: The file.
        key, limits, trust_kv: As in `open_frame`.

    Raises:
        As `open_frame`; OSError where the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = Header.parse(file.read(HEADER_BYTES), limits)
        if size != header.frame_bytes:
            raise FrameError(f"The frame says it has {header.frame_bytes} bytes, but the file has {size}.")
        try:
            # a private mapping: what a reader writes into these tensors never reaches the file
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        except ValueError as error:
            raise FrameError("The file shrank while it was opened.") from error
    return open_frame(mapped, key=key, limits=limits, trust_kv=trust_kv)


class FrameReader:
    """Takes a frame chunk by chunk, wherever the chunks are cut.

    Memory is taken in two steps: for the head once the header is within the limits, and for keys and values once the
    head's MAC proves that the sender holds the key.

    Args:
        key, limits, trust_kv: As in `open_frame`.

    Example:
        >>> reader = FrameReader(key=namespace.key)
        >>> for chunk in response.iter_bytes():
        ...     reader.feed(chunk)
        >>> context = decode_context(reader.finish())
    """

    def __init__(self, *, key: bytes, limits: Limits = DEFAULT_LIMITS, trust_kv: bool = False) -> None:
        self._key, self._limits, self._trust_kv = key, limits, trust_kv
        self._header: Header | None = None
        self._layout: FrameLayout | None = None
        self._head = self._body = memoryview(b"")
        self._target, self._filled = memoryview(bytearray(HEADER_BYTES)), 0

    def feed(self, chunk: Buffer) -> None:
        """Take the next bytes.

        Raises:
            As `open_frame`.
        """
        rest = memoryview(chunk).cast("B")
        while len(rest):
            taken = min(len(rest), len(self._target) - self._filled)
            if not taken:
                raise FrameError("There are bytes behind the frame's end.")
            self._target[self._filled : self._filled + taken] = rest[:taken]
            self._filled += taken
            rest = rest[taken:]
            if self._filled == len(self._target) and self._layout is None:
                self._begin_next_part()

    def finish(self) -> Frame:
        """The frame, after all chunks were fed.

        Raises:
            As `open_frame`.
        """
        if self._layout is None or self._filled < len(self._body):
            raise FrameError("The frame ends early.")
        return _checked(Frame(self._layout, self._head, self._body), self._key)

    def _begin_next_part(self) -> None:
        """Header and head are complete in turn; make room for what follows."""
        if self._header is None:
            opening = self._target
            self._header = Header.parse(opening, self._limits)
            self._head = _memory(self._header.head_bytes)
            self._head[:HEADER_BYTES] = opening
            self._target = self._head
            if self._filled < len(self._head):
                return
        header = self._header
        self._layout = check_head(header, self._head, key=self._key, limits=self._limits, trust_kv=self._trust_kv)
        self._body = _memory(header.frame_bytes - header.head_bytes)
        self._target, self._filled = self._body, 0


def check_head(
    header: Header, head: memoryview, *, key: bytes | None, limits: Limits, trust_kv: bool = False
) -> FrameLayout:
    """The layout that a head describes.

    Args:
        header: Its header.
        head: All bytes before the first keys, the header's included.
        key: What its MAC must be made with; None leaves the MAC unchecked.
        limits: What is accepted.
        trust_kv: As in `open_frame`.

    Raises:
        As `open_frame`.
    """
    if key is not None:
        mac = head_mac(key)
        mac.update(head[:MAC_OFFSET])
        mac.update(head[HEADER_BYTES:])
        if not hmac.compare_digest(mac.digest(), header.mac):
            raise FrameIntegrityError(
                "The frame's MAC does not match: it was made with another key, or altered. Sender and receiver need "
                "the same namespace and AVP_STORE_KEY."
            )
    end = HEADER_BYTES + header.metadata_bytes
    layout = FrameLayout(header, unpack_metadata(head[HEADER_BYTES:end], limits))
    layout.check()
    check_padding(layout, head, end)
    if layout.metadata.layers and not (header.kv_authenticated or trust_kv):
        raise FrameIntegrityError(
            "No MAC covers the frame's keys and values. The sender can add one, or pass trust_kv=True where nobody "
            "else could have written them."
        )
    return layout


def check_padding(layout: FrameLayout, head: memoryview, metadata_end: int) -> None:
    """Refuse bytes that are not zero between the head's sections.

    Raises:
        FrameError: There are some.
    """
    ends = [metadata_end]
    ends += [o + s.stored_bytes for o, s in zip(layout.offsets, layout.metadata.sections, strict=True) if not s.is_kv]
    for end in ends:
        if any(head[end : end + -end % 64]):
            raise FrameError("The bytes between a frame's sections must be zero.")


def _checked(frame: Frame, key: bytes) -> Frame:
    """The frame, once all checksums and the tail's MAC are found right."""
    layout, body = frame.layout, frame._body
    tail = body[layout.tail_offset - layout.header.head_bytes :]
    mac = tail_mac(key)
    mac.update(layout.header.mac)
    end = 0
    for index, (section, stored) in enumerate(frame.sections()):
        expected = tail[DIGEST_BYTES * index : DIGEST_BYTES * (index + 1)]
        if xxhash.xxh3_128_digest(stored) != expected:
            raise FrameIntegrityError(f"The frame's section {index} ({section.kind}) does not match its checksum.")
        if section.is_kv:
            if layout.header.kv_authenticated:
                mac.update(stored)
            end += section.stored_bytes
            if any(body[end : end + -end % 64]):
                raise FrameError("The bytes between a frame's sections must be zero.")
            end += -end % 64
    mac.update(tail[:-MAC_BYTES])
    if not hmac.compare_digest(mac.digest(), tail[-MAC_BYTES:]):
        raise FrameIntegrityError("The frame's closing MAC does not match: its keys and values were altered.")
    return frame


def _memory(size: int) -> memoryview:
    try:
        return empty_buffer(size)
    except MemoryError as error:
        raise FrameLimitError(f"There is no memory for {size} bytes of a frame; lower Limits.frame_bytes.") from error
