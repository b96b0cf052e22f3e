"""Which store a URL names."""

from __future__ import annotations

import os
import socket
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from avp_agents.errors import ConfigurationError
from avp_agents.store.blobs import redacted
from avp_agents.store.encryption import KEY_VARIABLE, Encryption
from avp_agents.store.memory import MemoryStore
from avp_agents.store.mooncake import MooncakeStore
from avp_agents.store.namespace import Namespace
from avp_agents.store.objects import SCHEMES as OBJECT_SCHEMES
from avp_agents.store.objects import ObjectStore
from avp_agents.store.record_store import RecordStore
from avp_agents.store.redis import SCHEMES as REDIS_SCHEMES
from avp_agents.store.redis import RedisStore
from avp_agents.store.tiered import DEFAULT_MEMORY_BYTES, TieredStore

_MOONCAKE = "mooncake+"
_MOONCAKE_OPTIONS = ("master", "host", "memory_bytes", "metadata", "protocol", "devices")


def open_store(url: str, namespace: Namespace | str = "default", *, share_kv: bool = False) -> TieredStore:
    """Memory (1 GiB) over the store at a URL, for workers that share contexts.

    What goes to the server is encrypted where the environment variable `AVP_ENCRYPTION_KEY` is set.

    Args:
        url: ``redis://host:6379/0``, ``rediss://...``; ``s3://bucket/prefix``, ``gs://...``, ``az://...``,
            ``file:///folder``. ``mooncake+`` before one of them keeps KV-caches in Mooncake, as in
            ``mooncake+redis://10.0.0.5:6379/0?master=10.0.0.5:50051``; the query holds options of `MooncakeStore`,
            of which only the master has to be named.
        namespace: The tenant. All workers need the same one, and the same `AVP_STORE_KEY`.
        share_kv: Send KV-caches along, see `TieredStore`; to Mooncake they always are.

    Raises:
        ConfigurationError: The URL names no store, or a package is missing.
        EncryptionKeyError: `AVP_ENCRYPTION_KEY` is malformed.
        NamespaceKeyError: The namespace's key cannot be used.

    Example:
        >>> engine = LatentEngine.from_pretrained(store=open_store("redis://10.0.0.5:6379/0"))
    """
    tenant = Namespace.of(namespace)
    encryption = Encryption.from_environment() if os.environ.get(KEY_VARIABLE) else None
    lower = _lower(url, tenant, encryption)
    upper = MemoryStore(namespace=tenant, byte_budget=DEFAULT_MEMORY_BYTES)
    return TieredStore(upper, lower, share_kv=share_kv or isinstance(lower, MooncakeStore))


def _lower(url: str, tenant: Namespace, encryption: Encryption | None) -> RecordStore:
    if url.startswith(_MOONCAKE):
        lineage_url, options = _mooncake_options(url.removeprefix(_MOONCAKE))
        return MooncakeStore(_lower(lineage_url, tenant, encryption), **options)
    scheme = urlsplit(url).scheme
    if scheme in REDIS_SCHEMES:
        return RedisStore(url, namespace=tenant, encryption=encryption)
    if scheme in OBJECT_SCHEMES:
        return ObjectStore(url, namespace=tenant, encryption=encryption)
    schemes = ", ".join(f"{each}://" for each in (*REDIS_SCHEMES, *OBJECT_SCHEMES))
    raise ConfigurationError(f"{redacted(url)!r} names no store; its URL begins with one of {schemes}.")


def _mooncake_options(url: str) -> tuple[str, dict[str, Any]]:
    """The URL of the lineage's store, and what its query says of Mooncake."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    options: dict[str, Any] = {name: query.pop(name) for name in _MOONCAKE_OPTIONS if name in query}
    if "master" not in options:
        raise ConfigurationError(f"{redacted(url)!r} names no Mooncake master; add ?master=host:port.")
    options.setdefault("host", socket.gethostname())
    if "memory_bytes" in options:
        if not options["memory_bytes"].isdecimal():
            raise ConfigurationError(f"memory_bytes is a number of bytes, not {options['memory_bytes']!r}.")
        options["memory_bytes"] = int(options["memory_bytes"])
    return parts._replace(query=urlencode(query)).geturl(), options
