"""Encryption at rest: AES-256-GCM over everything that a store on a server holds, under a key that never goes there.

    magic "AVPE1\\n"   6 bytes
    key id            8 bytes, which tell a wrong key from altered bytes and reveal nothing of the key
    salt              16 random bytes; each sealed blob has a key of its own, HKDF-SHA256 of key and salt
    chunks            1 MiB of plain bytes each, the last one perhaps shorter, with a tag of 16 bytes each

A chunk's nonce is its number; its number, whether it is the last, and the blob's name are authenticated with it. So
nothing can be altered, cut off, reordered, or passed off under another name. Names and sizes stay visible; names are
keyed digests.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from avp_agents.errors import ConfigurationError, EncryptionKeyError, IntegrityError, NamespaceKeyError
from avp_agents.store.blobs import rechunked
from avp_agents.store.namespace import parse_key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_VARIABLE = "AVP_ENCRYPTION_KEY"
MAGIC = b"AVPE1\n"
CHUNK = 1 << 20
_KEY_BYTES, _ID_BYTES, _SALT_BYTES, _TAG_BYTES = 32, 8, 16, 16
_HEAD_BYTES = len(MAGIC) + _ID_BYTES + _SALT_BYTES


class Encryption:
    """Seals and opens what a store writes and reads.

    Args:
        key: 32 bytes.
        older_keys: Keys that earlier data may be sealed with; nothing new is.

    Raises:
        ConfigurationError: The package ``cryptography`` is missing.
        EncryptionKeyError: A key has another length.

    Example:
        >>> store = RedisStore("redis://10.0.0.5:6379/0", encryption=Encryption.from_environment())
    """

    def __init__(self, key: bytes, older_keys: Iterable[bytes] = ()) -> None:
        try:
            import cryptography  # noqa: F401
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                'Encryption needs cryptography. Install it with: pip install "avp-agents[encryption]"'
            ) from error
        keys = [key, *older_keys]
        if any(len(each) != _KEY_BYTES for each in keys):
            raise EncryptionKeyError(f"An encryption key has {_KEY_BYTES} bytes. {_HOW_TO_MAKE_ONE}")
        self._keys = {_key_id(each): each for each in reversed(keys)}
        self._key_id = _key_id(key)

    @classmethod
    def from_environment(cls, variable: str = KEY_VARIABLE) -> Encryption:
        """With the key in an environment variable: 32 bytes as hex or base64; after a comma, older keys.

        Raises:
            EncryptionKeyError: The variable is not set, or does not hold keys of 32 bytes.
        """
        text = os.environ.get(variable)
        if not text:
            raise EncryptionKeyError(f"{variable} is not set. {_HOW_TO_MAKE_ONE}")
        try:
            keys = [parse_key(part, source=variable) for part in text.split(",")]
        except NamespaceKeyError as error:
            raise EncryptionKeyError(str(error)) from error
        return cls(keys[0], keys[1:])

    def seal(self, data: bytes, name: str) -> bytes:
        """`data` encrypted, to be opened under the same name only."""
        return b"".join(self.seal_chunks([data], len(data), name))

    def seal_chunks(self, parts: Iterable[bytes | memoryview], size: int, name: str) -> Iterator[bytes]:
        """`size` bytes encrypted one chunk at a time."""
        salt = secrets.token_bytes(_SALT_BYTES)
        aead = _aead(self._keys[self._key_id], salt)
        count = _chunk_count(size)
        yield MAGIC + self._key_id + salt
        for index, chunk in enumerate(rechunked(parts, CHUNK) if size else [b""]):
            yield aead.encrypt(_nonce(index), chunk, _bound(name, index, count))

    def open(self, data: bytes | bytearray, name: str) -> bytearray:
        """The bytes that were sealed under this name.

        Raises:
            EncryptionKeyError: It was sealed with a key that is not known here, or not at all.
            IntegrityError: The bytes are torn, altered, or another name's.
        """
        from cryptography.exceptions import InvalidTag

        if not is_sealed(data):
            raise EncryptionKeyError(
                "This store holds data that is not encrypted, and was opened with encryption. Open it without, or "
                "begin with an empty store."
            )
        view = memoryview(data)
        key = self._keys.get(bytes(view[len(MAGIC) : len(MAGIC) + _ID_BYTES]))
        if key is None:
            raise EncryptionKeyError(
                f"This store's data was encrypted with another key. Set {KEY_VARIABLE} to the key it was written with, "
                "or append that key after a comma to go on with a new one."
            )
        aead = _aead(key, bytes(view[_HEAD_BYTES - _SALT_BYTES : _HEAD_BYTES]))
        size = plain_size(len(data))
        count, plain = _chunk_count(size), bytearray(size)
        for index in range(count):
            start = _HEAD_BYTES + index * (CHUNK + _TAG_BYTES)
            try:
                chunk = aead.decrypt(
                    _nonce(index), view[start : start + CHUNK + _TAG_BYTES], _bound(name, index, count)
                )
            except InvalidTag as error:
                raise IntegrityError("encrypted bytes are torn, altered, or another record's") from error
            plain[index * CHUNK : index * CHUNK + len(chunk)] = chunk
        return plain


def is_sealed(data: bytes | bytearray) -> bool:
    """Whether bytes claim to be encrypted."""
    return data[: len(MAGIC)] == MAGIC


def sealed_size(size: int) -> int:
    """Bytes that `size` plain bytes take once sealed."""
    return _HEAD_BYTES + size + _chunk_count(size) * _TAG_BYTES


def plain_size(sealed: int) -> int:
    """Bytes in a sealed blob of `sealed` bytes.

    Raises:
        IntegrityError: No sealed blob has that size.
    """
    body = sealed - _HEAD_BYTES
    size = body - math.ceil(body / (CHUNK + _TAG_BYTES)) * _TAG_BYTES
    if body < _TAG_BYTES or size < 0 or sealed_size(size) != sealed:
        raise IntegrityError(f"{sealed} bytes are no encrypted record")
    return size


def _chunk_count(size: int) -> int:
    return max(1, math.ceil(size / CHUNK))


def _aead(key: bytes, salt: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return AESGCM(HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=salt, info=b"avp-agents store").derive(key))


def _nonce(index: int) -> bytes:
    return index.to_bytes(12, "little")


def _bound(name: str, index: int, count: int) -> bytes:
    return f"{index}/{count}:{name}".encode()


def _key_id(key: bytes) -> bytes:
    return hashlib.blake2b(key=key, digest_size=_ID_BYTES, person=b"avp-key-id").digest()


_HOW_TO_MAKE_ONE = 'Make one with: python -c "import secrets; print(secrets.token_hex(32))"'
