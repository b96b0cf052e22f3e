"""Contexts on disk, shared by all processes of a user.

    <root>/<name>-<tag>/
        lock, kv.lock
        handles/<32 hex>.handle             one stored handle; its modification time is its last use
        handles/<32 hex>.pin                that handle is pinned
        segments/<32 hex>.segment           one segment's record
        segments/<32 hex>.safetensors       that segment's share of the KV-cache

Files are whole or absent, so they are read without a lock; locks die with their holder. Names are built from ids of a
checked form only, and other names found there are left alone.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, ClassVar

import platformdirs
from typing_extensions import override

from avp_agents.errors import IntegrityError, StoreError
from avp_agents.store.blobs import Blobs, Kind
from avp_agents.store.checked_blobs import CheckedBlobs
from avp_agents.store.kv_file import KvPart, Signature, read_kv, signature, write_kv
from avp_agents.store.kv_shares import KvShares
from avp_agents.store.namespace import Namespace
from avp_agents.store.record_store import RecordStore

_TEMPORARY_PREFIX = ".tmp-"
_ID = re.compile(r"[0-9a-f]{32}(?:-[0-9a-f]{16})?")
_PLACES: dict[str, tuple[str, str]] = {
    "handles": ("handles", ".handle"),
    "pins": ("handles", ".pin"),
    "segments": ("segments", ".segment"),
    "kv": ("segments", ".safetensors"),
    "payloads": ("segments", ".payload"),
}


@contextmanager
def _file_errors() -> Iterator[None]:
    """Say what went wrong when the file system refuses."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"The store on disk cannot be used: {error}. Check space, permissions and path.") from error


