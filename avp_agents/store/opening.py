"""Which store a URL names."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from avp_agents.errors import ConfigurationError
from avp_agents.store.blobs import redacted
from avp_agents.store.encryption import KEY_VARIABLE, Encryption
from avp_agents.store.memory import MemoryStore
from avp_agents.store.namespace import Namespace
from avp_agents.store.objects import SCHEMES as OBJECT_SCHEMES
from avp_agents.store.objects import ObjectStore
from avp_agents.store.redis import SCHEMES as REDIS_SCHEMES
from avp_agents.store.redis import RedisStore
from avp_agents.store.tiered import DEFAULT_MEMORY_BYTES, TieredStore


def open_store(url: str, namespace: Namespace | str = "default", *, share_kv: bool = False) -> TieredStore:
    """Memory (1 GiB) over the store at a URL, for workers that share contexts.

    What goes to the server is encrypted where the environment variable `AVP_ENCRYPTION_KEY` is set.

    Args:
        url: ``redis://host:6379/0``, ``rediss://...``; ``s3://bucket/prefix``, ``gs://...``, ``az://...``,
            ``file:///folder``.
        namespace: The tenant. All workers need the same one, and the same `AVP_STORE_KEY`.
        share_kv: Send KV-caches along, see `TieredStore`.

    Raises:
        ConfigurationError: The URL names no store, or a package is missing.
        EncryptionKeyError: `AVP_ENCRYPTION_KEY` is malformed.
        NamespaceKeyError: The namespace's key cannot be used.

    Example:
        >>> engine = LatentEngine.from_pretrained(store=open_store("redis://10.0.0.5:6379/0"))
    """
    tenant = namespace if isinstance(namespace, Namespace) else Namespace.load(namespace)
    encryption = Encryption.from_environment() if os.environ.get(KEY_VARIABLE) else None
    scheme = urlsplit(url).scheme
    if scheme in REDIS_SCHEMES:
        lower = RedisStore(url, namespace=tenant, encryption=encryption)
    elif scheme in OBJECT_SCHEMES:
        lower = ObjectStore(url, namespace=tenant, encryption=encryption)
    else:
        schemes = ", ".join(f"{each}://" for each in (*REDIS_SCHEMES, *OBJECT_SCHEMES))
        raise ConfigurationError(f"{redacted(url)!r} names no store; its URL begins with one of {schemes}.")
    upper = MemoryStore(namespace=tenant, byte_budget=DEFAULT_MEMORY_BYTES)
    return TieredStore(upper, lower, share_kv=share_kv)
