"""Keeps a namespace under a byte budget without listing it at each write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from avp_agents.store.census import Census, Removals

SLACK = 64
"""Other processes' writes are noticed after own writes of 1/64 of the budget; an eviction frees that much more."""


class Counted(Protocol):
    """What a budget is kept for."""

    def census(self) -> Census:
        """All that is there."""
        ...

    def remove(self, removals: Removals) -> None:
        """Remove what a census decided on."""
        ...


class ByteBudget:
    """The budget of one namespace. All methods are called under its lock.

    Attributes:
        evictions: KV files and handles removed to keep it.
    """

    def __init__(self, folder: Counted, limit: int | None) -> None:
        self.evictions = 0
        self._folder = folder
        self._limit = limit
        self._known_bytes: int | None = None
        self._written = 0

    def make_room(
        self, size: int, segment_ids: Sequence[str], *, kv_only: bool = False, spare: str | None = None
    ) -> bool:
        """Evict so that `size` more bytes fit.

        Args:
            size: Bytes about to be written.
            segment_ids: Segments that are needed together with them, so they stay.
            kv_only: Evict KV files only.
            spare: A handle that stays.

        Returns:
            False, with nothing evicted, if they cannot be made to fit.
        """
        if self._limit is None:
            return True
        if not self.must_look(size):
            self._written += size
            return True
        census = self._folder.census()
        census.want(segment_ids)
        census.release_orphans()
        if not self._shrink(census, size, kv_only=kv_only, spare=spare):
            return False
        self.apply(census)
        self._written = size
        return True

    def keep(self, census: Census) -> None:
        """Decide what must go for the budget to hold."""
        self._shrink(census, 0)

    def apply(self, census: Census) -> None:
        """Remove what a census decided on."""
        self._folder.remove(census.removals)
        self._known_bytes, self._written = census.total, 0

    def must_look(self, size: int) -> bool:
        """Whether `size` more bytes may be too many, as far as is known without listing the folder."""
        if self._limit is None or self._known_bytes is None:
            return True
        written = self._written + size
        return self._known_bytes + written > self._limit or written * SLACK > self._limit

    def _shrink(self, census: Census, size: int, *, kv_only: bool = False, spare: str | None = None) -> bool:
        """Decide what goes so that `size` more bytes fit."""
        if self._limit is None or census.total + size <= self._limit:
            return True
        slack = self._limit // SLACK
        before = len(census.removals.handles) + len(census.removals.kv)
        lacking = census.shrink(census.total + size - self._limit + slack, kv_only=kv_only, spare=spare)
        if lacking > slack:
            return False
        self.evictions += len(census.removals.handles) + len(census.removals.kv) - before
        return True
