"""What a caller waits for: a request that was built, is started, and then tells what happens to it.

    work = engine's builder(...)        checked, not started
    wait(work), await_result(work)      start it, and take the one result
    ChunkStream(work), achunks(work)    start it, and take pieces as they come

Whoever gives up (an exception, a closed or dropped stream, a cancelled task) cancels the work.
"""

from __future__ import annotations

import asyncio
import queue
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Generic, Self, TypeVar

from avp_agents.answer.generation import Chunk
from avp_agents.context import Context
from avp_agents.tracing import Operation
from avp_agents.usage import Handoff, Usage

T = TypeVar("T")


class Events(Generic[T]):
    """A queue from an engine's thread to its caller, who waits in a thread or on an event loop."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        self._tell: Callable[[], None] | None = None

    def put(self, event: T | BaseException) -> None:
        """Called from the engine's thread."""
        self._queue.put(event)
        if (tell := self._tell) is not None:
            tell()

    def get(self) -> T:
        """The next event; raises it if it is an error."""
        return _unless_error(self._queue.get())

    async def aget(self) -> T:
        """`get` without blocking the loop."""
        loop = asyncio.get_running_loop()
        while True:
            arrived = asyncio.Event()

            def tell(arrived: asyncio.Event = arrived) -> None:
                if not loop.is_closed():  # a loop that was closed no longer listens
                    loop.call_soon_threadsafe(arrived.set)

            self._tell = tell
            try:
                return _unless_error(self._queue.get_nowait())
            except queue.Empty:
                await arrived.wait()


class Work(ABC, Generic[T]):
    """A request of a caller.

    Attributes:
        events: What came of it: the context; or chunks, the last of which has the generation; or an error.
    """

    def __init__(self, events: Events[T]) -> None:
        self.events = events

    @abstractmethod
    def start(self) -> None:
        """Hand it to the engine.

        Raises:
            EngineBusyError, EngineClosedError, KvMemoryError
        """

    @abstractmethod
    def cancel(self) -> None:
        """Let it end; what has ended already is left alone."""


def wait(work: Work[Context], operation: Operation) -> Context:
    """Run work and wait for the context that it ends with; an interrupt cancels it."""
    work.start()
    try:
        return _noted(work.events.get(), operation)
    finally:
        work.cancel()


async def await_result(work: Work[Context], operation: Operation) -> Context:
    """`wait` without blocking the loop; cancelling the task cancels the work."""
    work.start()
    try:
        return _noted(await work.events.aget(), operation)
    finally:
        work.cancel()


class ChunkStream(Iterator[Chunk]):
    """The chunks of one answer. Closing or dropping it ends the request."""

    def __init__(self, work: Work[Chunk], operation: Operation) -> None:
        self._events, self._operation = work.events, operation
        self._ended = False
        work.start()
        self._give_up = weakref.finalize(self, _leave, work, operation)
        self._give_up.atexit = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        if self._ended or not self._give_up.alive:
            raise StopIteration
        try:
            chunk = _noted_chunk(self._events.get(), self._operation)
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


async def achunks(work: Work[Chunk], operation: Operation) -> AsyncGenerator[Chunk, None]:
    """`ChunkStream` on an event loop; closing the generator or cancelling its task ends the request."""
    work.start()
    try:
        while True:
            chunk = _noted_chunk(await work.events.aget(), operation)
            yield chunk
            if chunk.generation is not None:
                return
    finally:
        work.cancel()


def _leave(work: Work[Chunk], operation: Operation) -> None:
    work.cancel()
    operation.end()


def _unless_error(event: T | BaseException) -> T:
    if isinstance(event, BaseException):
        raise event
    return event


def _noted(context: Context, operation: Operation) -> Context:
    operation.result(context.usage or Usage(), context.handoff or Handoff())
    return context


def _noted_chunk(chunk: Chunk, operation: Operation) -> Chunk:
    if (generation := chunk.generation) is not None:
        operation.result(generation.usage, generation.handoff, generation.finish_reason)
    return chunk
