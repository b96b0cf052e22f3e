"""The scheduler: one thread that owns the model and batches whatever its callers submit.

Each round it admits waiting sequences, composes one batch of pieces (a chunk of a prompt, a latent step, a decode
step, mixed), runs it, and lets every sequence make of the output what it needs.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from avp_agents.context import LatentRecipe
from avp_agents.engine.core.admission import AdmissionQueue
from avp_agents.engine.core.forward import INVARIANT_CHUNK, PieceOutput, Runner
from avp_agents.engine.core.kv_pool import KvPool
from avp_agents.engine.core.latent_step import LatentStep
from avp_agents.engine.core.model import LoadedModel
from avp_agents.engine.core.prefill import Move
from avp_agents.engine.core.sampling import Sampled, sample
from avp_agents.engine.core.sequence import Answering, Replaying, Sequence, Thinking
from avp_agents.engine.core.start import copy_splice, place
from avp_agents.engine.extras.splice import KeyRotation
from avp_agents.errors import (
    AvpError,
    EngineClosedError,
    EngineError,
    KvMemoryError,
    NumericalError,
    RequestCancelledError,
    RequestTimeoutError,
)

log = logging.getLogger(__name__)


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
class Machinery:
    """A loaded model with everything that runs it."""

    loaded: LoadedModel
    pool: KvPool
    runner: Runner
    latent_step: LatentStep
    rotation: KeyRotation

    def token_text(self, token: int) -> str:
        """A token's text, for log-probabilities."""
        return str(self.loaded.tokenizer.decode([token]))


