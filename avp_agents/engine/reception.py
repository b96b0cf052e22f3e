"""Contexts of other models that come with a request: received by handshake, as far as the two models can.

    same weights, another dtype    replay        the lineage, its latents cast
    enough shared vocabulary       projection    the text that the source read, and its thought as a vector
                                   reread        the same without the vector
    anything else                  text          what the source says when it is asked for its thought

The source's engine must be one of this process; `Crossing` has the two halves for models in different ones.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from avp_agents.context import Context
from avp_agents.crossing.sides import Reread
from avp_agents.crossing.thought import TELL, TELL_TOKENS, SpokenMessage, Thought
from avp_agents.engine.local_engine import LocalEngine, find_engine
from avp_agents.errors import FingerprintMismatchError
from avp_agents.lineage import in_dtype
from avp_agents.prompt.chat_messages import Message, Prompt
from avp_agents.protocol.handshake import Shipment, handshake
from avp_agents.usage import Handoff

if TYPE_CHECKING:
    from avp_agents.engine.runtime import ModelRuntime
    from avp_agents.store import ContextStore


@dataclass(frozen=True)
class Received:
    """A request whose contexts are all of this model.

    Attributes:
        prompt: As it was given, with foreign contexts replaced.
        context: The one given explicitly, received.
        handoff: How a foreign context was received; None where there was none.
    """

    prompt: Prompt
    context: Context | None
    handoff: Handoff | None = None


@dataclass(frozen=True)
class _Taken:
    """One foreign context, received: as a context of this model, or (where only text came over) as messages."""

    context: Context
    spoken: tuple[SpokenMessage, ...]
    handoff: Handoff

    @property
    def is_context(self) -> bool:
        """Whether more than text came over."""
        return self.handoff.mode in ("projection", "replay")

    def unsaid(self, prompt: Sequence[Message]) -> list[Message]:
        """What came over as text and is not in the prompt anyway."""
        there = {(message.get("role"), message.get("content")) for message in prompt}
        return [said.to_chat() for said in self.spoken if (said.role, said.content) not in there]


class Reception:
    """Receives contexts for one model.

    Args:
        runtime: The model; its settings say which text is read again.
        store: The tenant's, for the source to decode with.
    """

    def __init__(self, runtime: ModelRuntime, store: ContextStore) -> None:
        self._crossing, self._store = runtime.crossing, store
        self._reread: Reread = runtime.reread

    def receive(self, prompt: Prompt, context: Context | None) -> Received:
        """Make the contexts of a request this model's own.

        Raises:
            FingerprintMismatchError: No engine of this process runs the model of one of them.
            AvpError: As the source's engine, where that has to tell its thought in words.
        """
        messages = _messages(prompt)
        if not any(map(self._is_foreign, (context, *map(_context_of, messages)))):
            return Received(prompt, context)
        handoffs: list[Handoff] = []
        received: list[Message] = []
        for message in messages:
            made = _context_of(message)
            if made is None or not self._is_foreign(made):
                received.append(message)
            elif made.is_text:
                received.append({key: value for key, value in message.items() if key != "context"})
                handoffs.append(Handoff("text", "the answer of another model is read as text"))
            else:
                taken = self._take(made)
                handoffs.append(taken.handoff)
                received += [{**message, "context": taken.context}] if taken.is_context else taken.unsaid(messages)
        if context is not None and self._is_foreign(context):
            taken = self._take(context)
            handoffs.append(taken.handoff)
            if not taken.is_context and self._crossing.has_template:
                # text goes before the prompt as the messages it is: a context would end in an empty answer
                return Received([*taken.unsaid(messages), *received], None, _all_of(handoffs))
            context = taken.context
        return Received(prompt if isinstance(prompt, str) else received, context, _all_of(handoffs))

    def receive_context(self, context: Context) -> tuple[Context, Handoff | None]:
        """A context as one of this model's, and how it was received; None where it is one.

        Raises:
            As `receive`.
        """
        if not self._is_foreign(context):
            return context, None
        taken = self._take(context)
        return taken.context, taken.handoff

    def check(self, context: Context) -> None:
        """Refuse a context that cannot be received.

        Raises:
            FingerprintMismatchError: It is another model's, and no engine of this process runs that.
        """
        if context.fingerprint != self._crossing.fingerprint:
            self._source_of(context)

    def _is_foreign(self, context: Context | None) -> bool:
        own = self._crossing
        return context is not None and (context.fingerprint, context.dtype) != (own.fingerprint, own.dtype)

    def _source_of(self, context: Context) -> LocalEngine:
        source = find_engine(context.fingerprint)
        if source is None:
            raise FingerprintMismatchError(
                f"The context was made by model {context.fingerprint[:16]}, this engine runs "
                f"{self._crossing.fingerprint[:16]} ({self._crossing.model_path}), and no engine of this process runs "
                "the other one. Load it here, or hand its text over."
            )
        return source

    def _take(self, context: Context) -> _Taken:
        started = time.monotonic()
        if context.fingerprint == self._crossing.fingerprint:
            made, spoken, handoff = (
                in_dtype(context, self._crossing.dtype),
                (),
                Handoff("replay", "same weights in another dtype"),
            )
            size = context.nbytes
        else:
            handoff, thought = self._thought(self._source_of(context), context)
            made, spoken, size = self._crossing.project(thought), thought.messages, len(thought.encode())
        milliseconds = 1e3 * (time.monotonic() - started)
        return _Taken(made, spoken, replace(handoff, bytes=size, milliseconds=milliseconds))

    def _thought(self, source: LocalEngine, context: Context) -> tuple[Handoff, Thought]:
        """What travels from a source of other weights, and as what."""
        shipment = Shipment(len(context), context.nbytes, None)
        decision = handshake(source.crossing.hello(), self._crossing.hello()).choose(shipment)
        if decision.mode != "projection":
            return Handoff("text", decision.reason), self._told(source, context)
        choice = self._crossing.choose(source.crossing.express(context, reread=self._reread))
        handoff = Handoff(choice.mode, f"{decision.reason}; {choice.reason}")
        return handoff, self._told(source, context) if choice.mode == "text" else choice.thought

    def _told(self, source: LocalEngine, context: Context) -> Thought:
        """The source says its thought in words."""
        answer = source.for_store(self._store).generate(TELL, context=context, max_tokens=TELL_TOKENS)
        return Thought(context.fingerprint, context.recipe_id, (), (SpokenMessage("assistant", answer.text),))


def _context_of(message: Mapping[str, Any]) -> Context | None:
    context = message.get("context")
    return context if isinstance(context, Context) else None


def _messages(prompt: Prompt) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _all_of(handoffs: Sequence[Handoff]) -> Handoff:
    """The last one, the others as its notes."""
    *others, last = handoffs
    notes = tuple(f"another context of this request: {other.mode}: {other.reason}" for other in others)
    return replace(last, notes=notes)
