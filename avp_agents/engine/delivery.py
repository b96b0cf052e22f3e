"""How events get from the scheduler's thread to callers: blocking or on an event loop, and what giving up does."""

from __future__ import annotations

import asyncio
import queue
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Self

from avp_agents.context import Context
from avp_agents.engine.base import Chunk
from avp_agents.engine.scheduler import Scheduler
from avp_agents.engine.sequence import Event, Sequence

MakeSequence = Callable[[Callable[[Event], None]], Sequence]
"""Builds a sequence that delivers its events to the given function."""


def wait_for_context(scheduler: Scheduler, make: MakeSequence) -> Context:
    """Submit a sequence and wait for the context that it ends with; an interrupt cancels it."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    sequence = make(events.put)
    scheduler.submit(sequence)
    try:
        return _context(events.get())
    finally:
        scheduler.cancel(sequence)


async def await_context(scheduler: Scheduler, make: MakeSequence) -> Context:
    """`wait_for_context` without blocking the loop; cancelling the task cancels the sequence."""
    events = _LoopEvents()
    sequence = await asyncio.to_thread(make, events.put)
    scheduler.submit(sequence)
    try:
        return _context(await events.get())
    finally:
        scheduler.cancel(sequence)


class ChunkStream(Iterator[Chunk]):
    """The chunks of one answer. Closing or dropping it ends the request."""

    def __init__(self, scheduler: Scheduler, make: MakeSequence) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._ended = False
        sequence = make(self._events.put)
        scheduler.submit(sequence)
        self._give_up = weakref.finalize(self, scheduler.cancel, sequence)
        self._give_up.atexit = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        if self._ended or not self._give_up.alive:
            raise StopIteration
        try:
            chunk = _chunk(self._events.get())
        except BaseException:
            self.close()
            raise
        self._ended = chunk.generation is not None
        return chunk

    def close(self) -> None:
        """End the request; no chunk follows."""
        self._give_up()


async def stream_chunks(scheduler: Scheduler, make: MakeSequence) -> AsyncGenerator[Chunk, None]:
    """`ChunkStream` on an event loop; closing the generator or cancelling its task ends the request."""
    events = _LoopEvents()
    sequence = await asyncio.to_thread(make, events.put)
    scheduler.submit(sequence)
    try:
        while True:
            chunk = _chunk(await events.get())
            yield chunk
            if chunk.generation is not None:
                return
    finally:
        scheduler.cancel(sequence)


class _LoopEvents:
    """A queue that the scheduler's thread fills and an event loop reads."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """Called from the scheduler's thread; a loop that was closed no longer listens."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def get(self) -> Event:
        """The next event."""
        return await self._queue.get()


def _context(event: Event) -> Context:
    if isinstance(event, BaseException):
        raise event
    assert isinstance(event, Context)
    return event


def _chunk(event: Event) -> Chunk:
    if isinstance(event, BaseException):
        raise event
    assert isinstance(event, Chunk)
    return event
