"""One request on its way through vLLM: what it sends, and what it makes of the tokens that come back.

VllmRequest       prefills a lineage
├── Replaying     ... and is done: vLLM's prefix cache holds it
├── Answering     ... then decodes tokens
└── ThinkingRequest ... then runs latent steps (in `thinking`)

Text, stop strings and reasoning are cut here, from token ids, by the same code as in a `LatentEngine`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from avp_agents.answer.builder import AnswerBuilder
from avp_agents.answer.generation import Chunk
from avp_agents.answer.grammar import Constraint
from avp_agents.context import Context, Readout, Segment, TokenSegment
from avp_agents.engine.core.sampling import Sampled
from avp_agents.engine.verbs import Events
from avp_agents.errors import EngineError
from avp_agents.usage import Handoff, Usage
from avp_agents.vllm.backend import DecodingOptions, Step
from avp_agents.vllm.lineage_prompt import LineagePrompt
from avp_agents.vllm.plugin.kv_request import KvRequest

T = TypeVar("T", Chunk, Context)


@dataclass(eq=False)
class Order:
    """What a caller ordered.

    Attributes:
        model: Fingerprint and dtype of the engine.
        base: The context that the prompt goes on top of, if any.
        prompt_ids: New ids behind the base.
        relation: How base and prompt belong together, for the handoff's reason.
        notes: What rendering decided.
        timeout: Seconds until the request ends, if any.
        kv: Keys and values that vLLM is to load or save itself, if any.
    """

    model: tuple[str, str]
    base: Context | None
    prompt_ids: tuple[int, ...]
    relation: str
    notes: tuple[str, ...] = ()
    timeout: float | None = None
    kv: KvRequest | None = None
    submitted: float = field(default_factory=time.monotonic)

    @property
    def lineage(self) -> tuple[Segment, ...]:
        """Base and prompt."""
        base = self.base.lineage if self.base is not None else ()
        return (*base, TokenSegment(self.prompt_ids)) if self.prompt_ids else base


class VllmRequest(ABC, Generic[T]):
    """An order, and what is known of it so far.

    Args:
        order: See `Order`.
        decoding: How vLLM decodes, but for keys and values that it loads or saves.

    Attributes:
        events: What came of it.
        prompt: The lineage as vLLM takes it.
        cached: Positions that vLLM found in its prefix cache; None where it did not say.

    Raises:
        UnsupportedModelError: The lineage cannot be represented in vLLM.
    """

    def __init__(self, order: Order, decoding: DecodingOptions) -> None:
        self.order, self._decoding = order, decoding
        self.events: Events[T] = Events()
        self.prompt = LineagePrompt.of(order.lineage)
        self.cached: int | None = None
        self._prefilled: float | None = None

    @property
    def decoding(self) -> DecodingOptions:
        """How vLLM is to decode."""
        kv = self.order.kv
        return self._decoding if kv is None else self._decoding.moving(kv)

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether no more tokens are wanted."""

    def accept(self, token: Sampled) -> None:
        """Take a token."""
        if self._prefilled is None:
            self._prefilled = time.monotonic()

    def note(self, step: Step) -> None:
        """Take what vLLM says beside tokens."""
        if step.cached is not None:
            self.cached = step.cached

    @abstractmethod
    def close(self) -> None:
        """vLLM has ended, though more tokens were wanted."""

    @abstractmethod
    def end(self) -> T:
        """The last event."""

    def make_context(self, lineage: tuple[Segment, ...], usage: Usage, readout: Readout | None = None) -> Context:
        """A context of this engine's model with what it cost."""
        context = Context(*self.order.model, lineage, readout)
        context.attach(usage=usage, handoff=self.handoff())
        return context

    def usage(self, *, completion_tokens: int = 0, reasoning_tokens: int = 0, latent_steps: int = 0) -> Usage:
        """What the request cost up to now; time in vLLM's queue is part of the prefill."""
        now, submitted = time.monotonic(), self.order.submitted
        prefilled = self._prefilled or now
        return Usage(
            prompt_tokens=len(self.prompt),
            positions_reused=self.cached or 0,
            latent_steps=latent_steps,
            completion_tokens=completion_tokens,
            reasoning_tokens=reasoning_tokens,
            prefill_seconds=prefilled - submitted,
            latent_seconds=now - prefilled if latent_steps else 0.0,
            decode_seconds=now - prefilled if completion_tokens else 0.0,
        )

    def handoff(self) -> Handoff:
        """How the context that was given reached this request."""
        # vLLM is sent the lineage whatever it has cached; what it has not is prefilled again
        base, cached = self.order.base, self.cached or 0
        if base is None:
            return Handoff(positions_reused=cached, notes=self.order.notes)
        reused = min(cached, len(base))
        missing = len(base) - reused
        if self.cached is None:
            said = "vLLM does not say what its prefix cache held"
        else:
            where = "prefix cache" if self.order.kv is None else "prefix cache, or loaded into it from the store"
            said = f"{reused} of {len(base)} positions were in vLLM's {where}"
        seconds = (self._prefilled or time.monotonic()) - self.order.submitted
        return Handoff(
            mode="replay" if missing else "kv",
            reason=f"{self.order.relation}: {said}",
            bytes=base.nbytes,
            milliseconds=1e3 * seconds * missing / max(1, len(self.prompt) - cached),
            positions_reused=reused,
            positions_replayed=missing,
            notes=self.order.notes,
        )


