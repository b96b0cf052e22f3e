"""Files that are whole or absent, folders that only their owner can read, locks that die with their holder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY_PREFIX = ".tmp-"


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
    temporary = path.with_name(TEMPORARY_PREFIX + secrets.token_hex(8))
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


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path` against all other threads and processes. Killing the holder releases it."""
    descriptor = _open_and_lock(path)
    try:
        yield
    finally:
        # unlocked by name: closing alone would leave it held by a child forked meanwhile
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _open_and_lock(path: Path) -> int:
    """Open and lock `path`, again if its folder was removed while we waited."""
    while True:
        make_private_folder(path.parent)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


def remove(path: Path) -> bool:
    """Remove a file. False if it was not there."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True
