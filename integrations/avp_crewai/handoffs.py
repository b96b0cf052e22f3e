"""What a call builds on: a context of its own task, those of the tasks before it, or one that it was given.

In this order, the first that can be resolved:

    own          an earlier call of the same task: a tool's result or a guardrail's objection continues its context
    predecessors the tasks whose outputs CrewAI put into the prompt; their text is left out where a context carries it
    delegation   the agent that delegated this task
    given        the context of the `handover` block

Where a predecessor has no context that can be used, its text stays in the prompt, and the metadata says why.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from crewai.context import get_current_task_id
from crewai.task import Task

from avp_agents.agent.ladder import Fallback, Ladder, OnMissing, Prepared
from avp_agents.agent.steps import Plan, in_thread
from avp_agents.agent.turns import Scope
from avp_agents.context import Context
from avp_agents.engine.protocol import Engine
from avp_agents.errors import AvpError, ContextLostError
from avp_agents.handle import ContextHandle
from avp_agents.prompt.chat_messages import Message
from avp_crewai.messages import what_follows, what_was_put_in
from avp_crewai.predecessors import HandedText, Predecessor, find_handed_text
from avp_crewai.runs import PastCall, Run, run_of

logger = logging.getLogger("avp_crewai")


@dataclass(frozen=True)
class Caller:
    """On whose behalf an LLM is called.

    Attributes:
        task: The task, where CrewAI says it.
        agent: The agent, where CrewAI says it.
    """

    task: Task | None
    agent: Any

    @property
    def crew(self) -> Any:
        """The agent's crew; None outside of crews."""
        return getattr(self.agent, "crew", None)

    @property
    def role(self) -> str:
        """The agent's role, for people."""
        return str(getattr(self.agent, "role", "") or "").strip()

    @property
    def key(self) -> str:
        """What the call's context is kept under; see `Run`."""
        if self.task is not None:
            return str(self.task.id)
        if current := get_current_task_id():
            return current
        return "" if self.agent is None else str(self.agent.id)

    @property
    def is_incidental(self) -> bool:
        """Whether CrewAI calls while a task runs, but not to work on it: to convert its output, to query knowledge."""
        return self.task is None and get_current_task_id() is not None

    @property
    def delegating_key(self) -> str | None:
        """The task whose agent delegated this one; None where the crew runs this one itself."""
        current = get_current_task_id()
        return current if self.task is not None and current != str(self.task.id) else None

    def handed_text(self, messages: list[Message]) -> HandedText | None:
        """What CrewAI put into the prompt for the task's predecessors."""
        return None if self.task is None else find_handed_text(self.task, self.crew, messages)

    def run(self) -> Run | None:
        """The run that the call belongs to."""
        return run_of(self.crew, get_current_task_id())


@dataclass(frozen=True)
class Basis:
    """A prompt, and what it is answered on.

    Attributes:
        prompt: What is new to the contexts.
        contexts: What the prompt builds on. Of several, none holds another.
        fallbacks: What could not be handed over as a context, and why.
        is_lost: Whether a given context was lost, with nothing to make up for it.
        put_in: The text that CrewAI put into the task's prompt, for predecessors or because a guardrail objected.
        continued: The call of the same task that is continued.
        as_text: The same call without contexts of predecessors, in case those do not fit the window.
    """

    prompt: list[Message]
    contexts: tuple[Context, ...] = ()
    fallbacks: tuple[str, ...] = ()
    is_lost: bool = False
    put_in: str = ""
    continued: PastCall | None = None
    as_text: Basis | None = None

    @property
    def prepared(self) -> Prepared:
        """The same, to tell which rung of the ladder was taken: beside a context, text is none."""
        if self.contexts or not self.fallbacks:
            return Prepared(self.prompt, None)
        fallback = Fallback("lost" if self.is_lost else "text", "; ".join(self.fallbacks))
        return Prepared(self.prompt, None, (fallback,))


def find_basis(
    caller: Caller, run: Run | None, messages: list[Message], engine: Engine, on_missing: OnMissing
) -> Plan[Basis]:
    """Find what a call builds on.

    Raises:
        ContextLostError: `on_missing` is ``"error"``, and a context is lost.
    """
    handed = yield from in_thread(caller.handed_text, messages)
    plain = Basis(messages, put_in="" if handed is None else handed.text)
    if run is None:
        return plain
    found = _Lookup(engine, run, on_missing)
    basis = (yield from _own(caller, messages, plain, found)) or (
        yield from _predecessors(handed, messages, plain, found)
    )
    basis = basis or (yield from _delegation(caller, plain, found))
    if basis is None and handed is None:
        basis = yield from _given(caller, plain, found)
    return basis or replace(plain, fallbacks=tuple(found.fallbacks))


