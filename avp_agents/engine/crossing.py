"""Contexts of other models that come with a request cross from the engine in this process that runs their model.

What crosses, and as what, is `avp_agents.crossing.take_in`; here it takes its place in the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from avp_agents.context import Context
from avp_agents.crossing.sides import Crossing, Reread
from avp_agents.crossing.take_in import Fetch, Offer, Taken, take_in
from avp_agents.crossing.thought import TELL, TELL_TOKENS
from avp_agents.engine.local_engine import LocalEngine, find_engine
from avp_agents.errors import FingerprintMismatchError
from avp_agents.prompt.chat_messages import Message, Prompt
from avp_agents.protocol.handshake import CrossingMode, Shipment
from avp_agents.store import ContextStore
from avp_agents.usage import Handoff


@dataclass(frozen=True)
class CrossedPrompt:
    """A request whose contexts are all of this model.

    Attributes:
        prompt: As it was given, with contexts of other models replaced.
        context: The one given explicitly, as one of this model's.
        handoff: How a context of another model crossed; None where there was none.
    """

    prompt: Prompt
    context: Context | None
    handoff: Handoff | None = None


class LocalCrossing:
    """Takes in contexts for one model.

    Args:
        own: The model's side.
        store: The tenant's, for the source to decode with.
        reread: Which text of a source's is read again.
    """

    def __init__(self, own: Crossing, store: ContextStore, reread: Reread) -> None:
        self._own, self._store = own, store
        self._reread: Reread = reread

    def prompt(self, prompt: Prompt, context: Context | None) -> CrossedPrompt:
        """Make the contexts of a request this model's own.

        Raises:
            FingerprintMismatchError: No engine of this process runs the model of one of them.
            AvpError: As the source's engine, where that has to tell its thought in words.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if not any(map(self._is_foreign, (context, *map(_context_of, messages)))):
            return CrossedPrompt(prompt, context)
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
                whole = _holds_more_than_text(taken)
                received += [{**message, "context": taken.context}] if whole else _unsaid(taken, messages)
        if context is not None and self._is_foreign(context):
            taken = self._take(context)
            handoffs.append(taken.handoff)
            if not _holds_more_than_text(taken) and self._own.has_template:
                # text goes before the prompt as the messages it is, so that a prompt repeats none of them
                return CrossedPrompt([*_unsaid(taken, messages), *received], None, _all_of(handoffs))
            context = taken.context
        return CrossedPrompt(prompt if isinstance(prompt, str) else received, context, _all_of(handoffs))

    def context(self, context: Context) -> tuple[Context, Handoff | None]:
        """A context as one of this model's, and how it crossed; None where it is one.

        Raises:
            As `prompt`.
        """
        if not self._is_foreign(context):
            return context, None
        taken = self._take(context)
        return taken.context, taken.handoff

    def check(self, context: Context) -> None:
        """Refuse a context that cannot be taken in.

        Raises:
            FingerprintMismatchError: It is another model's, and no engine of this process runs that.
        """
        if context.fingerprint != self._own.fingerprint:
            self._source_of(context)

    def _is_foreign(self, context: Context | None) -> bool:
        own = self._own
        return context is not None and (context.fingerprint, context.dtype) != (own.fingerprint, own.dtype)

    def _source_of(self, context: Context) -> LocalEngine:
        source = find_engine(context.fingerprint)
        if source is None:
            raise FingerprintMismatchError(
                f"The context was made by model {context.fingerprint[:16]}, this engine runs "
                f"{self._own.fingerprint[:16]} ({self._own.model_path}), and no engine of this process runs "
                "the other one. Load it here, or hand its text over."
            )
        return source

    def _take(self, context: Context) -> Taken:
        own, shipment = self._own, Shipment(len(context), context.nbytes, None)
        if context.fingerprint == own.fingerprint:
            # the lineage is at hand, whether or not the engine that made it still is
            return take_in(Offer(replace(own.hello(), dtype=context.dtype), {"replay": lambda: context}, shipment), own)
        source = self._source_of(context)
        payloads: dict[CrossingMode, Fetch] = {
            "projection": partial(source.crossing.express, context, reread=self._reread),
            "text": partial(_told, source.for_store(self._store), context),
        }
        return take_in(Offer(source.crossing.hello(), payloads, shipment), own)


def _told(source: LocalEngine, context: Context) -> str:
    """The source says its thought in words."""
    return source.generate(TELL, context=context, max_tokens=TELL_TOKENS).text


def _holds_more_than_text(taken: Taken) -> bool:
    return taken.handoff.mode in ("projection", "replay")


def _unsaid(taken: Taken, prompt: Sequence[Message]) -> list[Message]:
    """What came over as text and is not in the prompt anyway."""
    there = {(message.get("role"), message.get("content")) for message in prompt}
    return [said.to_chat() for said in taken.spoken if (said.role, said.content) not in there]


def _context_of(message: Mapping[str, Any]) -> Context | None:
    context = message.get("context")
    return context if isinstance(context, Context) else None


def _all_of(handoffs: Sequence[Handoff]) -> Handoff:
    """The last one, the others as its notes."""
    *others, last = handoffs
    notes = tuple(f"another context of this request: {other.mode}: {other.reason}" for other in others)
    return replace(last, notes=(*last.notes, *notes))
