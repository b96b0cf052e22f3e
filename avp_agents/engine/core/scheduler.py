"""The scheduler: one thread that owns the model and batches whatever its callers submit.

Each round it admits waiting sequences, composes one batch of pieces (a chunk of a prompt, a latent step, a decode
step, mixed), runs it, and lets every sequence make of the output what it needs.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from avp_agents.engine.core.forward import ModelRunner, PieceOutput
from avp_agents.engine.core.sequence import Decoding, Ended, Extra, Sequence, Thinking, take_latents, take_tokens
from avp_agents.engine.core.start import FindStart, longest_match, place
from avp_agents.errors import (
    AvpError,
    EngineBusyError,
    EngineClosedError,
    EngineError,
    KvMemoryError,
    RequestCancelledError,
    RequestTimeoutError,
)

log = logging.getLogger(__name__)

PREFILL_BUDGET = 512
"""Most prompt positions per round, so that long prompts do not stall decoding."""


@dataclass(frozen=True)
class EngineStats:
    """What the engine is doing.

    Attributes:
        kv_positions_used: Positions of the KV pool in regions, cached contexts included.
        kv_positions_total: Positions of the pool.
        kv_bytes_per_position: Bytes of keys and values per position.
        running: Sequences in the batch.
        waiting: Sequences in the queue.
        steps: Forward rounds since the start.
    """

    kv_positions_used: int
    kv_positions_total: int
    kv_bytes_per_position: int
    running: int
    waiting: int
    steps: int


@dataclass(frozen=True)
class Model:
    """What the scheduler's thread runs.

    Attributes:
        runner: The model on its KV pool.
        splices: What a sequence with splices needs (`Request.extras`).
        extras: What every sequence needs, in an engine that asks for more than usual.
        find_start: Which KV-cache a sequence starts from.
        prefill_chunk: Every prompt runs in chunks of so many positions; None shares `PREFILL_BUDGET` among all.
    """

    runner: ModelRunner
    splices: Extra
    extras: tuple[Extra, ...] = ()
    find_start: FindStart = longest_match
    prefill_chunk: int | None = None


class Scheduler:
    """Owns the model's thread.

    Args:
        load: Loads the model; runs on the model's thread. torch keeps a pool of worker threads for every thread that
            computes, and slows all of them down where they are more than the cores: nobody else should compute.
        max_batch: Most sequences that run at once.
        max_queue: Most that wait.

    Raises:
        AvpError: Whatever `load` raises.
    """

    def __init__(self, load: Callable[[], Model], *, max_batch: int, max_queue: int) -> None:
        self._max_batch = max_batch
        self._queue = AdmissionQueue(max_queue)
        self._running: list[Sequence] = []
        self._wake = threading.Condition()
        self._closing = False
        self._steps = 0
        self._process = os.getpid()
        ready: Future[Model] = Future()
        self._thread = threading.Thread(target=self._live, args=(load, ready), name="avp-scheduler", daemon=True)
        self._thread.start()
        ready.result()

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence; `Sequence.ended` is called when it is done.

        Raises:
            EngineBusyError: The queue is full.
            EngineClosedError: The engine was closed, or lives in the parent process.
            KvMemoryError: The pool can never hold it.
        """
        if os.getpid() != self._process:
            raise EngineClosedError("This engine belongs to the parent process; create one after the fork.")
        if sequence.capacity > self.pool.positions:
            raise KvMemoryError(
                f"The request needs {sequence.capacity} positions of KV-cache, the whole pool has "
                f"{self.pool.positions}. Raise kv_pool_bytes, or lower max_tokens or the prompt's length."
            )
        with self._wake:
            if self._closing:
                raise EngineClosedError("The engine was closed.")
            self._queue.add(sequence)
            self._wake.notify()

    def cancel(self, sequence: Sequence) -> None:
        """Let a sequence end at the next step; one that has ended already is left alone."""
        sequence.request.cancelled = True
        with self._wake:
            self._wake.notify()

    def stats(self) -> EngineStats:
        """What is going on now."""
        with self._wake:
            running, waiting = len(self._running), len(self._queue)
        pool = self.pool
        return EngineStats(pool.used, pool.positions, pool.bytes_per_position, running, waiting, self._steps)

    def close(self) -> None:
        """Stop the thread; what runs or waits ends with `EngineClosedError`."""
        if os.getpid() != self._process:
            return
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _live(self, load: Callable[[], Model], ready: Future[Model]) -> None:
        """The thread's life: load, then run rounds until closed."""
        try:
            model = load()
        except BaseException as error:
            ready.set_exception(error)
            return
        self.model, self.runner, self.pool = model, model.runner, model.runner.pool
        ready.set_result(model)
        with torch.inference_mode():
            while self._wait_for_work():
                self._drop_ended()
                self._admit()
                if self._running:
                    self._round()
        closed = EngineClosedError("The engine was closed before this request finished.")
        with self._wake:
            left = [*self._running, *self._queue]
        for sequence in left:
            self._end(sequence, closed)

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not self._closing and not self._running and not len(self._queue):
                self._wake.wait()
            return not self._closing

    def _drop_ended(self) -> None:
        """End what was cancelled or has run out of time, running or waiting."""
        now = time.monotonic()
        with self._wake:
            candidates = [*self._running, *self._queue]
        for sequence in candidates:
            request = sequence.request
            if request.cancelled:
                self._end(sequence, RequestCancelledError("The request was cancelled."))
            elif request.deadline is not None and now > request.deadline:
                allowed = request.deadline - request.submitted
                self._end(sequence, RequestTimeoutError(f"The request did not finish within {allowed:.3g} s."))

    def _admit(self) -> None:
        while len(self._running) < self._max_batch:
            with self._wake:
                sequence = self._queue.peek()
            if sequence is None:
                return
            try:
                for extra in sequence.request.extras:
                    extra.admitting(sequence)
                placed = place(sequence, self.pool, self.model.find_start)
            except AvpError as error:
                self._end(sequence, error)
                continue
            if placed is None:
                return
            with self._wake:
                self._queue.pop()
                self._running.append(sequence)
            sequence.admit(*placed)

    def _round(self) -> None:
        """One forward pass for everybody who fits."""
        sequences = list(self._running)
        try:
            for sequence in sequences:
                for extra in sequence.request.extras:
                    extra.before_round(sequence)
            chosen = self._choose()
            sequences = [sequence for sequence, _ in chosen]
            pieces = [sequence.next_piece(budget) for sequence, budget in chosen]
            outputs = self.model.runner.run(pieces)
            for sequence, piece in zip(sequences, pieces, strict=True):
                sequence.fed(piece.count)
                for extra in sequence.request.extras:
                    extra.after_fed(sequence, piece)
            self._steps += 1
            for sequence, error in self._take(sequences, outputs):
                self._end(sequence, error)
        except Exception as error:
            self._fail_batch(sequences, error)

    def _choose(self) -> list[tuple[Sequence, int]]:
        """All sequences past their prefill, and prefilling ones within the budget, with their share of it."""
        chunk = self.model.prefill_chunk
        budget = PREFILL_BUDGET if chunk is None else sys.maxsize
        chosen: list[tuple[Sequence, int]] = []
        for sequence in self._running:
            if not sequence.prefilling:
                chosen.append((sequence, 1))
            elif budget > 0:
                count = min(budget, chunk or budget, sequence.total - sequence.length)
                chosen.append((sequence, count))
                budget -= count
        return chosen

    def _take(self, sequences: list[Sequence], outputs: list[PieceOutput]) -> Iterator[Ended]:
        """Hand each output to its sequence, latent steps and samples for all rows at once; yields who ended."""
        ready = [(s, output) for s, output in zip(sequences, outputs, strict=True) if not s.prefilling]
        runner = self.model.runner
        yield from take_tokens([(s, o) for s, o in ready if isinstance(s, Decoding)], vocab_limit=runner.vocab_limit)
        yield from take_latents([(s, o) for s, o in ready if isinstance(s, Thinking)], runner.latent_step)
        for sequence, _ in ready:
            if not isinstance(sequence, Decoding | Thinking):
                yield sequence, None

    def _end(self, sequence: Sequence, error: AvpError | None) -> None:
        """Close a sequence's region, and tell its caller; a result becomes a context that keeps its keys and values."""
        context = sequence.result() if error is None else None
        if sequence.region is not None:
            kv = self.pool.close(sequence.region, context, sequence.request.owner)
            if context is not None:
                context.attach(kv=kv)
        with self._wake:
            if sequence in self._running:
                self._running.remove(sequence)
            else:
                self._queue.remove(sequence)
        sequence.ended(error)

    def _fail_batch(self, sequences: list[Sequence], error: Exception) -> None:
        log.error("A batch of %d sequences failed", len(sequences), exc_info=error)
        for sequence in [s for s in sequences if s in self._running]:
            self._end(sequence, EngineError(f"The forward pass failed: {type(error).__name__}: {error}"))


class AdmissionQueue:
    """The waiting room. First come, first served within a source; round robin between sources, so that nobody starves.

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
