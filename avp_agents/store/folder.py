"""The files of one namespace on disk.

    <root>/<name>-<tag>/
        lock, kv.lock
        handles/<32 hex>.handle             one stored handle; its modification time is its last use
        handles/<32 hex>.pin                that handle is pinned
        segments/<32 hex>.segment           one segment's lineage record
        segments/<32 hex>.safetensors       that segment's share of the KV-cache

Records are read without a lock, since each is whole or absent. A record whose MAC does not fit is counted, reported
and treated as absent. Names are built from ids of a checked form only, and other names found there are left alone.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from avp_agents.errors import IntegrityError
from avp_agents.store.census import Census, Removals, StoredHandle
from avp_agents.store.durable import TEMPORARY_PREFIX, locked, make_private_folder, remove, sync_folder, write_whole
from avp_agents.store.handle_record import HandleRecord, decode_handle, encode_handle
from avp_agents.store.kv_file import KvPart, Signature, read_kv, signature, write_kv
from avp_agents.store.namespace import Namespace
from avp_agents.store.segment_record import SegmentRecord, decode_segment

log = logging.getLogger(__name__)

_NAME = re.compile(r"([0-9a-f]{32})\.(handle|pin|segment|safetensors)")
_HANDLE_PREFIX = "avp:1:"


class NamespaceFolder:
    """Reads and writes one namespace's files; knows nothing of budgets and lifetimes.

    Attributes:
        integrity_failures: Records found torn or altered by this object.
    """

    def __init__(self, root: Path, namespace: Namespace) -> None:
        self.path = root / f"{namespace.name}-{namespace.tag[:8]}"
        self.integrity_failures = 0
        self._namespace = namespace
        self._handles = self.path / "handles"
        self._segments = self.path / "segments"
        self._count_lock = threading.Lock()
        self._checked_kv: dict[str, Signature] = {}
        # both follow from the id alone, so what was read once stays true whatever other processes do
        self._heads: dict[str, str] = {}
        self._parents: dict[str, str | None] = {}

    def lock(self) -> AbstractContextManager[None]:
        """Held while names in the folder are added or removed."""
        return locked(self.path / "lock")

    def kv_lock(self) -> AbstractContextManager[None]:
        """Held while KV files are written, so that this delays no lineage. Taken before `lock`, never inside it."""
        return locked(self.path / "kv.lock")

    def make(self) -> None:
        """Create the folders that are missing. Under `lock`."""
        make_private_folder(self._handles)
        make_private_folder(self._segments)

    def read_handle(self, handle_id: str) -> HandleRecord | None:
        """A handle's record."""
        data = _read(self._handle_path(handle_id))
        if data is None:
            return None
        try:
            return decode_handle(data, handle_id, self._namespace)
        except IntegrityError as error:
            self.report(f"Handle {handle_id}", error)
            return None

    def has_handle(self, handle_id: str) -> bool:
        """Whether a record of that name is there, whatever is in it."""
        return self._handle_path(handle_id).exists()

    def last_use(self, handle_id: str) -> float | None:
        """When a handle was last used, in seconds since the epoch."""
        try:
            return self._handle_path(handle_id).stat().st_mtime
        except FileNotFoundError:
            return None

    def touch(self, handle_id: str) -> bool:
        """Set a handle's last use to now. False if it is not there."""
        now = time.time_ns()
        try:
            # the kernel's own "now" is a few milliseconds coarse, which would blur the order of uses
            os.utime(self._handle_path(handle_id), ns=(now, now))
        except FileNotFoundError:
            return False
        return True

    def write_handle(self, record: HandleRecord) -> None:
        """Store a handle durably. Under `lock`, after its segments."""
        data = encode_handle(record, self._namespace)
        write_whole(self._handle_path(record.handle.id), lambda file: file.write(data))
        self.touch(record.handle.id)
        sync_folder(self._handles)

    def is_pinned(self, handle_id: str) -> bool:
        """Whether a handle is pinned."""
        return self._handle_path(handle_id, ".pin").exists()

    def set_pinned(self, handle_id: str, pinned: bool) -> None:
        """Pin or unpin a handle durably. Under `lock`."""
        path = self._handle_path(handle_id, ".pin")
        if pinned:
            path.touch(mode=0o600)
        else:
            remove(path)
        sync_folder(self._handles)

    def read_segment(self, segment_id: str) -> SegmentRecord | None:
        """A segment's record."""
        data = _read(self._segment_path(segment_id))
        if data is None:
            return None
        try:
            return decode_segment(data, segment_id, self._namespace)
        except IntegrityError as error:
            self.report(f"Segment {segment_id}", error)
            return None

    def has_segment(self, segment_id: str) -> bool:
        """Whether a record of that name is there, whatever is in it."""
        return self._segment_path(segment_id).exists()

    def write_segment(self, segment_id: str, data: bytes) -> None:
        """Store an encoded segment. Under `lock`; `sync_segments` makes it durable."""
        write_whole(self._segment_path(segment_id), lambda file: file.write(data))

    def sync_segments(self) -> None:
        """Make the names of segments and KV files durable."""
        sync_folder(self._segments)

    def read_kv(self, segment_id: str) -> KvPart | None:
        """A segment's share of the KV-cache, mapped into memory."""
        trusted = self._checked_kv.get(segment_id)
        try:
            part, found = read_kv(self._kv_path(segment_id), segment_id, self._namespace, trusted=trusted)
        except FileNotFoundError:
            return None
        except IntegrityError as error:
            self.report(f"KV-cache of segment {segment_id}", error)
            return None
        self._checked_kv[segment_id] = found
        return part

    def read_extent(self, segment_id: str) -> KvPart | None:
        """What a segment's share of the KV-cache holds. Mapping it reads no more than its header."""
        return self.read_kv(segment_id)

    def write_kv(self, segment_id: str, part: KvPart) -> None:
        """Store a segment's share of the KV-cache. Under `kv_lock`; `sync_segments` makes it durable."""
        status = write_whole(self._kv_path(segment_id), lambda file: write_kv(file, part, segment_id, self._namespace))
        self._checked_kv[segment_id] = signature(status)

    def remove_kv(self, segment_id: str) -> None:
        """Remove a KV file. Under `lock`."""
        remove(self._kv_path(segment_id))
        self._checked_kv.pop(segment_id, None)

    def remove(self, removals: Removals) -> None:
        """Remove what a census decided on. Under `lock`. No handle outlives its segments, even if this is killed."""
        for handle_id in removals.handles:
            remove(self._handle_path(handle_id, ".pin"))
            remove(self._handle_path(handle_id))
        if removals.handles:
            sync_folder(self._handles)
        for segment_id in removals.kv + removals.segments:
            self.remove_kv(segment_id)
        for segment_id in removals.segments:
            remove(self._segment_path(segment_id))
        if removals.kv or removals.segments:
            sync_folder(self._segments)

    def remove_temporaries(self) -> None:
        """Remove what killed writers left behind. Under both locks, when nobody can be writing."""
        for folder in (self._handles, self._segments):
            for entry in _entries(folder):
                if entry.name.startswith(TEMPORARY_PREFIX):
                    remove(Path(entry.path))

    def remove_everything(self) -> None:
        """Remove the whole folder: handles first, so that none outlives its segments. Under both locks."""
        for folder in (self._handles, self._segments, self.path):
            if folder.exists():
                shutil.rmtree(folder)

    def handle_ids(self) -> list[str]:
        """All handles, readable or not, in no order."""
        return [_HANDLE_PREFIX + name for name, kind, _ in _named(self._handles) if kind == "handle"]

    def census(self) -> Census:
        """All readable handles and segments. Under `lock`, else names that are just being changed may be missing."""
        files = list(_named(self._handles))
        pinned = {name for name, kind, _ in files if kind == "pin"}
        handles = {}
        for name, kind, status in files:
            if kind == "handle" and (head := self._head(_HANDLE_PREFIX + name)) is not None:
                handles[_HANDLE_PREFIX + name] = StoredHandle(head, status.st_mtime, name in pinned)
        lineage: dict[str, int] = {}
        kv: dict[str, int] = {}
        for name, kind, status in _named(self._segments):
            sizes = lineage if kind == "segment" else kv
            sizes[name] = status.st_size
        torn = [name for name in lineage if not self._knows_parent(name)]
        for name in torn:
            del lineage[name]
        return Census(handles, {name: self._parents[name] for name in lineage}, lineage, kv, torn)

    def report(self, what: str, reason: IntegrityError) -> None:
        """Count and log a record that will be treated as absent."""
        with self._count_lock:
            self.integrity_failures += 1
        log.warning("%s in %s is torn or altered (%s); it is treated as absent.", what, self.path, reason)

    def _head(self, handle_id: str) -> str | None:
        """The last segment of a handle's lineage."""
        if handle_id not in self._heads:
            record = self.read_handle(handle_id)
            if record is None:
                return None
            self._heads[handle_id] = self._namespace.segment_id(record.recipe_id)
        return self._heads[handle_id]

    def _knows_parent(self, segment_id: str) -> bool:
        """Whether a segment's record could be read; then `_parents` has the segment before it, None for a first."""
        if segment_id not in self._parents:
            record = self.read_segment(segment_id)
            if record is None:
                return False
            self._parents[segment_id] = record.parent
        return True

    def _handle_path(self, handle_id: str, suffix: str = ".handle") -> Path:
        return self._handles / (handle_id.removeprefix(_HANDLE_PREFIX) + suffix)

    def _segment_path(self, segment_id: str) -> Path:
        return self._segments / f"{segment_id}.segment"

    def _kv_path(self, segment_id: str) -> Path:
        return self._segments / f"{segment_id}.safetensors"


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


def _named(folder: Path) -> Iterator[tuple[str, str, os.stat_result]]:
    """Id, kind and status of each file that has a name of ours."""
    for entry in _entries(folder):
        if match := _NAME.fullmatch(entry.name):
            try:
                yield match[1], match[2], entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
