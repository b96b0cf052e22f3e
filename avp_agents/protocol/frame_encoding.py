"""Making a frame: the head is built in memory, keys and values are handed out as views of where they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

import xxhash

from avp_agents.errors import ConfigurationError
from avp_agents.protocol.frame_layout import MAC_OFFSET, FrameLayout, lay_out
from avp_agents.protocol.frame_mac import head_mac, tail_mac
from avp_agents.protocol.frame_metadata import Metadata, Section, aligned, pack_metadata
from avp_agents.protocol.tensor_bytes import empty_buffer

CHUNK_BYTES = 1 << 20
_PADDING = memoryview(bytes(64))

Pieces = Callable[[], Iterable[memoryview]]
"""A section's stored bytes, piece by piece, as often as they are asked for."""


@dataclass(frozen=True)
class Payload:
    """A section and its stored bytes."""

    section: Section
    pieces: Pieces


class EncodedFrame:
    """A frame that is ready to be sent. Iterating over it yields its bytes in chunks of at most 1 MiB.

    Keys and values are not copied: chunks are views of the tensors, which must not change meanwhile. It can be
    iterated over again, and by several threads.

    Attributes:
        layout: Where everything lies.
        nbytes: Length of the whole frame.

    Example:
        >>> frame = encode_context(context, key=namespace.key)
        >>> with open("context.avp", "wb") as file:
        ...     frame.write(file)
    """

    def __init__(
        self, layout: FrameLayout, head: bytes, head_digests: bytes, kv: Sequence[Payload], key: bytes
    ) -> None:
        self.layout = layout
        self.nbytes = layout.header.frame_bytes
        self._head, self._head_digests, self._kv, self._key = head, head_digests, kv, key

    def __iter__(self) -> Iterator[memoryview]:
        yield from _chunks(memoryview(self._head))
        digests = [self._head_digests]
        mac = tail_mac(self._key)
        mac.update(self.layout.header.mac)
        for payload in self._kv:
            digest = xxhash.xxh3_128()
            for piece in payload.pieces():
                for chunk in _chunks(piece):
                    digest.update(chunk)
                    if self.layout.header.kv_authenticated:
                        mac.update(chunk)
                    yield chunk
            digests.append(digest.digest())
            if gap := -payload.section.stored_bytes % 64:
                yield _PADDING[:gap]
        tail = b"".join(digests)
        mac.update(tail)
        yield memoryview(tail + mac.digest())

    def write(self, file: BinaryIO) -> None:
        """Write the frame to a file or a pipe."""
        for chunk in self:
            file.write(chunk)

    def copy_into(self, buffer: bytearray | memoryview) -> None:
        """Put the frame into memory of the caller's, which has `nbytes` bytes.

        Raises:
            ConfigurationError: It has not.
        """
        view = memoryview(buffer).cast("B")
        if len(view) != self.nbytes:
            raise ConfigurationError(f"The frame has {self.nbytes} bytes, the buffer {len(view)}.")
        offset = 0
        for chunk in self:
            view[offset : offset + len(chunk)] = chunk
            offset += len(chunk)

    def assemble(self) -> memoryview:
        """The frame in one new, writable buffer."""
        buffer = empty_buffer(self.nbytes)
        self.copy_into(buffer)
        return buffer


def encode_frame(
    metadata: Metadata, head_values: Sequence[bytes], kv: Sequence[Payload], *, key: bytes, authenticate_kv: bool
) -> EncodedFrame:
    """A frame of sections whose sizes are known.

    Args:
        metadata: What the sections are.
        head_values: Bytes of all sections but keys and values, in order.
        kv: Keys and values, in order.
        key: At least 32 bytes that the receiver holds too.
        authenticate_kv: Whether the tail's MAC covers keys and values.
    """
    packed = pack_metadata(metadata)
    layout = lay_out(metadata, len(packed), kv_authenticated=authenticate_kv)
    content = b"".join(_padded(value) for value in (bytes(64) + packed, *head_values))
    opening = layout.header.pack()
    mac = head_mac(key)
    mac.update(opening[:MAC_OFFSET])
    mac.update(memoryview(content)[64:])
    header = replace(layout.header, mac=mac.digest())
    digests = b"".join(xxhash.xxh3_128_digest(value) for value in head_values)
    return EncodedFrame(FrameLayout(header, metadata), header.pack() + content[64:], digests, kv, key)


def _padded(value: bytes) -> bytes:
    return value + bytes(aligned(len(value)) - len(value))


def _chunks(piece: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(piece), CHUNK_BYTES):
        yield piece[start : start + CHUNK_BYTES]
