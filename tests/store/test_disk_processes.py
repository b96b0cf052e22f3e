"""Several processes at once on one folder, and processes that are killed while they write."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import disk_workers
import pytest

from avp_agents.errors import ContextLostError
from avp_agents.store import DiskStore

KILLS = 50


class Workers:
    """Starts workers and hears what they report."""

    def __init__(self) -> None:
        self.stored: dict[str, dict[str, str]] = {}
        self.puts: Counter[str] = Counter()
        self.started: list[int] = []
        self.ended: dict[int, int] = {}
        self._process = subprocess.Popen(
            [sys.executable, disk_workers.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._heard = threading.Condition()
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def start(self, job: str, folder: Path, seed: int) -> int:
        """Fork a worker; returns its process id once it has begun."""
        before = len(self.started)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{job} {folder} {seed}\n")
        self._process.stdin.flush()
        self._wait(lambda: len(self.started) > before)
        return self.started[before]

    def wait(self, pid: int) -> int:
        """A worker's exit status, when all that it reported was heard."""
        self._wait(lambda: pid in self.ended)
        return self.ended[pid]

    def stored_by(self, pid: int) -> dict[str, str]:
        """Handle ids and paths that a worker reported stored and did not begin to delete."""
        return self.stored.get(str(pid), {})

    def wait_for_puts(self, pid: int, count: int) -> None:
        """Until a worker has reported so many puts."""
        self._wait(lambda: self.puts[str(pid)] >= count)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._listener.join()

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._heard:
            assert self._heard.wait_for(condition, timeout=60), "a worker fell silent"

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            what, pid, *rest = line.split()
            with self._heard:
                if what == "started":
                    self.started.append(int(pid))
                elif what == "ended":
                    self.ended[int(pid)] = int(rest[0])
                elif what == "stored":
                    self.stored.setdefault(pid, {})[rest[0]] = rest[1]
                    self.puts[pid] += 1
                else:
                    self.stored[pid].pop(rest[0], None)
                self._heard.notify_all()


class Reader:
    """Reads all that is there, over and over, and checks every bit of it."""

    def __init__(self, folder: Path) -> None:
        self.store = DiskStore(folder, namespace=disk_workers.TENANT)
        self.reads = 0
        self.error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                for handle in self.store.list():
                    self._read(handle.id, handle.text)
                self._stop.wait(0.01)
        except Exception as error:
            self.error = error

    def _read(self, handle_id: str, path: str) -> None:
        try:
            found = self.store.get(handle_id)
        except ContextLostError:
            return
        disk_workers.check(found, path)
        self.reads += 1


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    workers.close()


def test_a_killed_writer_tears_nothing_and_loses_nothing(workers: Workers, tmp_path: Path) -> None:
    """50 writers are killed at random moments. Readers see whole contexts only; what was reported stored is there."""
    numbers = random.Random(7)
    store = DiskStore(tmp_path, namespace=disk_workers.TENANT)
    reader = Reader(tmp_path)
    pids = []
    for kill in range(KILLS):
        pid = workers.start("write", tmp_path, kill)
        pids.append(pid)
        workers.wait_for_puts(pid, kill % 2)
        time.sleep(numbers.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert workers.wait(pid) == signal.SIGKILL, "the writer ended before it was killed"
        for handle_id, path in workers.stored_by(pid).items():
            disk_workers.check(store.get(handle_id, scope=str(pid)), path, whole_kv=True)
    reader.stop()

    assert reader.error is None
    assert reader.reads > 0
    assert sum(workers.puts[str(pid)] for pid in pids) >= KILLS // 2
    store.prune()
    for pid in pids:
        for handle_id, path in workers.stored_by(pid).items():
            disk_workers.check(store.get(handle_id, scope=str(pid)), path, whole_kv=True)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".tmp-")]
    assert store.stats().integrity_failures == reader.store.stats().integrity_failures == 0


def test_processes_share_segments_without_losing_each_other_s(workers: Workers, tmp_path: Path) -> None:
    """Four processes put, drop and delete contexts with common prefixes; each keeps just what it did not delete."""
    reader = Reader(tmp_path)
    pids = [workers.start("churn", tmp_path, seed) for seed in range(4)]
    statuses = [workers.wait(pid) for pid in pids]
    reader.stop()

    assert reader.error is None
    assert statuses == [0, 0, 0, 0]
    store = DiskStore(tmp_path, namespace=disk_workers.TENANT)
    kept = {handle_id: path for pid in pids for handle_id, path in workers.stored_by(pid).items()}
    assert sorted(handle.id for handle in store.list()) == sorted(kept)
    for handle_id, path in kept.items():
        disk_workers.check(store.get(handle_id), path)
    assert store.prune().segments == 0
    for handle in store.list():
        store.delete(handle)
    assert [path for path in tmp_path.rglob("*.*") if path.suffix != ".lock"] == []
