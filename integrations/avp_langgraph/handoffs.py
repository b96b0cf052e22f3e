"""From the handles on messages to the contexts they stand for, and what to do when one cannot be resolved.

A handle is looked up in the engine's store (the engine replays a lost KV-cache itself). Where the store does not have
it, the ladder goes on:

    held       a later message's context holds it: nothing is missing
    rethink    it stood for latent steps, and the messages before it are there: think again on them
    text       it stood for an answer (or was edited), and the message has its text: that is read instead
    lost       neither: the answer is generated without it, with a warning, or `ContextLostError`

`prepare` is written once, as a generator that asks for what has to wait for store or engine; `run` and `arun` carry
that out in threads and on event loops.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from avp_agents.context import Context, LatentRecipe
from avp_agents.engine.base import Engine, Message
from avp_agents.errors import (
    AvpError,
    ConfigurationError,
    ContextLostError,
    ContextWindowError,
    FingerprintMismatchError,
    InvalidHandleError,
)
from avp_agents.handle import ContextHandle
from avp_agents.store.base import ContextStore
from avp_agents.usage import HandoffMode
from avp_langgraph.messages import Turn
from avp_langgraph.scope import Scope

logger = logging.getLogger("avp_langgraph")

OnMissing = Literal["text", "error"]
_UNRESOLVED = (ContextLostError, InvalidHandleError, FingerprintMismatchError)


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
        context: The context that was given explicitly, if any.
        fallbacks: What happened to handles that could not be resolved.
        latent_steps: Latent steps that thinking again took.
    """

    prompt: list[Message]
    context: Context | None
    fallbacks: tuple[Fallback, ...]
    latent_steps: int


@dataclass(frozen=True)
class Resolve:
    """Ask for the context of a handle."""

    handle: Any
    scope: str | None

    def call(self, engine: Engine) -> Context:
        """Look it up."""
        return engine.resolve(self.handle, scope=self.scope)

    async def acall(self, engine: Engine) -> Context:
        """Look it up without blocking the event loop."""
        return await engine.aresolve(self.handle, scope=self.scope)


@dataclass(frozen=True)
class Rethink:
    """Ask for a context that was lost to be made again."""

    prompt: list[Message]
    recipe: LatentRecipe

    def call(self, engine: Engine) -> Context:
        """Think."""
        return engine.think(list(self.prompt), **asdict(self.recipe))

    async def acall(self, engine: Engine) -> Context:
        """Think without blocking the event loop."""
        return await engine.athink(list(self.prompt), **asdict(self.recipe))


Preparation = Generator[Resolve | Rethink, Context, Prepared]


def run(preparation: Preparation, engine: Engine) -> Prepared:
    """Carry out what `prepare` asks for."""
    try:
        ask = next(preparation)
        while True:
            try:
                context = ask.call(engine)
            except AvpError as error:
                ask = preparation.throw(error)
            else:
                ask = preparation.send(context)
    except StopIteration as finished:
        return finished.value


async def arun(preparation: Preparation, engine: Engine) -> Prepared:
    """`run` on an event loop."""
    try:
        ask = next(preparation)
        while True:
            try:
                context = await ask.acall(engine)
            except AvpError as error:
                ask = preparation.throw(error)
            else:
                ask = preparation.send(context)
    except StopIteration as finished:
        return finished.value


def prepare(
    turns: Sequence[Turn], given: object, *, store: ContextStore, scope: Scope, on_missing: OnMissing
) -> Preparation:
    """Settle every handle of a prompt.

    Args:
        turns: The messages.
        given: A handle that was passed explicitly; None where none was.
        store: The engine's, for the ids of contexts that others hold.
        scope: Where handles are honoured.
        on_missing: What to do on the ladder's last rung.

    Raises:
        ContextLostError: `on_missing` is ``"error"``, and a context is lost.
    """
    fallbacks: list[Fallback] = []

    def lose(error: AvpError) -> None:
        if on_missing == "error":
            raise ContextLostError(f"A context of this prompt is lost: {error}") from error
        logger.warning("A context is lost, the answer is generated without it: %s", error)
        fallbacks.append(Fallback("lost", str(error)))

    known = _Known(store, scope)
    context = None
    if given is not None:
        try:
            context = yield Resolve(given, scope.honoured)
            known.add(context)
        except _UNRESOLVED as error:
            lose(error)

    found = yield from _resolve(turns, known, scope)
    prompt: list[Message] = []
    latent_steps = 0
    for turn, outcome in zip(turns, found, strict=True):
        if outcome is None:
            prompt.append(turn.message)
        elif isinstance(outcome, Context):
            prompt.append({**turn.message, "context": outcome})
        elif not turn.is_thought:
            fallbacks.append(Fallback("text", str(outcome)))
            prompt.append(turn.message)
        else:
            again = yield from _rethink(prompt, turn.recipe)
            if again is None:
                lose(outcome)
            else:
                latent_steps += len(again.lineage[-1])
                fallbacks.append(Fallback("rethink", str(outcome)))
                prompt.append({**turn.message, "context": again})
    return Prepared(prompt, context, tuple(fallbacks), latent_steps)


def _resolve(
    turns: Sequence[Turn], known: _Known, scope: Scope
) -> Generator[Resolve, Context, list[Context | AvpError | None]]:
    """Per turn: its context, why there is none, or None where the turn claims none.

    Later turns first: their contexts usually hold those of earlier turns, which then need no look-up.
    """
    found: list[Context | AvpError | None] = []
    for turn in reversed(turns):
        if turn.handle is None:
            found.append(None)
            continue
        if turn.is_edited:
            found.append(InvalidHandleError("The message was edited after its context was made."))
            continue
        try:
            context = known.find(turn.handle)
            if context is None:
                context = yield Resolve(turn.handle, scope.honoured)
                known.add(context)
            found.append(context)
        except _UNRESOLVED as error:
            found.append(error)
    return found[::-1]


def _rethink(prompt: list[Message], recipe: LatentRecipe | None) -> Generator[Rethink, Context, Context | None]:
    """The context of latent steps on `prompt`; None where there is nothing to think on, or no way to."""
    if recipe is None or not prompt:
        return None
    try:
        return (yield Rethink(prompt, recipe))
    except (ConfigurationError, ContextWindowError) as error:
        logger.warning("Cannot think again on the messages that are left: %s", error)
        return None


class _Known:
    """The contexts that were found, and the earlier ones that they hold, by handle id."""

    def __init__(self, store: ContextStore, scope: Scope) -> None:
        self._store, self._scope = store, scope
        self._holders: dict[str, tuple[Context, int]] = {}

    def add(self, context: Context) -> None:
        """Remember a context and every prefix of its lineage that may have a handle of its own."""
        for length, recipe_id in enumerate(context.recipe_ids, start=1):
            self._holders[self._store.namespace.handle_id(recipe_id, self._scope.minted)] = (context, length)

    def find(self, claimed: object) -> Context | None:
        """The context of a handle, if one that was found is it or holds it.

        Raises:
            InvalidHandleError: The handle is not well formed.
        """
        handle = ContextHandle.from_state(cast("Any", claimed))
        holder, length = self._holders.get(handle.id, (None, 0))
        if holder is None or length == len(holder.lineage):
            return holder
        held = Context(holder.fingerprint, holder.dtype, holder.lineage[:length])
        held.attach(handle=handle)
        return held