class Replaying(VllmRequest[Context]):
    """Has vLLM prefill a lineage, so that its prefix cache holds it. vLLM decodes one token at least; it is dropped."""

    def __init__(self, order: Order) -> None:
        super().__init__(order, DecodingOptions({"max_tokens": 1, "temperature": 0.0}))
        self._done = False

    @property
    def done(self) -> bool:
        """Whether the prefill is over."""
        return self._done

    def accept(self, token: Sampled) -> None:
        """The prefill is over."""
        super().accept(token)
        self._done = True

    def close(self) -> None:
        """The prefill is over."""
        self._done = True

    def end(self) -> Context:
        """The context."""
        base = self.order.base
        assert base is not None
        context = self.make_context(base.lineage, self.usage(), base.readout)
        if base.handle is not None:
            context.attach(handle=base.handle)
        return context


class Answering(VllmRequest[Chunk]):
    """Decodes tokens until a stop or the limit.

    Args:
        order: See `Order`.
        decoding: How vLLM decodes.
        builder: Makes the answer of them.
        constraint: What the answer may be. vLLM keeps to it; here it is followed to write the shortest ending where
            `max_tokens` would not suffice.
    """

    def __init__(
        self, order: Order, decoding: DecodingOptions, builder: AnswerBuilder, constraint: Constraint | None
    ) -> None:
        super().__init__(order, decoding)
        self._builder, self._constraint = builder, constraint

    @property
    def done(self) -> bool:
        """Whether the answer has ended."""
        return self._builder.finish_reason is not None

    def accept(self, token: Sampled) -> None:
        """Emit a token's text, and see whether it ends the answer.

        Raises:
            EngineError: The constraint does not allow the token.
        """
        super().accept(token)
        if self._constraint is None:
            self._take(token)
            return
        if not self._constraint.allows(token.token_id):
            decoded = self._builder.token_text(token.token_id)
            raise EngineError(
                f"vLLM decoded {decoded!r}, which the grammar does not allow. Start the "
                "server with --structured-outputs-config.backend guidance."
            )
        self._take_settled(self._constraint, token)
        # an ending that was begun is written here: what vLLM would decode does not matter any more
        while not self.done and self._constraint.was_cut:
            self._take_settled(self._constraint, token)

    def close(self) -> None:
        """End the answer as it is."""
        self._builder.close()

    def end(self) -> Chunk:
        """The last chunk, with the whole answer."""
        builder = self._builder
        ids = builder.lineage_ids
        lineage = (*self.order.lineage, TokenSegment(ids)) if ids else self.order.lineage
        usage = self.usage(completion_tokens=len(builder.ids), reasoning_tokens=builder.reasoning_tokens)
        return builder.finish(self.make_context(lineage, usage), usage, self.handoff())

    def _take_settled(self, constraint: Constraint, token: Sampled) -> None:
        settled = constraint.settled(token.token_id)
        constraint.accept(settled)
        self._take(token if settled == token.token_id and not constraint.was_cut else Sampled(settled))

    def _take(self, token: Sampled) -> None:
        cut = self._constraint is not None and self._constraint.was_cut
        chunk = self._builder.take(token.token_id, token.logprob, token.top, cut=cut)
        if not self.done:
            self.events.put(chunk)
