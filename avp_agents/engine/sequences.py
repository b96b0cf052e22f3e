"""The sequences that the engine's verbs put into the scheduler: what they hand back, and what is told of their cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Generic

from typing_extensions import override

from avp_agents.answer.builder import AnswerBuilder
from avp_agents.answer.generation import Chunk
from avp_agents.context import Context, LatentRecipe, Readout, Segment, TokenSegment
from avp_agents.engine.core.sampling import RowSampler, Sampled
from avp_agents.engine.core.scheduler import Scheduler
from avp_agents.engine.core.sequence import Decoding, Request, Sequence, Thinking
from avp_agents.engine.verbs import Events, T, Work
from avp_agents.errors import AvpError
from avp_agents.usage import Handoff, HandoffMode, Usage


@dataclass
class Report:
    """What is told of a request: how its context reached it, and what it cost.

    Attributes:
        fingerprint, dtype: Of the engine's model.
        relation: How base and prompt belong together, for the handoff's reason.
        notes: What rendering decided.
        crossed: How contexts of other models were received for it, if any were.
    """

    fingerprint: str
    dtype: str
    relation: str
    notes: tuple[str, ...] = ()
    crossed: Handoff | None = None

    def context(
        self, of: Sequence, lineage: tuple[Segment, ...], usage: Usage, readout: Readout | None = None
    ) -> Context:
        """A context of the engine's model with what it cost."""
        context = Context(self.fingerprint, self.dtype, lineage, readout)
        context.attach(usage=usage, handoff=self.handoff(of))
        return context

    def usage(
        self, of: Sequence, *, latent_steps: int = 0, completion_tokens: int = 0, reasoning_tokens: int = 0
    ) -> Usage:
        """What it cost up to now."""
        stepping = time.monotonic() - of.prefilled
        return Usage(
            prompt_tokens=of.total,
            positions_reused=of.started.reused,
            latent_steps=latent_steps,
            completion_tokens=completion_tokens,
            reasoning_tokens=reasoning_tokens,
            queue_seconds=of.admitted - of.request.submitted,
            prefill_seconds=of.prefilled - of.admitted,
            latent_seconds=stepping if latent_steps else 0.0,
            decode_seconds=stepping if completion_tokens else 0.0,
        )

    def handoff(self, of: Sequence) -> Handoff:
        """How the context that was given reached it."""
        used, crossed = self._used(of), self.crossed
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

    def _used(self, of: Sequence) -> Handoff:
        """How the base (or the prefix) was used."""
        base, started = of.request.base, of.started
        if base is None:
            if of.request.prefix is None or not started.reused:
                return Handoff(notes=self.notes, positions_reused=started.reused)
            return Handoff(
                mode="kv",
                reason="same leading tokens",
                bytes=started.bytes_moved,
                milliseconds=1e3 * started.seconds,
                positions_reused=started.reused,
                notes=self.notes,
            )
        reused = min(started.reused, len(base))
        missing = len(base) - reused
        # the last sampled token of an answer never had keys and values, so feeding it is no replay
        mode: HandoffMode = "kv" if missing <= 1 else "replay"
        prefill = of.prefilled - of.admitted
        replaying = prefill * missing / max(1, of.total - started.start) if mode == "replay" else 0.0
        where = "uploaded from the store" if started.bytes_moved else "in the pool"
        reason = f"KV-cache {where}" if mode == "kv" else f"{missing} positions had no KV-cache"
        return Handoff(
            mode=mode,
            reason=f"{self.relation}: {reason}",
            bytes=started.bytes_moved if mode == "kv" else base.nbytes,
            milliseconds=1e3 * (started.seconds + replaying),
            positions_reused=reused,
            positions_replayed=missing if mode == "replay" else 0,
            notes=self.notes,
        )


class Delivering(Sequence, Generic[T]):
    """A sequence that owns the queue of events to its caller.

    Attributes:
        events: What comes of it.
    """

    events: Events[T]
    _last: T | None = None

    @override
    def ended(self, error: AvpError | None) -> None:
        if error is not None:
            self.events.put(error)
        elif self._last is not None:
            self.events.put(self._last)


class Scheduled(Work[T]):
    """Work that a scheduler runs as a sequence."""

    def __init__(self, scheduler: Scheduler, sequence: Delivering[T]) -> None:
        super().__init__(sequence.events)
        self._scheduler, self._sequence = scheduler, sequence

    @override
    def start(self) -> None:
        self._scheduler.submit(self._sequence)

    @override
    def cancel(self) -> None:
        self._scheduler.cancel(self._sequence)


class ReplaySequence(Delivering[Context]):
    """Rebuilds a context's KV-cache; done when that is prefilled."""

    def __init__(self, request: Request, report: Report) -> None:
        super().__init__(request, more=0)
        self.events = Events()
        self._report = report

    @override
    def result(self) -> Context:
        base = self.request.base
        readout = base.readout if base is not None else None
        self._last = self._report.context(self, self.lineage, self._report.usage(self), readout)
        return self._last


class ThoughtSequence(Thinking, Delivering[Context]):
    """Runs latent steps; the context ends in them."""

    def __init__(self, request: Request, recipe: LatentRecipe, report: Report, *, looks_at_logits: bool) -> None:
        super().__init__(request, recipe, looks_at_logits=looks_at_logits)
        self.events = Events()
        self._report = report

    @override
    def result(self) -> Context:
        usage = self._report.usage(self, latent_steps=len(self.latents))
        self._last = self._report.context(self, self.latent_lineage(), usage, self.readout)
        return self._last


class AnswerSequence(Decoding, Delivering[Chunk]):
    """Decodes an answer and delivers it piece by piece."""

    def __init__(
        self, request: Request, most: int, sampler: RowSampler, builder: AnswerBuilder, report: Report
    ) -> None:
        super().__init__(request, most, sampler)
        self.events = Events()
        self._builder, self._report = builder, report

    @override
    def accept(self, sampled: Sampled) -> bool:
        chunk = self._builder.take(sampled.token_id, sampled.logprob, sampled.top, cut=self.sampler.was_cut)
        ended = self._builder.finish_reason is not None
        if not ended:
            self.events.put(chunk)
        return ended

    @override
    def result(self) -> Context:
        report, ids = self._report, self._builder.lineage_ids
        lineage = (*self.lineage, TokenSegment(ids)) if ids else self.lineage
        usage = report.usage(self, completion_tokens=len(self.ids), reasoning_tokens=self._builder.reasoning_tokens)
        context = report.context(self, lineage, usage)
        self.keep_only(ids)
        self._last = self._builder.finish(context, usage, report.handoff(self))
        return context
