"""The thread with the event loop on which vLLM is spoken to. Callers, synchronous or not, submit requests to it."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from contextlib import aclosing

from typing_extensions import override

from avp_agents.engine.verbs import Work
from avp_agents.errors import (
    AvpError,
    EngineClosedError,
    EngineError,
    RequestCancelledError,
    RequestTimeoutError,
    TransportError,
)
from avp_agents.vllm.answer import T, VllmRequest
from avp_agents.vllm.backend import Backend, Facts

log = logging.getLogger(__name__)


class Sent(Work[T]):
    """A request as the work of a `Worker`."""

    def __init__(self, worker: Worker, request: VllmRequest[T]) -> None:
        super().__init__(request.events)
        self._worker, self._request = worker, request

    @override
    def start(self) -> None:
        self._worker.submit(self._request)

    @override
    def cancel(self) -> None:
        self._worker.cancel(self._request)


class Worker:
    """Runs requests, all of them at once; vLLM batches them.

    Args:
        backend: vLLM.

    Attributes:
        facts: How vLLM was set up.

    Raises:
        AvpError: vLLM could not be started or reached.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._closing = False
        self._tasks: dict[object, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._live, name="avp-vllm", daemon=True)
        self._thread.start()
        try:
            self.facts: Facts = asyncio.run_coroutine_threadsafe(backend.start(), self._loop).result()
        except BaseException:
            self._stop()
            raise

    def submit(self, work: VllmRequest[T]) -> None:
        """Send a request; its events reach ``work.events``.

        Raises:
            EngineClosedError: The engine was closed, or lives in the parent process.
        """
        if os.getpid() != self._process:
            raise EngineClosedError("This engine belongs to the parent process; create one after the fork.")
        with self._lock:
            if self._closing:
                raise EngineClosedError("The engine was closed.")
            self._loop.call_soon_threadsafe(self._begin, work)

    def cancel(self, work: VllmRequest[T]) -> None:
        """Abort a request in vLLM; one that has ended already is left alone."""
        with self._lock:
            if not self._closing and os.getpid() == self._process:
                self._loop.call_soon_threadsafe(self._cancel, work)

    def close(self) -> None:
        """Stop vLLM; requests that run end with `EngineClosedError`."""
        with self._lock:
            if self._closing or os.getpid() != self._process:
                return
            self._closing = True
        ending = asyncio.run_coroutine_threadsafe(self._end_all(), self._loop)
        if threading.current_thread() is self._thread:
            # the engine was garbage, and was found here
            ending.add_done_callback(lambda _: self._loop.stop())
            return
        ending.result()
        self._stop()

    def _begin(self, work: VllmRequest[T]) -> None:
        task = self._loop.create_task(self._run(work))
        self._tasks[work] = task
        task.add_done_callback(lambda _: self._tasks.pop(work, None))

    def _cancel(self, work: VllmRequest[T]) -> None:
        if (task := self._tasks.get(work)) is not None:
            task.cancel()

    async def _run(self, work: VllmRequest[T]) -> None:
        try:
            async with asyncio.timeout(work.order.timeout):
                await self._decode(work)
            work.events.put(work.end())
            return
        except asyncio.CancelledError:
            closed = EngineClosedError("The engine was closed before this request finished.")
            event = closed if self._closing else RequestCancelledError("The request was cancelled.")
        except AvpError as error:
            event = error
        except TimeoutError as error:
            limit = work.order.timeout
            late = (
                f"vLLM took too long: {error}" if limit is None else f"The request did not finish within {limit:.3g} s."
            )
            event = RequestTimeoutError(late)
        except Exception as error:
            log.exception("A request to vLLM failed")
            event = EngineError(f"The request to vLLM failed: {type(error).__name__}: {error}")
        work.events.put(event)

    async def _decode(self, work: VllmRequest[T]) -> None:
        finished = False
        async with aclosing(self._backend.decode(work.prompt, work.decoding)) as steps:
            async for step in steps:
                work.note(step)
                for token in step.tokens:
                    if not work.done:
                        work.accept(token)
                finished = finished or step.finished
                if work.done and not finished:
                    break  # a stop string, or a grammar's end: vLLM would go on
        if not finished and not work.done:
            raise TransportError("The answer ended early: vLLM closed the stream.")
        if not work.done:
            work.close()

    async def _end_all(self) -> None:
        running = list(self._tasks.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._backend.close()

    def _live(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
