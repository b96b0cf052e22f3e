"""From the handles of a turn to the contexts they stand for, and what to do when one cannot be resolved.

A handle is looked up in the engine's store. The engine replays a lost KV-cache itself (``kv``, ``replay``); where the
store does not have the context, the ladder goes on:

    held       a later message's context holds it: nothing is missing
    rethink    it stood for latent steps, and the messages it was thought on are there: think again on them
    text       it stood for an answer (or was edited), and the message has its text: that is read instead
    lost       neither: the answer is generated without it, with a warning, or `ContextLostError`

The same goes for a handle that was passed beside the messages: a message that carries it, too, makes up for it, else
the messages that it was thought on, if the prompt begins with them (`avp_agents.agent.turns`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from avp_agents.agent.steps import Plan, ask
from avp_agents.agent.turns import HandedMessage, Scope, find_source
from avp_agents.context import Context, LatentRecipe
from avp_agents.engine.protocol import Engine
from avp_agents.errors import (
    AvpError,
    ConfigurationError,
    ContextLostError,
    ContextWindowError,
    FingerprintMismatchError,
    InvalidHandleError,
    StoreUnavailableError,
)
from avp_agents.handle import ContextHandle
from avp_agents.prompt.chat_messages import Message
from avp_agents.tracing import span
from avp_agents.usage import Handoff, HandoffMode

logger = logging.getLogger(__name__)

OnMissing = Literal["text", "error"]
"""What to do on the ladder's last rung."""

_UNRESOLVED = (ContextLostError, StoreUnavailableError, InvalidHandleError, FingerprintMismatchError)


@dataclass(frozen=True)
class Fallback:
    """A rung of the ladder below resolving that was taken, and why."""

    mode: HandoffMode
    reason: str


@dataclass(frozen=True)
class Prepared:
    """A prompt whose handles are settled.

    Attributes:
        prompt: The engine's messages; those that stand for a context carry it.
        context: The context that was passed beside them, if any.
        fallbacks: What happened to handles that could not be resolved.
        latent_steps: Latent steps that thinking again took.
    """

    prompt: list[Message]
    context: Context | None
    fallbacks: tuple[Fallback, ...] = ()
    latent_steps: int = 0

    def rung(self, handoff: Handoff) -> tuple[HandoffMode, str]:
        """The lowest rung that the turn took, and why. Text counts only where no context was used."""
        taken = {fallback.mode: fallback.reason for fallback in self.fallbacks}
        for mode in ("lost", "rethink"):
            if mode in taken:
                return mode, taken[mode]
        if handoff.mode == "none" and "text" in taken:
            return "text", taken["text"]
        return handoff.mode, handoff.reason


def prepare(ladder: Ladder, turns: Sequence[HandedMessage], given: object = None) -> Plan[Prepared]:
    """Settle every handle of a prompt.

    Args:
        ladder: Resolves them; a new one.
        turns: The messages.
        given: A handle that was passed beside them; None where none was.

    Raises:
        ContextLostError: A context is lost, and the ladder takes that for an error.
    """
    with span("avp.handoff") as note:
        prepared = yield from _settle(ladder, turns, given)
        contexts = sum("context" in message for message in prepared.prompt) + (prepared.context is not None)
        note("avp.handoff.contexts", contexts)
        note("avp.handoff.fallbacks", [fallback.mode for fallback in prepared.fallbacks])
        note("avp.latent_steps", prepared.latent_steps)
        return prepared


def _settle(ladder: Ladder, turns: Sequence[HandedMessage], given: object) -> Plan[Prepared]:
    context = missing = None
    if given is not None:
        found = yield from ladder.resolve(given)
        context, missing = (found, None) if isinstance(found, Context) else (None, found)

    prompt: list[Message] = []
    made_up: dict[str | None, Context | None] = {}
    for turn, outcome in zip(turns, (yield from _resolve(ladder, turns)), strict=True):
        if outcome is None:
            prompt.append(turn.message)
        elif isinstance(outcome, Context):
            prompt.append({**turn.message, "context": outcome})
        elif not turn.is_thought:
            ladder.read(outcome)
            made_up[_id_of(turn.handle)] = None
            prompt.append(turn.message)
        else:
            again = yield from ladder.rethink(prompt, turn.recipe, outcome)
            if again is not None:
                made_up[_id_of(turn.handle)] = again
                prompt.append({**turn.message, "context": again})

    if missing is not None:
        handle = _read_handle(given)
        if handle is not None and handle.id in made_up:
            context = made_up[handle.id]
        elif handle is None or (context := ladder.held(handle)) is None:
            messages, recipe = find_source(handle.source if handle else "", prompt)
            context = yield from ladder.rethink(messages, recipe, missing)
    return Prepared(prompt, context, tuple(ladder.taken), ladder.latent_steps)


