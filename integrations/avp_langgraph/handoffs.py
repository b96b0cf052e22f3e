"""From the handles on messages to the contexts they stand for, and what to do when one cannot be resolved.

A handle is looked up in the engine's store (the engine replays a lost KV-cache itself). Where the store does not have
it, the ladder goes on:

    held       a later message's context holds it: nothing is missing
    rethink    it stood for latent steps, and the messages it was thought on are there: think again on them
    text       it stood for an answer (or was edited), and the message has its text: that is read instead
    lost       neither: the answer is generated without it, with a warning, or `ContextLostError`

The same goes for a handle that was passed explicitly (`avp_context`), as nodes do with those of the `contexts` channel:
a message that carries it, too, makes up for it, else the messages that it was thought on, if the prompt begins with
them (`avp_langgraph.sources`).

`prepare` is written once, as a generator that asks for what has to wait for store or engine; `run` and `arun` carry
that out in threads and on event loops.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

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
from avp_agents.store.base import ContextStore
from avp_agents.tracing import span
from avp_agents.usage import HandoffMode
from avp_langgraph.messages import Turn
from avp_langgraph.scope import Scope
from avp_langgraph.sources import find_source

logger = logging.getLogger("avp_langgraph")

OnMissing = Literal["text", "error"]
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
    template: Mapping[str, Any] | None

    def call(self, engine: Engine) -> Context:
        """Think."""
        return engine.think(self.prompt, **asdict(self.recipe), chat_template_kwargs=self.template)

    async def acall(self, engine: Engine) -> Context:
        """Think without blocking the event loop."""
        return await engine.athink(self.prompt, **asdict(self.recipe), chat_template_kwargs=self.template)


Preparation = Generator[Resolve | Rethink, Context, Prepared]


def run(preparation: Preparation, engine: Engine) -> Prepared:
    """Carry out what `prepare` asks for."""
    ask = _advance(preparation)
    if isinstance(ask, Prepared):
        return ask
    with span("avp.handoff") as note:
        while not isinstance(ask, Prepared):
            try:
                answer = ask.call(engine)
            except AvpError as error:
                answer = error
            ask = _advance(preparation, answer)
        _note_on(note, ask)
        return ask


async def arun(preparation: Preparation, engine: Engine) -> Prepared:
    """`run` on an event loop."""
    ask = _advance(preparation)
    if isinstance(ask, Prepared):
        return ask
    with span("avp.handoff") as note:
        while not isinstance(ask, Prepared):
            try:
                answer = await ask.acall(engine)
            except AvpError as error:
                answer = error
            ask = _advance(preparation, answer)
        _note_on(note, ask)
        return ask


def _advance(preparation: Preparation, answer: Context | AvpError | None = None) -> Resolve | Rethink | Prepared:
    """Answer what was asked last. Returns what is asked next, or the end."""
    try:
        if isinstance(answer, AvpError):
            return preparation.throw(answer)
        return next(preparation) if answer is None else preparation.send(answer)
    except StopIteration as finished:
        return finished.value


def _note_on(note: Callable[[str, Any], None], prepared: Prepared) -> None:
    """What the span of a handoff says."""
    contexts = sum("context" in message for message in prepared.prompt) + (prepared.context is not None)
    note("avp.handoff.contexts", contexts)
    note("avp.handoff.fallbacks", [fallback.mode for fallback in prepared.fallbacks])
    note("avp.latent_steps", prepared.latent_steps)


def prepare(
    turns: Sequence[Turn],
    given: object,
    *,
    store: ContextStore,
    scope: Scope,
    on_missing: OnMissing,
    template: Mapping[str, Any] | None = None,
) -> Preparation:
    """Settle every handle of a prompt.

    Args:
        turns: The messages.
        given: A handle that was passed explicitly; None where none was.
        store: The engine's, for the ids of contexts that others hold.
        scope: Where handles are honoured.
        on_missing: What to do on the ladder's last rung.
        template: Options of the chat template for thinking again.

    Raises:
        ContextLostError: `on_missing` is ``"error"``, and a context is lost.
    """
    ladder, known = _Ladder(on_missing, template), _Known(store, scope)
    context = missing = None
    if given is not None:
        try:
            context = yield Resolve(given, scope.honoured)
            known.add(context)
        except _UNRESOLVED as error:
            missing = error

    found = yield from _resolve(turns, known, scope)
    prompt: list[Message] = []
    made_up: dict[str | None, Context | None] = {}
    for turn, outcome in zip(turns, found, strict=True):
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
        elif handle is None or (context := known.find(handle)) is None:
            messages, recipe = find_source(handle.source if handle else "", prompt)
            context = yield from ladder.rethink(messages, recipe, missing)
    return Prepared(prompt, context, tuple(ladder.taken), ladder.latent_steps)


class _Ladder:
    """Steps down from a context that cannot be resolved, and keeps account of them."""

    def __init__(self, on_missing: OnMissing, template: Mapping[str, Any] | None) -> None:
        self._on_missing, self._template = on_missing, template
        self.taken: list[Fallback] = []
        self.latent_steps = 0

    def read(self, reason: AvpError) -> None:
        """The message's text is read instead."""
        self.taken.append(Fallback("text", str(reason)))

    def rethink(
        self, prompt: Sequence[Message], recipe: LatentRecipe | None, reason: AvpError
    ) -> Generator[Rethink, Context, Context | None]:
        """The context of latent steps on `prompt`; None, and it is lost, where there is no way to make it again."""
        if recipe is None or not prompt:
            return self._lose(reason)
        try:
            again = yield Rethink(list(prompt), recipe, self._template)
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


def _resolve(
    turns: Sequence[Turn], known: _Known, scope: Scope
) -> Generator[Resolve, Context, list[Context | AvpError | None]]:
    """Per turn: its context, why there is none, or None where the turn claims none.

    Later turns first: their contexts usually hold those of earlier turns, which then need no look-up.
    """
    found: list[Context | AvpError | None] = []
    for turn in reversed(turns):
        if turn.handle is None:
            found.append(InvalidHandleError("The message of a thought carries no handle.") if turn.is_thought else None)
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


def _read_handle(claimed: object) -> ContextHandle | None:
    """A handle, None where it is not well formed."""
    try:
        return ContextHandle.from_state(cast("Any", claimed))
    except InvalidHandleError:
        return None


def _id_of(claimed: object) -> str | None:
    handle = _read_handle(claimed)
    return None if handle is None else handle.id
