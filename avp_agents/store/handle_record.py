"""The durable form of a handle: which recipe it stands for, what it says to people, and how long it lives.

The scope is not in it: the handle's id is a digest of recipe and scope, so a scope can be checked but not read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from avp_agents.handle import ContextHandle
from avp_agents.store.namespace import Namespace
from avp_agents.store.small_record import decode_fields, encode_fields


@dataclass(frozen=True)
class HandleRecord:
    """A stored handle.

    Attributes:
        handle: As it was first returned.
        recipe_id: The recipe of the context it stands for.
        ttl: Seconds after its last use; None where the store's own applies.
        stored: When it was put, in seconds since the epoch.
        segments: Ids of the lineage's segments, in order, where a store keeps them with the handle.
    """

    handle: ContextHandle
    recipe_id: str
    ttl: float | None
    stored: float
    segments: tuple[str, ...] = ()


def encode_handle(record: HandleRecord, namespace: Namespace) -> bytes:
    """msgpack and a MAC."""
    return encode_fields(asdict(record), _label(record.handle.id), namespace)


def decode_handle(data: bytes, handle_id: str, namespace: Namespace) -> HandleRecord:
    """The record that `data` holds, its MAC checked first.

    Raises:
        IntegrityError: The bytes are torn, altered, another handle's, or of a version this release does not know.
    """
    fields = decode_fields(data, _label(handle_id), namespace)
    handle, segments = ContextHandle(**fields["handle"]), tuple(fields.get("segments", ()))
    return HandleRecord(handle, fields["recipe_id"], fields["ttl"], fields["stored"], segments)


def _label(handle_id: str) -> str:
    return "handle:" + handle_id