def _resolve(ladder: Ladder, turns: Sequence[HandedMessage]) -> Plan[list[Context | AvpError | None]]:
    """Per turn: its context, why there is none, or None where the turn claims none.

    Later turns first: their contexts usually hold those of earlier turns, which then need no look-up.
    """
    found: list[Context | AvpError | None] = []
    for turn in reversed(turns):
        if turn.handle is None:
            found.append(InvalidHandleError("The message of a thought carries no handle.") if turn.is_thought else None)
        elif turn.is_edited:
            found.append(InvalidHandleError("The message was edited after its context was made."))
        else:
            found.append((yield from ladder.resolve(turn.handle)))
    return found[::-1]


class Ladder:
    """Resolves handles, steps down from those that cannot be, and keeps account of that.

    Args:
        engine: Who has the contexts, and thinks again.
        scope: Where handles are honoured.
        on_missing: What to do on the last rung.
        template: Options of the chat template for thinking again.

    Attributes:
        taken: The rungs that were taken below resolving.
        latent_steps: Latent steps that thinking again took.
    """

    def __init__(
        self, engine: Engine, scope: Scope, on_missing: OnMissing, template: Mapping[str, Any] | None = None
    ) -> None:
        self._engine, self._scope, self._on_missing, self._template = engine, scope, on_missing, template
        self._holders: dict[str, tuple[Context, int]] = {}
        self.taken: list[Fallback] = []
        self.latent_steps = 0

    def resolve(self, claimed: object) -> Plan[Context | AvpError]:
        """The context of a handle, or why there is none. One that an earlier one holds is not looked up."""
        handle, scope = cast("Any", claimed), self._scope.honoured
        try:
            context = self.held(ContextHandle.from_state(handle))
            if context is None:
                context = yield from ask(self._engine.resolve, self._engine.aresolve, handle, scope=scope)
                self._note(context)
        except _UNRESOLVED as error:
            return error
        return context

    def held(self, handle: ContextHandle) -> Context | None:
        """The context of a handle, if one that was resolved is it or holds it."""
        holder, length = self._holders.get(handle.id, (None, 0))
        if holder is None or length == len(holder.lineage):
            return holder
        held = Context(holder.fingerprint, holder.dtype, holder.lineage[:length])
        held.attach(handle=handle)
        return held

    def _note(self, context: Context) -> None:
        """Remember a context and every prefix of its lineage that may have a handle of its own."""
        for length, recipe_id in enumerate(context.recipe_ids, start=1):
            handle_id = self._engine.store.namespace.handle_id(recipe_id, self._scope.minted)
            self._holders[handle_id] = (context, length)

    def read(self, reason: AvpError) -> None:
        """The message's text is read instead."""
        self.taken.append(Fallback("text", str(reason)))

    def rethink(self, prompt: Sequence[Message], recipe: LatentRecipe | None, reason: AvpError) -> Plan[Context | None]:
        """The context of latent steps on `prompt`; None, and it is lost, where there is no way to make it again."""
        if recipe is None or not prompt:
            return self._lose(reason)
        think = {**asdict(recipe), "chat_template_kwargs": self._template}
        try:
            again = yield from ask(self._engine.think, self._engine.athink, list(prompt), **think)
        except (ConfigurationError, ContextWindowError) as error:
            logger.warning("Cannot think again on the messages that are left: %s", error)
            return self._lose(reason)
        self.latent_steps += len(again.lineage[-1])
        self.taken.append(Fallback("rethink", str(reason)))
        return again

    def _lose(self, reason: AvpError) -> None:
        if self._on_missing == "error":
            raise ContextLostError(f"A context of this prompt is lost: {reason}") from reason
        logger.warning("A context is lost, the answer is generated without it: %s", reason)
        self.taken.append(Fallback("lost", str(reason)))


def _read_handle(claimed: object) -> ContextHandle | None:
    """A handle, None where it is not well formed."""
    try:
        return ContextHandle.from_state(cast("Any", claimed))
    except InvalidHandleError:
        return None


def _id_of(claimed: object) -> str | None:
    handle = _read_handle(claimed)
    return None if handle is None else handle.id
