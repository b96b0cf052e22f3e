"""Records on `Blobs`: checked when they are read, and sealed by option.

A record whose MAC does not fit is counted, reported and treated as absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from avp_agents.errors import EncryptionKeyError, IntegrityError
from avp_agents.store.blobs import Blobs, Kind
from avp_agents.store.encryption import Encryption, is_sealed, sealed_size
from avp_agents.store.namespace import Namespace

_Record = TypeVar("_Record")

HANDLE_PREFIX = "avp:1:"


class CheckedBlobs:
    """One namespace's records, by kind and id.

    Args:
        blobs: Where they lie.
        namespace: Whose key their MACs are made with.
        encryption: Seals them; None leaves them as they are.

    Attributes:
        blobs, namespace, encryption: As given.
    """

    def __init__(self, blobs: Blobs, namespace: Namespace, encryption: Encryption | None = None) -> None:
        self.blobs, self.namespace, self.encryption = blobs, namespace, encryption

    def read(
        self, kind: Kind, ids: Sequence[str], decode: Callable[[bytes, str, Namespace], _Record]
    ) -> tuple[dict[str, _Record], set[str]]:
        """Those of the ids whose record is there and authentic, and those whose record is there and is not.

        Raises:
            EncryptionKeyError: A record is sealed with a key that is not known here, or should be sealed and is not.
        """
        found: dict[str, _Record] = {}
        unreadable: set[str] = set()
        names = [name_of(kind, own_id) for own_id in ids]
        for own_id, name, data in zip(ids, names, self.blobs.read(names), strict=True):
            if data is None:
                continue
            try:
                found[own_id] = decode(self._opened(data, name), own_id, self.namespace)
            except IntegrityError as error:
                unreadable.add(own_id)
                self.blobs.report(f"{own_id} ({kind})", error)
        return found, unreadable

    def existing(self, kind: Kind, ids: Iterable[str]) -> set[str]:
        """Those of the ids that have a blob of this kind, whatever is in it."""
        names = {name_of(kind, own_id): own_id for own_id in ids}
        return {names[name] for name in self.blobs.existing(list(names))} if names else set()

    def sealed(self, data: bytes, name: str) -> bytes:
        """A record's bytes as they are stored under a name."""
        return self.encryption.seal(data, name) if self.encryption is not None else data

    def stored_size(self, size: int) -> int:
        """Bytes that `size` bytes take as they are stored."""
        return sealed_size(size) if self.encryption is not None else size

    def _opened(self, data: bytes, name: str) -> bytes:
        if self.encryption is not None:
            return bytes(self.encryption.open(data, name))
        if is_sealed(data):
            raise EncryptionKeyError(
                f"{self.blobs.place} holds encrypted data. Open it with encryption=Encryption.from_environment()."
            )
        return data


def bare(own_id: str) -> str:
    """The 32 hex digits of a handle's id, or of a segment's."""
    return own_id.removeprefix(HANDLE_PREFIX)


def name_of(kind: Kind, own_id: str) -> str:
    """The name of a record."""
    return f"{kind}/{bare(own_id)}"
