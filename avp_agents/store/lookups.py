"""How often a store found what it was asked for."""

from __future__ import annotations

import threading


class Lookups:
    """Counts hits and misses. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hits = self._misses = 0

    def count(self, *, hit: bool) -> None:
        """Note one."""
        with self._lock:
            self._hits += hit
            self._misses += not hit

    def counts(self) -> tuple[int, int]:
        """Hits and misses so far."""
        with self._lock:
            return self._hits, self._misses
