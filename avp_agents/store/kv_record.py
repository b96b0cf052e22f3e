"""What a segment's share of a KV-cache holds and under which name its bytes lie, where those lie on a server."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from avp_agents.store.namespace import Namespace
from avp_agents.store.small_record import decode_fields, encode_fields


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
    return encode_fields(asdict(record), _label(segment_id), namespace)


def decode_kv_record(data: bytes, segment_id: str, namespace: Namespace) -> KvRecord:
    """The record that `data` holds, its MAC checked first.

    Raises:
        IntegrityError: The bytes are torn, altered, another segment's, or of a version this release does not know.
    """
    return KvRecord(**decode_fields(data, _label(segment_id), namespace))


def _label(segment_id: str) -> str:
    return "kv-record:" + segment_id