class Scheduler:
    """Owns the model's thread.

    Args:
        load: Loads the model; runs on the model's thread. torch keeps a pool of worker threads for every thread that
            computes, and slows all of them down where they are more than the cores: nobody else should compute.
        max_batch: Most sequences that run at once.
        max_queue: Most that wait.
        prefill_budget: Most prompt positions per round, so that long prompts do not stall decoding.
        batch_invariant: Prompts run in whole chunks, see `Runner`.

    Raises:
        AvpError: Whatever `load` raises.
    """

    def __init__(
        self,
        load: Callable[[], Machinery],
        *,
        max_batch: int,
        max_queue: int,
        prefill_budget: int,
        batch_invariant: bool,
    ) -> None:
        self._max_batch, self._prefill_budget = max_batch, prefill_budget
        self._batch_invariant = batch_invariant
        self._queue = AdmissionQueue(max_queue)
        self._running: list[Sequence] = []
        self._wake = threading.Condition()
        self._closing = False
        self._steps = 0
        self._process = os.getpid()
        ready: Future[Machinery] = Future()
        self._thread = threading.Thread(target=self._live, args=(load, ready), name="avp-scheduler", daemon=True)
        self._thread.start()
        self.machinery = ready.result()
        self.pool = self.machinery.pool

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence; its events reach ``sequence.request.deliver``.

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

    def _live(self, load: Callable[[], Machinery], ready: Future[Machinery]) -> None:
        """The thread's life: load, then run rounds until closed."""
        try:
            machinery = load()
        except BaseException as error:
            ready.set_exception(error)
            return
        self._runner, self._latent_step = machinery.runner, machinery.latent_step
        self._rotation = machinery.rotation
        self.pool = machinery.pool
        self._vocab_limit, self._token_text = machinery.loaded.vocabulary.size, machinery.token_text
        ready.set_result(machinery)
        self._run()

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait_for_work():
                self._drop_ended()
                self._admit()
                if self._running:
                    self._round()
        closed = EngineClosedError("The engine was closed before this request finished.")
        with self._wake:
            ended = [*self._running, *self._queue]
        for sequence in ended:
            self._fail(sequence, closed)

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
                self._fail(sequence, RequestCancelledError("The request was cancelled."))
            elif request.deadline is not None and now > request.deadline:
                allowed = request.deadline - request.submitted
                self._fail(sequence, RequestTimeoutError(f"The request did not finish within {allowed:.3g} s."))

    def _admit(self) -> None:
        while len(self._running) < self._max_batch:
            with self._wake:
                sequence = self._queue.peek()
            if sequence is None:
                return
            try:
                if sequence.has_splices:
                    self._rotation.require()
                placed = place(sequence, self.pool, chunk=INVARIANT_CHUNK if self._batch_invariant else None)
            except AvpError as error:
                self._fail(sequence, error)
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
            self._copy_splices()
            chosen = self._choose()
            pieces = [sequence.next_piece(budget) for sequence, budget in chosen]
            sequences = [sequence for sequence, _ in chosen]
            outputs = self._runner.run(pieces)
            for sequence, piece in zip(sequences, pieces, strict=True):
                if self._batch_invariant and piece.count == INVARIANT_CHUNK and piece.frame is None:
                    sequence.chunk_fed(piece.count)
                sequence.fed(piece.count)
                self._move(sequence, sequence.moves_due())
            self._steps += 1
            self._advance(list(zip(sequences, outputs, strict=True)))
        except Exception as error:
            log.exception("A batch of %d sequences failed", len(sequences))
            for sequence in [s for s in sequences if s in self._running]:
                self._fail(sequence, EngineError(f"The forward pass failed: {type(error).__name__}: {error}"))

    def _copy_splices(self) -> None:
        """Fill in splices whose keys and values are still where they were made.

        Not where results must be bit-equal: they may have been made in other shapes there.
        """
        if self._batch_invariant:
            return
        for sequence in self._running:
            while copy_splice(sequence, self.pool):
                # of splices within it, the keys were moved before they were copied
                self._move(sequence, sequence.moves_due()[-1:])

    def _move(self, sequence: Sequence, moves: tuple[Move, ...]) -> None:
        """Rotate the keys of splices that have just been completed."""
        assert sequence.region is not None
        for move in moves:
            self._rotation.move(sequence.region.start + move.start, sequence.region.start + move.stop, move.by)

    def _choose(self) -> list[tuple[Sequence, int]]:
        """All sequences past their prefill, and prefilling ones within the budget."""
        budget = self._prefill_budget
        chosen: list[tuple[Sequence, int]] = []
        for sequence in self._running:
            if not sequence.prefilling:
                chosen.append((sequence, 1))
            elif self._batch_invariant:
                chosen.append((sequence, INVARIANT_CHUNK))
            elif budget > 0:
                count = min(budget, sequence.total - sequence.length)
                chosen.append((sequence, count))
                budget -= count
        return chosen

    def _advance(self, outputs: list[tuple[Sequence, PieceOutput]]) -> None:
        """Hand each output to its sequence; latent steps and samples are made for all rows at once."""
        ready = [(sequence, output) for sequence, output in outputs if not sequence.prefilling]
        self._sample([(s, o) for s, o in ready if isinstance(s, Answering)])
        thinking = [(s, o) for s, o in ready if isinstance(s, Thinking)]
        for recipe in dict.fromkeys(s.recipe for s, _ in thinking):
            self._think(recipe, [(s, o) for s, o in thinking if s.recipe == recipe])
        for sequence, _ in ready:
            if isinstance(sequence, Replaying):
                self._finish(sequence)

    def _sample(self, rows: list[tuple[Answering, PieceOutput]]) -> None:
        if not rows:
            return
        logits = torch.stack([output.logits for _, output in rows if output.logits is not None])
        drawn = sample(logits, [sequence.sampler for sequence, _ in rows], vocab_limit=self._vocab_limit)
        for (sequence, _), result in zip(rows, drawn, strict=True):
            if not isinstance(result, Sampled):
                self._fail(sequence, result)
                continue
            sequence.accept(result, self._token_text)
            if sequence.done:
                self._finish(sequence)

    def _think(self, recipe: LatentRecipe, rows: list[tuple[Thinking, PieceOutput]]) -> None:
        hidden = torch.stack([output.hidden for _, output in rows])
        healthy = torch.isfinite(hidden).all(dim=-1).tolist()
        for (sequence, _), fine in zip(rows, healthy, strict=True):
            if not fine:
                step = len(sequence.latents)
                self._fail(sequence, NumericalError(f"NaN or Inf at latent step {step}; try dtype='float32'."))
        rows = [row for row, fine in zip(rows, healthy, strict=True) if fine]
        stepping: list[tuple[Thinking, PieceOutput]] = []
        for sequence, output in rows:
            if sequence.done or self._has_settled(sequence, output):
                self._read_out(sequence, output)
                self._finish(sequence)
            else:
                stepping.append((sequence, output))
        if stepping:
            self._step(recipe, stepping)

    def _step(self, recipe: LatentRecipe, rows: list[tuple[Thinking, PieceOutput]]) -> None:
        hidden = torch.stack([output.hidden for _, output in rows])
        wanted = [output.logits for _, output in rows if output.logits is not None]
        logits = torch.stack(wanted) if len(wanted) == len(rows) else None
        for (sequence, output), latent in zip(rows, self._latent_step(hidden, logits, recipe), strict=True):
            sequence.latents.append(latent)
            sequence.last_hidden = output.hidden

    def _has_settled(self, sequence: Thinking, output: PieceOutput) -> bool:
        """Whether a stopping rule holds."""
        recipe = sequence.recipe
        if recipe.stop_cosine is not None and sequence.last_hidden is not None:
            pair = (output.hidden.float(), sequence.last_hidden.float())
            if float(torch.cosine_similarity(*pair, dim=0)) > recipe.stop_cosine:
                return True
        if recipe.stop_entropy is None or output.logits is None:
            return False
        return float(self._latent_step.entropy(output.logits[None])) < recipe.stop_entropy

    def _read_out(self, sequence: Thinking, output: PieceOutput) -> None:
        """Keep the next-token distribution; a run that settled early without logits has none."""
        if output.logits is not None:
            ids, probabilities = self._latent_step.readout(output.logits[None])
            sequence.read_out(output.hidden, ids[0], probabilities[0])

    def _finish(self, sequence: Sequence) -> None:
        """The sequence's result becomes a context that keeps its keys and values."""
        event = sequence.end()
        assert sequence.region is not None
        context = sequence.result_context()
        kv = self.pool.close(sequence.region, context, sequence.request.store)
        if context is not None:
            context.attach(kv=kv)
        self._leave(sequence)
        sequence.request.deliver(event)

    def _fail(self, sequence: Sequence, error: AvpError) -> None:
        if sequence.region is not None:
            self.pool.close(sequence.region, None, sequence.request.store)
        self._leave(sequence)
        sequence.request.deliver(error)

    def _leave(self, sequence: Sequence) -> None:
        with self._wake:
            if sequence in self._running:
                self._running.remove(sequence)
            else:
                self._queue.remove(sequence)
