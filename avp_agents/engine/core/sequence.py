"""One request on its way through the scheduler: what it feeds the model next, and what it makes of the answer.

Sequence          prefills a lineage that is partly in the pool already
├── Replaying     ... and is done: a KV-cache was rebuilt
├── Thinking      ... then runs latent steps
└── Answering     ... then decodes tokens
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from avp_agents.answer.detokenizer import TextStream
from avp_agents.answer.generation import Chunk, FinishReason, Generation, TokenLogprob
from avp_agents.answer.reasoning import ReasoningSplit
from avp_agents.context import Context, LatentRecipe, LatentSegment, Readout, Segment, SplicedSegment, TokenSegment
from avp_agents.engine.core.forward import Inputs, Piece
from avp_agents.engine.core.kv_pool import Region
from avp_agents.engine.core.prefill import Move, next_inputs, prefill_runs
from avp_agents.engine.core.request import Event, Placement, Request
from avp_agents.engine.core.sampling import RowSampler, Sampled
from avp_agents.usage import Handoff, HandoffMode, Usage

if TYPE_CHECKING:
    pass


class Sequence(ABC):
    """A request with its place in the KV pool.

    Attributes:
        region: Its positions in the pool, once admitted.
        length: Positions whose keys and values are in the pool.
        total: Positions of the lineage to prefill.
        capacity: Most positions it can come to need.
    """

    def __init__(self, request: Request, more: int) -> None:
        self.request = request
        self.lineage = request.lineage
        self.total = sum(len(segment) for segment in self.lineage)
        self._runs = prefill_runs(self.lineage)
        self.capacity = self.total + more
        self.region: Region | None = None
        self.length = 0
        self.placement = Placement()
        self.admitted = self.prefilled = request.submitted

    def admit(self, region: Region, placement: Placement) -> None:
        """Start in `region`, whose first ``placement.start`` positions are this lineage's."""
        self.region, self.placement = region, placement
        self.length = placement.start
        self.admitted = time.monotonic()

    @property
    def prefilling(self) -> bool:
        """Whether positions of the lineage are still to be fed."""
        return self.length < self.total

    def next_piece(self, budget: int) -> Piece:
        """What to feed next: at most `budget` positions of the lineage, or one step."""
        assert self.region is not None
        if self.prefilling:
            inputs, frame = next_inputs(self._runs, self.length, budget)
        else:
            inputs, frame = (self.step_input(),), None
        stop = self.length + sum(len(part) for part in inputs)
        wants_logits = stop >= self.total and self.wants_logits()
        return Piece(inputs, self.region.start, self.length, wants_logits, frame)

    def chunk_fed(self, count: int) -> None:
        """Note that the coming `count` positions are a whole chunk, if all before them are whole chunks."""
        assert self.region is not None
        if self.region.chunked == self.length:
            self.region.chunked += count

    def fed(self, count: int) -> None:
        """Note that `count` positions more are in the pool."""
        assert self.region is not None
        if self.prefilling and self.length + count >= self.total:
            self.prefilled = time.monotonic()
        self.length += count
        self.region.written = self.length

    @property
    def has_splices(self) -> bool:
        """Whether keys may have to be moved for it."""
        return any(run.splice is not None for run in self._runs)

    def whole(self, length: int) -> int:
        """The positions among the first `length` that another sequence may start behind: none of half a splice."""
        return next((r.splice for r in self._runs if r.splice is not None and r.splice < length < r.stop), length)

    def next_splice(self) -> SplicedSegment | None:
        """The splice that is to be prefilled next, if it is one, and not the last thing to be prefilled."""
        start = 0
        for segment in self.lineage:
            if start == self.length and isinstance(segment, SplicedSegment):
                return segment if start + len(segment) < self.total else None
            start += len(segment)
        return None

    def spliced(self, count: int) -> None:
        """Note that the `count` positions of a splice were copied to where they belong."""
        self.placement = replace(self.placement, reused=self.placement.reused + count)
        self.fed(count)

    def moves_due(self) -> tuple[Move, ...]:
        """What is to be moved now that the newest position is in."""
        return next((run.moves for run in self._runs if run.stop == self.length), ())

    @abstractmethod
    def step_input(self) -> Inputs:
        """The one position after the prefill: a token id or a latent embedding."""

    @abstractmethod
    def wants_logits(self) -> bool:
        """Whether the coming position's logits are needed."""

    @abstractmethod
    def end(self) -> Event:
        """The last event; called after the sequence's last step, before its region is closed."""

    @abstractmethod
    def result_context(self) -> Context | None:
        """The context that keeps the region, once `end` was called."""

    def make_context(self, lineage: tuple[Segment, ...], usage: Usage, readout: Readout | None = None) -> Context:
        """A context of this engine's model with what it cost."""
        fingerprint, dtype = self.request.model
        context = Context(fingerprint, dtype, lineage, readout)
        context.attach(usage=usage, handoff=self.handoff())
        return context

    def usage(self, *, latent_steps: int = 0, completion_tokens: int = 0) -> Usage:
        """What the request cost up to now."""
        now = time.monotonic()
        stepping = now - self.prefilled
        return Usage(
            prompt_tokens=self.total,
            positions_reused=self.placement.reused,
            latent_steps=latent_steps,
            completion_tokens=completion_tokens,
            queue_seconds=self.admitted - self.request.submitted,
            prefill_seconds=self.prefilled - self.admitted,
            latent_seconds=stepping if latent_steps else 0.0,
            decode_seconds=stepping if completion_tokens else 0.0,
        )

    def handoff(self) -> Handoff:
        """How the context that was given reached this request."""
        used, crossed = self._base_handoff(), self.request.crossed
        if crossed is None:
            return used
        return replace(
            used,
            mode=crossed.mode,
            reason=crossed.reason,
            bytes=crossed.bytes,
            milliseconds=crossed.milliseconds + used.milliseconds,
            notes=(*crossed.notes, *used.notes),
        )

    def _base_handoff(self) -> Handoff:
        """How the base (or the prefix) was used."""
        base, placement = self.request.base, self.placement
        if base is None:
            return self._prefix_handoff()
        reused = min(placement.reused, len(base))
        missing = len(base) - reused
        # the last sampled token of an answer never had keys and values, so feeding it is no replay
        mode: HandoffMode = "kv" if missing <= 1 else "replay"
        prefill = self.prefilled - self.admitted
        replaying = prefill * missing / max(1, self.total - placement.start) if mode == "replay" else 0.0
        where = "uploaded from the store" if placement.bytes_moved else "in the pool"
        reason = f"KV-cache {where}" if mode == "kv" else f"{missing} positions had no KV-cache"
        return Handoff(
            mode=mode,
            reason=f"{self.request.relation}: {reason}",
            bytes=placement.bytes_moved if mode == "kv" else base.nbytes,
            milliseconds=1e3 * (placement.seconds + replaying),
            positions_reused=reused,
            positions_replayed=missing if mode == "replay" else 0,
            notes=self.request.notes,
        )

    def _prefix_handoff(self) -> Handoff:
        reused = self.placement.reused
        if self.request.prefix is None or not reused:
            return Handoff(notes=self.request.notes, positions_reused=reused)
        return Handoff(
            mode="kv",
            reason="same leading tokens",
            bytes=self.placement.bytes_moved,
            milliseconds=1e3 * self.placement.seconds,
            positions_reused=reused,
            notes=self.request.notes,
        )


