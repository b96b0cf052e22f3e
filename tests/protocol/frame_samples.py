"""Frames that no encoder of ours makes: authentic ones with arbitrary metadata, sections and lengths."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, cast

import msgpack
import xxhash

from avp_agents.protocol.frame_mac import head_mac, tail_mac

KEY = bytes(range(32))
FINGERPRINT = "00c0ffee" * 8


def frame_of(
    metadata: Any,
    head: Sequence[bytes] = (),
    kv: Sequence[bytes] = (),
    *,
    flags: int = 1,
    key: bytes = KEY,
    version: int = 1,
    lengths: tuple[int, int, int] | None = None,
) -> bytes:
    """A frame with right MACs and checksums around whatever it is given, written after docs/protocol.md.

    Args:
        metadata: Packed as it is if it is bytes.
        head, kv: Stored bytes of the sections before and behind the head's end.
        flags, version, lengths: Of the header; by default what belongs there.
        key: For the MACs.
    """
    packed = metadata if isinstance(metadata, bytes) else cast(bytes, msgpack.packb(metadata))
    content = b"".join(_padded(part) for part in (bytes(64) + packed, *head))[64:]
    body = b"".join(_padded(part) for part in kv)
    digests = b"".join(xxhash.xxh3_128_digest(part) for part in (*head, *kv))
    size = 64 + len(content) + len(body) + len(digests) + 32
    opening = struct.pack("<4sHHQQQ", b"AVPF", version, flags, *(lengths or (len(packed), 64 + len(content), size)))
    mac = head_mac(key)
    mac.update(opening + content)
    tail = tail_mac(key)
    tail.update(mac.digest() + (b"".join(kv) if flags & 1 else b"") + digests)
    return opening + mac.digest() + content + body + digests + tail.digest()


def tokens(count: int) -> dict[str, Any]:
    """The metadata of a section of token ids."""
    return {"kind": "tokens", "dtype": "int32", "shape": [count], "bytes": 4 * count}


def context_metadata(sections: list[Any], **changes: Any) -> dict[str, Any]:
    """The metadata of a context."""
    return {"kind": "context", "fingerprint": FINGERPRINT, "dtype": "float32", "sections": sections, **changes}


def keys(layer: int, shape: Sequence[int], size: int, kind: str = "keys", **more: Any) -> dict[str, Any]:
    """The metadata of a section of keys (or values)."""
    return {"kind": kind, "dtype": "float32", "shape": list(shape), "bytes": size, "layer": layer, **more}


def _padded(part: bytes) -> bytes:
    return part + bytes(-len(part) % 64)