class _Lookup:
    """Resolves handles, and notes what could not be resolved."""

    def __init__(self, engine: Engine, run: Run, on_missing: OnMissing) -> None:
        self.run = run
        self.fallbacks: list[str] = []
        self._ladder, self._on_missing = Ladder(engine, Scope(run.scope, run.scope), on_missing), on_missing

    def context(self, handle: ContextHandle, what: str) -> Plan[Context | None]:
        found = yield from self._ladder.resolve(handle)
        if isinstance(found, Context):
            return found
        if self._on_missing == "error" and isinstance(found, ContextLostError):
            raise ContextLostError(f"The context of {what} is lost: {found}") from found
        self.fall_back(what, found)
        return None

    def fall_back(self, what: str, reason: AvpError | str) -> None:
        level = logging.WARNING if isinstance(reason, AvpError) else logging.INFO
        logger.log(level, "No context of %s is handed over: %s", what, reason)
        self.fallbacks.append(f"{what}: {reason}")


def _own(caller: Caller, messages: list[Message], plain: Basis, found: _Lookup) -> Plan[Basis | None]:
    for turn in found.run.turns_of(caller.key):
        new, put_in = what_follows(turn.messages, turn.answer, messages), plain.put_in
        if new is None:
            new = what_was_put_in(turn.messages, turn.put_in, messages)
            put_in = "" if new is None else new[0]["content"]
        if new is None:
            continue
        context = yield from found.context(turn.handle, "the agent's own conversation")
        if context is not None:
            return replace(plain, prompt=new, contexts=(context,), put_in=put_in, continued=turn)
    return None


def _predecessors(
    handed: HandedText | None, messages: list[Message], plain: Basis, found: _Lookup
) -> Plan[Basis | None]:
    if handed is None:
        return None
    contexts: dict[str, Context] = {}
    for predecessor in handed.predecessors:
        context = yield from _context_of(predecessor, found)
        if context is not None:
            contexts[predecessor.key] = context
    if not contexts:
        return None
    base = _not_held_by_others(list(contexts.values()))
    as_text = [p for p in handed.predecessors if p.key not in contexts]
    return replace(
        plain,
        prompt=handed.reduced_to(as_text, messages),
        contexts=tuple(base),
        fallbacks=tuple(found.fallbacks),
        as_text=replace(plain, fallbacks=("all predecessors: their contexts do not fit the model's window",)),
    )


def _context_of(predecessor: Predecessor, found: _Lookup) -> Plan[Context | None]:
    what = f"task {predecessor.name!r}"
    turn = found.run.turn_that_put_out(predecessor.key, predecessor.output.raw)
    if turn is not None:
        return (yield from found.context(turn.handle, what))
    if found.run.turns_of(predecessor.key):
        found.fall_back(what, "its output is not what its LLM answered")
    else:
        found.fall_back(what, "it left no context")
    return None


def _not_held_by_others(contexts: Sequence[Context]) -> list[Context]:
    """The contexts without those that another one extends, or repeats."""
    kept: list[Context] = []
    for i, context in enumerate(contexts):
        others = [*kept, *contexts[i + 1 :]]
        if not any(other.extends(context) for other in others):
            kept.append(context)
    return kept


def _delegation(caller: Caller, plain: Basis, found: _Lookup) -> Plan[Basis | None]:
    key = caller.delegating_key
    turns = [] if key is None else found.run.turns_of(key)
    if not turns:
        return None
    context = yield from found.context(turns[0].handle, "the delegating agent")
    if context is None:
        return None
    too_long = "the delegating agent: its context does not fit the model's window"
    return replace(
        plain,
        contexts=(context,),
        fallbacks=tuple(found.fallbacks),
        as_text=replace(plain, fallbacks=(too_long,)),
    )


def _given(caller: Caller, plain: Basis, found: _Lookup) -> Plan[Basis | None]:
    if found.run.given is None or caller.is_incidental:
        return None
    context = yield from found.context(found.run.given, "the given context")
    if context is None:
        return replace(plain, is_lost=True, fallbacks=tuple(found.fallbacks))
    return replace(plain, contexts=(context,), fallbacks=tuple(found.fallbacks))
