"""The waiting room: a bounded queue that takes from its sources in turn, so that nobody starves."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from avp_agents.engine.core.sequence import Sequence
from avp_agents.errors import EngineBusyError


class AdmissionQueue:
    """First come, first served within a source; round robin between sources. Not thread-safe by itself.

    Args:
        limit: Most sequences that may wait.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_source: OrderedDict[str, deque[Sequence]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(waiting) for waiting in self._by_source.values())

    def __iter__(self) -> Iterator[Sequence]:
        for waiting in self._by_source.values():
            yield from waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind those of its source.

        Raises:
            EngineBusyError: The queue is full.
        """
        if len(self) >= self._limit:
            raise EngineBusyError(
                f"{self._limit} requests are waiting already; try again later, or raise max_queue (or max_batch)."
            )
        self._by_source.setdefault(sequence.request.source, deque()).append(sequence)

    def peek(self) -> Sequence | None:
        """The sequence whose turn it is."""
        return next(iter(self), None)

    def pop(self) -> Sequence:
        """Take that sequence; its source goes to the back of the line."""
        source, waiting = self._by_source.popitem(last=False)
        sequence = waiting.popleft()
        if waiting:
            self._by_source[source] = waiting
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence that gave up."""
        source = sequence.request.source
        self._by_source[source].remove(sequence)
        if not self._by_source[source]:
            del self._by_source[source]
