"""Uploads that have not ended: where their bytes are, and for how long they may rest."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from avp_agents.errors import LimitExceededError, TransportError
from avp_agents.transport.problems import Refusal
from avp_agents.transport.server.limits import ServerLimits


@dataclass
class Upload:
    """A frame that is arriving.

    Attributes:
        id: What its client knows it by.
        namespace: Whose it is.
        size: Bytes that it will have.
        path: The file that they are written to.
        offset: Bytes that have arrived.
        last_use: When the last of them did, on `time.monotonic`'s clock.
    """

    namespace: str
    size: int
    path: Path
    id: str = field(default_factory=lambda: secrets.token_urlsafe(18))
    offset: int = 0
    last_use: float = field(default_factory=time.monotonic)
    busy: bool = False

    @property
    def complete(self) -> bool:
        """Whether all bytes have arrived."""
        return self.offset == self.size

    def append(self, data: bytes) -> None:
        """Take in the next bytes."""
        with self.path.open("ab") as file:
            file.write(data)
        self.offset += len(data)
        self.last_use = time.monotonic()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """One piece at a time.

        Raises:
            Refusal: 409.
        """
        if self.busy:
            raise Refusal(409, TransportError("Another piece of this upload is arriving."))
        self.busy = True
        try:
            yield
        finally:
            self.busy, self.last_use = False, time.monotonic()


class Uploads:
    """All of them, with their files in a private folder. Used on the event loop only.

    Args:
        limits: See there.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._folder = Path(tempfile.mkdtemp(prefix="avp-uploads-"))
        self._uploads: dict[str, Upload] = {}

    def __len__(self) -> int:
        return len(self._uploads)

    def begin(self, namespace: str, size: int) -> Upload:
        """A new upload.

        Raises:
            Refusal: 429, the namespace has too many.
        """
        self.drop_stale()
        if sum(upload.namespace == namespace for upload in self._uploads.values()) >= self._limits.uploads:
            error = LimitExceededError(f"{self._limits.uploads} uploads are unfinished already; end or abandon one.")
            raise Refusal(429, error, headers={"retry-after": str(round(self._limits.upload_seconds))})
        upload = Upload(namespace, size, self._folder / secrets.token_hex(8))
        upload.path.touch(0o600)
        self._uploads[upload.id] = upload
        return upload

    def find(self, upload_id: str, namespace: str) -> Upload:
        """An upload of this namespace.

        Raises:
            Refusal: 404.
        """
        self.drop_stale()
        upload = self._uploads.get(upload_id)
        if upload is None or upload.namespace != namespace:
            raise Refusal(404, TransportError("There is no such upload, or it rested for too long. Begin again."))
        return upload

    def end(self, upload: Upload) -> None:
        """Forget an upload and its file."""
        self._uploads.pop(upload.id, None)
        upload.path.unlink(missing_ok=True)

    def drop_stale(self) -> None:
        """End those that rested for too long."""
        latest = time.monotonic() - self._limits.upload_seconds
        for upload in list(self._uploads.values()):
            if not upload.busy and upload.last_use < latest:
                self.end(upload)

    def close(self) -> None:
        """Forget all, and remove the folder."""
        self._uploads.clear()
        shutil.rmtree(self._folder, ignore_errors=True)