class DiskStore(RecordStore):
    """Keeps contexts in a folder: one lineage record and one KV file per segment, shared by all that begin with it.

    A killed process leaves whole contexts or none. Several processes may use a folder at once. Reading takes no lock.
    A KV-cache that lies in one file is memory-mapped, not copied.

    Args:
        path: The folder; by default one in the user's cache folder.
        namespace, byte_budget, ttl: As for every store. The budget counts bytes of files, handles not included; other
            processes with the same budget keep to it too, to within 1/64 for each.

    Raises:
        StoreError: The folder cannot be created.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        namespace: Namespace | str = "default",
        byte_budget: int | None = None,
        ttl: float | None = None,
    ) -> None:
        self.path = Path(path) if path is not None else platformdirs.user_cache_path("avp-agents") / "contexts"
        tenant = Namespace.of(namespace)
        with _file_errors():
            make_private_folder(self.path)
        self._files = FileBlobs(self.path, tenant)
        super().__init__(
            CheckedBlobs(self._files, tenant), KvFiles(self._files, tenant), byte_budget=byte_budget, ttl=ttl
        )

    def delete_namespace(self) -> None:
        """Remove everything of this namespace, and nothing else."""
        self._files.remove_everything()


class FileBlobs(Blobs):
    """One namespace's files."""

    cheap_to_read: ClassVar[bool] = True

    def __init__(self, root: Path, namespace: Namespace) -> None:
        super().__init__(str(root))
        self.folder = root / f"{namespace.name}-{namespace.tag[:8]}"

    @override
    @_file_errors()
    def read(self, names: Sequence[str]) -> list[bytes | None]:
        return [_read(self.path(name)) for name in names]

    @override
    @_file_errors()
    def existing(self, names: Sequence[str]) -> set[str]:
        return {name for name in names if self.path(name).exists()}

    @override
    @_file_errors()
    def add(self, blobs: Mapping[str, bytes]) -> set[str]:
        added = blobs.keys() - self.existing(list(blobs))
        # segments before handles
        for are_handles in (False, True):
            self.write({n: blobs[n] for n in blobs if n in added and n.startswith("handles/") is are_handles})
        return added

    @override
    @_file_errors()
    def write(self, blobs: Mapping[str, bytes]) -> None:
        paths = {name: self.path(name) for name in blobs}
        for folder in {path.parent for path in paths.values()}:
            make_private_folder(folder)
        for name, path in paths.items():
            write_whole(path, lambda file, data=blobs[name]: file.write(data))
            kind, _, own_id = name.partition("/")
            if kind == "handles":
                self.use(own_id)
        for folder in {path.parent for path in paths.values()}:
            sync_folder(folder)

    @override
    @_file_errors()
    def remove(self, names: Sequence[str]) -> None:
        for folder, paths in groupby((self.path(name) for name in names), key=attrgetter("parent")):
            removed = [_remove(path) for path in paths]
            if any(removed):
                sync_folder(folder)

    @override
    @_file_errors()
    def sizes(self, kind: Kind) -> dict[str, int]:
        return {own_id: status.st_size for own_id, status in self._statuses(kind).items()}

    @override
    @_file_errors()
    def ids(self, kind: Kind) -> list[str]:
        return [own_id for own_id, _ in self._files_of(kind)]

    @override
    @_file_errors()
    def use(self, handle_id: str) -> None:
        now = time.time_ns()
        with suppress(FileNotFoundError):
            # the kernel's own "now" is a few milliseconds coarse, which would blur the order of uses
            os.utime(self.path(f"handles/{handle_id}"), ns=(now, now))

    @override
    @_file_errors()
    def uses(self, handle_id: str | None = None) -> dict[str, float]:
        if handle_id is None:
            return {own_id: status.st_mtime for own_id, status in self._statuses("handles").items()}
        try:
            return {handle_id: self.path(f"handles/{handle_id}").stat().st_mtime}
        except FileNotFoundError:
            return {}

    @override
    @contextmanager
    def writing(self) -> Iterator[None]:
        """One writer at a time."""
        with _file_errors(), locked(self.folder / "lock"):
            yield

    @contextmanager
    def writing_kv(self, *, wait: bool = True) -> Iterator[None]:
        """Held while KV files are written, so that this delays no lineage. Waited for outside `writing` only.

        Raises:
            BlockingIOError: Somebody else holds it, and `wait` is False.
        """
        with locked(self.folder / "kv.lock", wait=wait):
            yield

    def path(self, name: str) -> Path:
        """The file of a blob."""
        kind, _, own_id = name.partition("/")
        folder, suffix = _PLACES[kind]
        return self.folder / folder / (own_id + suffix)

    @_file_errors()
    def remove_temporaries(self) -> None:
        """Remove what killed writers left behind, if nobody can be writing. Within `removing`."""
        with suppress(BlockingIOError), self.writing_kv(wait=False):
            for folder in ("handles", "segments"):
                for entry in _entries(self.folder / folder):
                    if entry.name.startswith(_TEMPORARY_PREFIX):
                        _remove(Path(entry.path))

    @_file_errors()
    def remove_everything(self) -> None:
        """Remove the whole folder: handles first, so that none outlives its segments."""
        with self.writing_kv(), self.writing():
            for folder in (self.folder / "handles", self.folder / "segments", self.folder):
                if folder.exists():
                    shutil.rmtree(folder)

    def _files_of(self, kind: Kind) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Each file that has a name of ours, by id."""
        folder, suffix = _PLACES[kind]
        for entry in _entries(self.folder / folder):
            if entry.name.endswith(suffix) and _ID.fullmatch(own_id := entry.name.removesuffix(suffix)):
                yield own_id, entry

    def _statuses(self, kind: Kind) -> dict[str, os.stat_result]:
        statuses = {}
        for own_id, entry in self._files_of(kind):
            try:
                statuses[own_id] = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
        return statuses


class KvFiles(KvShares):
    """One namespace's KV files, mapped into memory when they are read."""

    def __init__(self, files: FileBlobs, namespace: Namespace) -> None:
        self._files, self._namespace = files, namespace
        self._checked: dict[str, Signature] = {}

    @override
    @_file_errors()
    def extents(self, segment_ids: Sequence[str]) -> dict[str, KvPart]:
        """Mapping a file reads no more than its header, if its MAC was checked before."""
        return {own: part for own in segment_ids if (part := self._read(own)) is not None}

    @override
    @_file_errors()
    def write(self, parts: Mapping[str, KvPart]) -> None:
        with self._files.writing_kv():
            folder = self._path(next(iter(parts))).parent
            make_private_folder(folder)
            before = self.extents(list(parts))
            for own, part in parts.items():
                if own not in before or not before[own].covers(part):
                    status = write_whole(
                        self._path(own), lambda file, own=own, part=part: write_kv(file, part, own, self._namespace)
                    )
                    self._checked[own] = signature(status)
            sync_folder(folder)
            with self._files.writing():
                there = self._files.existing([f"segments/{own}" for own in parts])
                self.remove([own for own in parts if f"segments/{own}" not in there])

    @override
    def sizes(self) -> dict[str, int]:
        return self._files.sizes("kv")

    @override
    def remove(self, segment_ids: Collection[str]) -> None:
        self._files.remove([f"kv/{segment_id}" for segment_id in segment_ids])
        for segment_id in segment_ids:
            self._checked.pop(segment_id, None)

    @override
    def remove_abandoned(self) -> None:
        self._files.remove_temporaries()

    def _read(self, segment_id: str) -> KvPart | None:
        trusted = self._checked.get(segment_id)
        try:
            part, found = read_kv(self._path(segment_id), segment_id, self._namespace, trusted=trusted)
        except FileNotFoundError:
            return None
        except IntegrityError as error:
            self._files.report(f"KV-cache of segment {segment_id}", error)
            return None
        self._checked[segment_id] = found
        return part

    def _path(self, segment_id: str) -> Path:
        return self._files.path(f"kv/{segment_id}")


def make_private_folder(path: Path) -> None:
    """Create a folder that only its owner can enter; its parents too, where missing."""
    if not path.is_dir():
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_folder(path.parent)
    if path.stat().st_mode & 0o077:
        path.chmod(0o700)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> os.stat_result:
    """Replace the file at `path`: whoever reads it finds the old bytes, or all that `write` wrote, never a part.

    The bytes are on the disk when this returns; the name is once the caller has called `sync_folder`.

    Returns:
        The new file's status.
    """
    temporary = path.with_name(_TEMPORARY_PREFIX + secrets.token_hex(8))
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            status = os.fstat(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return status


def sync_folder(path: Path) -> None:
    """Make names created, replaced or removed in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file at `path` against all other threads and processes. Killing the holder releases it.

    Raises:
        BlockingIOError: Somebody else holds it, and `wait` is False.
    """
    descriptor = _open_and_lock(path, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield
    finally:
        # unlocked by name: closing alone would leave it held by a child forked meanwhile
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _open_and_lock(path: Path, operation: int) -> int:
    """Open and lock `path`, again if its folder was removed while we waited."""
    while True:
        make_private_folder(path.parent)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, operation)
        except BlockingIOError:
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


def _remove(path: Path) -> bool:
    """Remove a file. False if it was not there."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []
