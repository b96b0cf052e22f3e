"""The keyed MACs of a frame: one over its head, one over its tail. Both sides hold the same namespace key."""

from __future__ import annotations

import hashlib

from avp_agents.errors import ConfigurationError

MAC_BYTES = 32
_LEAST_KEY_BYTES = 32


def head_mac(key: bytes) -> hashlib.blake2b:
    """A running MAC over the header's first 32 bytes, the metadata, and all sections but keys and values."""
    return _keyed(key, b"avp-frame-head")


def tail_mac(key: bytes) -> hashlib.blake2b:
    """A running MAC over the head's MAC, the keys and values where the flag says so, and the sections' checksums."""
    return _keyed(key, b"avp-frame-tail")


def _keyed(key: bytes, purpose: bytes) -> hashlib.blake2b:
    if len(key) < _LEAST_KEY_BYTES:
        raise ConfigurationError(f"A frame's key needs at least {_LEAST_KEY_BYTES} bytes; take a Namespace's key.")
    derived = hashlib.blake2b(key, digest_size=64, person=b"avp-frame-key").digest()
    return hashlib.blake2b(key=derived, digest_size=MAC_BYTES, person=purpose)
