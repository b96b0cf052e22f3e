"""Records of a few fields: msgpack with a version, and a MAC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import msgpack

from avp_agents.errors import IntegrityError
from avp_agents.store.namespace import Namespace

VERSION = 1


def encode_fields(fields: Mapping[str, Any], label: str, namespace: Namespace) -> bytes:
    """The bytes of the record called `label`."""
    return namespace.signed(cast(bytes, msgpack.packb({"version": VERSION, **fields})), label)


def decode_fields(data: bytes, label: str, namespace: Namespace) -> dict[str, Any]:
    """The fields that `data` holds, its MAC checked first.

    Raises:
        IntegrityError: The bytes are torn, altered, another record's, or of a version this release does not know.
    """
    fields: dict[str, Any] = msgpack.unpackb(namespace.verified(data, label))
    version = fields.pop("version")
    if version != VERSION:
        raise IntegrityError(f"record version {version} is unknown to this release")
    return fields
