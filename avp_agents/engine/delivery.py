"""How events get from the scheduler's thread to callers: blocking or on an event loop, and what giving up does."""

from __future__ import annotations

import asyncio
import queue
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Protocol, Self, TypeVar

from avp_agents.answer.generation import Chunk
from avp_agents.context import Context
from avp_agents.engine.core.request import Event
from avp_agents.tracing import Operation
from avp_agents.usage import Handoff, Usage

_Sequence = TypeVar("_Sequence")
_Accepted = TypeVar("_Accepted", contravariant=True)

MakeSequence = Callable[[Callable[[Event], None]], _Sequence]
"""Builds a sequence that delivers its events to the given function."""


class Queue(Protocol[_Accepted]):
    """What runs sequences: a `Scheduler`, or another engine's worker."""

    def submit(self, work: _Accepted, /) -> None:
        """Queue a sequence."""
        ...

    def cancel(self, work: _Accepted, /) -> None:
        """Let a sequence end."""
        ...


def wait_for_context(scheduler: Queue[_Sequence], make: MakeSequence[_Sequence], operation: Operation) -> Context:
    """Submit a sequence and wait for the context that it ends with; an interrupt cancels it."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with operation:
        sequence = make(events.put)
        scheduler.submit(sequence)
        try:
            return _context(events.get(), operation)
        finally:
            scheduler.cancel(sequence)


async def await_context(scheduler: Queue[_Sequence], make: MakeSequence[_Sequence], operation: Operation) -> Context:
    """`wait_for_context` without blocking the loop; cancelling the task cancels the sequence."""
    events = _LoopEvents()
    with operation:
        sequence = await asyncio.to_thread(make, events.put)
        scheduler.submit(sequence)
        try:
            return _context(await events.get(), operation)
        finally:
            scheduler.cancel(sequence)


class ChunkStream(Iterator[Chunk]):
    """The chunks of one answer. Closing or dropping it ends the request."""

    def __init__(self, scheduler: Queue[_Sequence], make: MakeSequence[_Sequence], operation: Operation) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._ended = False
        self._operation = operation
        try:
            sequence = make(self._events.put)
            scheduler.submit(sequence)
        except BaseException as error:
            operation.fail(error)
            raise
        self._give_up = weakref.finalize(self, _leave, scheduler, sequence, operation)
        self._give_up.atexit = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        if self._ended or not self._give_up.alive:
            raise StopIteration
        try:
            chunk = _chunk(self._events.get(), self._operation)
        except BaseException as error:
            self._operation.fail(error)
            self.close()
            raise
        self._ended = chunk.generation is not None
        if self._ended:
            self._operation.end()
        return chunk

    def close(self) -> None:
        """End the request; no chunk follows."""
        self._give_up()


async def stream_chunks(
    scheduler: Queue[_Sequence], make: MakeSequence[_Sequence], operation: Operation
) -> AsyncGenerator[Chunk, None]:
    """`ChunkStream` on an event loop; closing the generator or cancelling its task ends the request."""
    events = _LoopEvents()
    with operation:
        sequence = await asyncio.to_thread(make, events.put)
        scheduler.submit(sequence)
        try:
            while True:
                chunk = _chunk(await events.get(), operation)
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


def _leave(scheduler: Queue[_Sequence], sequence: _Sequence, operation: Operation) -> None:
    scheduler.cancel(sequence)
    operation.end()


def _context(event: Event, operation: Operation) -> Context:
    if isinstance(event, BaseException):
        raise event
    assert isinstance(event, Context)
    operation.result(event.usage or Usage(), event.handoff or Handoff())
    return event


def _chunk(event: Event, operation: Operation) -> Chunk:
    if isinstance(event, BaseException):
        raise event
    assert isinstance(event, Chunk)
    if event.generation is not None:
        operation.result(event.generation.usage, event.generation.handoff, event.generation.finish_reason)
    return event