class Replaying(Sequence):
    """Rebuilds a context's KV-cache."""

    def __init__(self, request: Request) -> None:
        super().__init__(request, more=0)
        self._context: Context | None = None

    def step_input(self) -> Inputs:
        """Never asked for: a replay ends with its prefill."""
        raise AssertionError("a replay has no steps")

    def wants_logits(self) -> bool:
        """No."""
        return False

    def end(self) -> Event:
        """The context."""
        base = self.request.base
        assert base is not None
        self._context = self.make_context(self.lineage, self.usage(), base.readout)
        return self._context

    def result_context(self) -> Context | None:
        """The context that now has its KV-cache again."""
        return self._context


class Thinking(Sequence):
    """Runs latent steps: each last hidden state, mapped to the input space, is the next input."""

    def __init__(self, request: Request, recipe: LatentRecipe, always_logits: bool) -> None:
        super().__init__(request, more=recipe.steps)
        self.recipe = recipe
        self._always_logits = always_logits
        self.latents: list[torch.Tensor] = []
        self.last_hidden: torch.Tensor | None = None
        self._readout: Readout | None = None
        self._context: Context | None = None

    def step_input(self) -> Inputs:
        """The newest latent embedding, ``[1, hidden]``."""
        return self.latents[-1][None]

    def wants_logits(self) -> bool:
        """Where f or a stopping rule needs them, and at the end for the readout."""
        next_is_last = len(self.latents) >= self.recipe.steps
        return self._always_logits or next_is_last

    @property
    def done(self) -> bool:
        """Whether all steps asked for were run."""
        return len(self.latents) >= self.recipe.steps

    def read_out(self, hidden: torch.Tensor, token_ids: torch.Tensor, probabilities: torch.Tensor) -> None:
        """Keep what the model was about to say."""
        self._readout = Readout(hidden.cpu().clone(), token_ids.cpu().clone(), probabilities.cpu().clone())

    def end(self) -> Event:
        """The context."""
        lineage = self.lineage
        if self.latents:
            lineage = (*lineage, LatentSegment(torch.stack(self.latents).cpu(), self.recipe))
        usage = self.usage(latent_steps=len(self.latents))
        self._context = self.make_context(lineage, usage, self._readout)
        return self._context

    def result_context(self) -> Context | None:
        """The thought."""
        return self._context


