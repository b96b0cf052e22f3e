"""Namespaces: one per tenant, each with a key of its own.

Every id and every integrity check of a store is keyed, so nothing is shared, found or accepted across namespaces. The
key comes from the environment variable `AVP_STORE_KEY`, else from a file in the user's configuration folder that is
created at first use. It never lies beside the data. All workers that share a store need the same key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import platformdirs

from avp_agents.errors import ConfigurationError, IntegrityError, NamespaceKeyError

KEY_VARIABLE = "AVP_STORE_KEY"
MAC_BYTES = 32
_KEY_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HEX = re.compile(r"[0-9a-fA-F]+")


@dataclass(frozen=True)
class Namespace:
    """A tenant's name and key.

    Attributes:
        name: 1 to 64 letters, digits, ``.``, ``_`` or ``-``; starts with a letter or digit.
        key: At least 32 bytes; never shown.

    Raises:
        ConfigurationError: The name is not of that form.
        NamespaceKeyError: The key is too short.
    """

    name: str
    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigurationError(
                f"Namespace {self.name!r}: use 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first."
            )
        if len(self.key) < _KEY_BYTES:
            raise NamespaceKeyError(f"The key of namespace {self.name!r} needs at least {_KEY_BYTES} bytes.")

    @classmethod
    def load(cls, name: str = "default") -> Self:
        """The namespace `name`, its key derived from `AVP_STORE_KEY` or from the user's key file.

        Raises:
            ConfigurationError: The name is malformed.
            NamespaceKeyError: The key is malformed, too short, unreadable, or readable by other users.
        """
        text = os.environ.get(KEY_VARIABLE)
        master = parse_key(text, source=KEY_VARIABLE) if text else _key_from_file(_key_path())
        return cls(name, _keyed(master, b"avp-namespace", name.encode()).digest())

    @classmethod
    def of(cls, namespace: Namespace | str) -> Namespace:
        """A namespace as it is, or the one of a name, as `load` makes it."""
        return namespace if isinstance(namespace, Namespace) else cls.load(namespace)

    @property
    def tag(self) -> str:
        """16 hex digits that two namespaces share only if they have the same name and key. Reveals neither."""
        return self._keyed(b"avp-tag").hexdigest()[:16]

    def handle_id(self, recipe_id: str, scope: str) -> str:
        """The handle id of a recipe in a scope: ``"avp:1:"`` and 32 hex digits."""
        return "avp:1:" + self._keyed(b"avp-handle", recipe_id.encode(), scope.encode()).hexdigest()[:32]

    def segment_id(self, recipe_id: str) -> str:
        """The 32 hex digits that name the record of a recipe's last segment."""
        return self._keyed(b"avp-segment", recipe_id.encode()).hexdigest()[:32]

    def segment_ids(self, recipe_ids: Iterable[str]) -> list[str]:
        """The names of the records of a lineage's segments."""
        return [self.segment_id(recipe_id) for recipe_id in recipe_ids]

    def is_of(self, handle_id: str, recipe_id: str, scope: str | None) -> bool:
        """Whether a handle of a recipe was minted for `scope`; None asks no question."""
        return scope is None or self.handle_id(recipe_id, scope) == handle_id

    def mac(self, label: str) -> hashlib.blake2b:
        """A running MAC for the record called `label`; feed it the content, its digest has `MAC_BYTES` bytes."""
        return self._keyed(b"avp-mac", label.encode())

    def signed(self, content: bytes, label: str) -> bytes:
        """The content of the record called `label`, and its MAC."""
        return content + self._mac_of(content, label)

    def verified(self, data: bytes, label: str) -> bytes:
        """The content of what `signed` made.

        Raises:
            IntegrityError: The bytes are torn, altered, or another record's.
        """
        content, mac = data[:-MAC_BYTES], data[-MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac_of(content, label)):
            raise IntegrityError("MAC mismatch")
        return content

    def _mac_of(self, content: bytes, label: str) -> bytes:
        mac = self.mac(label)
        mac.update(content)
        return mac.digest()

    def _keyed(self, purpose: bytes, *parts: bytes) -> hashlib.blake2b:
        return _keyed(self.key, purpose, self.name.encode(), *parts)


def _keyed(key: bytes, purpose: bytes, *parts: bytes) -> hashlib.blake2b:
    """A hash keyed for one purpose, fed with parts that cannot run into each other."""
    derived = hashlib.blake2b(key, digest_size=64, person=purpose).digest()
    digest = hashlib.blake2b(key=derived, digest_size=MAC_BYTES, person=purpose)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest


def parse_key(text: str, *, source: str) -> bytes:
    """A key written as hex digits or base64 (either alphabet).

    Raises:
        NamespaceKeyError: It is neither, or too short. `source` says where it came from.
    """
    text = text.strip()
    try:
        if _HEX.fullmatch(text) and len(text) % 2 == 0:
            key = bytes.fromhex(text)
        else:
            padded = text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4)
            key = base64.b64decode(padded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise NamespaceKeyError(f"{source} is neither hex nor base64. {_HOW_TO_MAKE_ONE}") from error
    if len(key) < _KEY_BYTES:
        raise NamespaceKeyError(
            f"{source} holds {len(key)} bytes, at least {_KEY_BYTES} are needed. {_HOW_TO_MAKE_ONE}"
        )
    return key


_HOW_TO_MAKE_ONE = 'Make one with: python -c "import secrets; print(secrets.token_hex(32))"'


def _key_path() -> Path:
    return platformdirs.user_config_path("avp-agents") / "store.key"


def _key_from_file(path: Path) -> bytes:
    """The key in `path`, which is created if there is none yet."""
    try:
        if not path.exists():
            _create_key_file(path)
        mode = path.stat().st_mode
        if mode & 0o077:
            raise NamespaceKeyError(
                f"{path} can be read or written by other users (mode {mode & 0o777:03o}). Run: chmod 600 '{path}'. "
                f"If others may have seen it, delete it: a new key is made, and contexts stored under the old are lost."
            )
        return parse_key(path.read_text(encoding="ascii"), source=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise NamespaceKeyError(f"Cannot use the key file {path}: {error}. Or set {KEY_VARIABLE}.") from error


def _create_key_file(path: Path) -> None:
    """Write a new key; of several processes that race, the first one's key stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(_KEY_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink()
