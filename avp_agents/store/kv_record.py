"""What a segment's share of a KV-cache holds and under which name its bytes lie, where those lie on a server."""

from __future__ import annotations

import hmac
from dataclasses import asdict, dataclass
from typing import cast

import msgpack

from avp_agents.errors import IntegrityError
from avp_agents.store.namespace import MAC_BYTES, Namespace

VERSION = 1


@dataclass(frozen=True)
class KvRecord:
    """Positions ``start:stop`` of a KV-cache, stored elsewhere.

    Attributes:
        start, stop: Which positions of the lineage.
        content: Digest of the lineage values up to this segment that the cache was computed from.
        payload: The name its bytes are stored under.
        size: Those bytes, as stored.
    """

    start: int
    stop: int
    content: str
    payload: str
    size: int


def encode_kv_record(record: KvRecord, segment_id: str, namespace: Namespace) -> bytes:
    """msgpack and a MAC."""
    content = cast(bytes, msgpack.packb({"version": VERSION, **asdict(record)}))
    return content + _mac(content, segment_id, namespace)


def decode_kv_record(data: bytes, segment_id: str, namespace: Namespace) -> KvRecord:
    """The record that `data` holds, its MAC checked first.

    Raises:
        IntegrityError: The bytes are torn, altered, another segment's, or of a version this release does not know.
    """
    content, mac = data[:-MAC_BYTES], data[-MAC_BYTES:]
    if not hmac.compare_digest(mac, _mac(content, segment_id, namespace)):
        raise IntegrityError("MAC mismatch")
    fields = msgpack.unpackb(content)
    if fields.pop("version") != VERSION:
        raise IntegrityError("a record of a version that is unknown to this release")
    return KvRecord(**fields)


def _mac(content: bytes, segment_id: str, namespace: Namespace) -> bytes:
    mac = namespace.mac("kv-record:" + segment_id)
    mac.update(content)
    return mac.digest()