class Answering(Sequence):
    """Decodes tokens until a stop or the limit."""

    def __init__(
        self,
        request: Request,
        max_tokens: int,
        sampler: RowSampler,
        text: TextStream,
        stop_ids: frozenset[int],
        split: ReasoningSplit,
    ) -> None:
        super().__init__(request, more=max_tokens)
        self.sampler = sampler
        self._max_tokens = max_tokens
        self._text = text
        self._split = split
        self._stop_ids = stop_ids
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish: FinishReason | None = None
        self._result: Generation | None = None
        self._last: Chunk | None = None

    def step_input(self) -> Inputs:
        """The newest token."""
        return (self._ids[-1],)

    def wants_logits(self) -> bool:
        """Always: every step is sampled from."""
        return True

    @property
    def done(self) -> bool:
        """Whether the answer has ended."""
        return self._finish is not None

    def accept(self, sampled: Sampled, token_text: Callable[[int], str]) -> None:
        """Take a token: emit its text, and see whether it ends the answer."""
        token = sampled.token_id
        self._ids.append(token)
        logprobs = self._note_logprob(sampled, token_text)
        if token in self._stop_ids:
            self._finish = "length" if self.sampler.was_cut else "stop"
            delta = self._text.finish()
        else:
            delta = self._text.feed(token)
            if len(self._ids) >= self._max_tokens:
                self._finish = "length"
                delta += self._text.finish()
            if self._text.stopped:
                self._finish = "stop"
        reasoning, text = self._split.feed(delta, last=self.done)
        self._last = Chunk(text, (token,), logprobs=logprobs, reasoning=reasoning)
        if not self.done:
            self.request.deliver(self._last)

    def end(self) -> Event:
        """The last chunk, with the whole answer."""
        last = self._last
        assert last is not None
        assert self._finish is not None
        ids = self._lineage_ids()
        lineage = (*self.lineage, TokenSegment(ids)) if ids else self.lineage
        usage = replace(self.usage(completion_tokens=len(self._ids)), reasoning_tokens=self._split.pieces)
        context = self.make_context(lineage, usage)
        self._keep_only(ids)
        asked = self.sampler.params.logprobs is not None
        self._result = Generation(
            text=self._split.text,
            token_ids=ids,
            context=context,
            usage=usage,
            handoff=self.handoff(),
            finish_reason=self._finish,
            logprobs=tuple(self._logprobs) if asked else None,
            reasoning=self._split.reasoning,
        )
        token_ids = last.token_ids if ids == tuple(self._ids) else ()
        return Chunk(last.text, token_ids, self._result, last.logprobs, last.reasoning)

    def result_context(self) -> Context | None:
        """Lineage and answer."""
        return self._result.context if self._result is not None else None

    def _lineage_ids(self) -> tuple[int, ...]:
        """What stays: everything, or, after a stop string, what lies before it."""
        return self._text.lineage_ids() if self._text.stopped else tuple(self._ids)

    def _keep_only(self, ids: tuple[int, ...]) -> None:
        """Forget keys and values of ids that a stop string cut away."""
        assert self.region is not None
        same = next((i for i, (a, b) in enumerate(zip(ids, self._ids, strict=False)) if a != b), len(ids))
        self.length = min(self.length, self.total + same)
        self.region.written = self.length

    def _note_logprob(self, sampled: Sampled, token_text: Callable[[int], str]) -> tuple[TokenLogprob, ...]:
        if sampled.logprob is None:
            return ()
        entry = TokenLogprob(sampled.token_id, token_text(sampled.token_id), sampled.logprob, sampled.top)
        self._logprobs.append(entry)
        return (entry,)
