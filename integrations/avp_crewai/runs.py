"""The contexts of one kickoff, or of one `handover` block: which call made which, and when they are released.

A kickoff's contexts are deleted from their stores when it ends. Contexts that are to outlive it, or that a flow's state
is to hold, are made inside of a `handover` block, and belong to whoever opened it:

    with handover() as made:
        crew.kickoff()
    self.state.research = made.handle.to_state()

    with handover(self.state.research):
        answer = llm.call("What follows from that?")

A run holds handles only, never a context or its KV-cache. Two crews never see each other's contexts: a run belongs to
one crew, and its contexts are found by the ids of that crew's tasks.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from crewai.hooks.contexts import ExecutionEndContext
from crewai.hooks.dispatch import InterceptionPoint, get_global_hook_list

from avp_agents.context import Context
from avp_agents.handle import ContextHandle
from avp_agents.prompt.chat_messages import Message
from avp_agents.store.base import ContextStore
from avp_crewai.messages import Answer


@dataclass(frozen=True, eq=False)
class PastCall:
    """One call of an LLM, and the context it left.

    Attributes:
        key: The task it belongs to; see `Run`.
        messages: What CrewAI sent.
        put_in: The part of that which CrewAI had put in, for predecessors or because a guardrail objected.
        tools: The tools that were offered.
        answer: What the LLM answered.
        outputs: The task outputs that CrewAI may make of that answer.
        handle: The context.
        store: Where it is.
        metadata: How the answer came about, as in the events' ``usage["avp"]``.
    """

    key: str
    messages: list[Message]
    put_in: str
    tools: Sequence[dict[str, Any]]
    answer: Answer
    outputs: frozenset[str]
    handle: ContextHandle
    store: ContextStore
    metadata: Mapping[str, Any]


@dataclass(eq=False)
class Run:
    """The calls of one kickoff, or of one `handover` block, by key: a task's id, else an agent's, else empty.

    Attributes:
        scope: Where its handles are minted and honoured.
        given: A context to begin with.
        keeps: Whether its contexts outlive it.
    """

    scope: str
    given: ContextHandle | None = None
    keeps: bool = False
    _turns: list[PastCall] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def turns(self) -> list[PastCall]:
        """All of them, oldest first."""
        with self._lock:
            return list(self._turns)

    def turns_of(self, key: str) -> list[PastCall]:
        """Those of one task (or agent), newest first."""
        return [turn for turn in reversed(self.turns) if turn.key == key]

    def keep(
        self,
        context: Context,
        store: ContextStore,
        note: Callable[[ContextHandle], PastCall],
        continued: PastCall | None = None,
        *,
        agent: str,
        text: str,
    ) -> PastCall:
        """Store a call's context, and note the call. A context that it continued, and thereby holds, is released.

        Args:
            context: What the call left.
            store: Where to put it.
            note: Makes the call's `PastCall` of its handle.
            continued: The call whose context it continued; a run that keeps contexts does not release it.
            agent, text: What people read beside its handle.
        """
        with self._lock:  # equal calls have equal handles: nobody may delete one between its put and its note
            turn = note(store.put(context, scope=self.scope, agent=agent, text=text))
            self._turns.append(turn)
            if continued in self._turns and not self.keeps:
                self._turns.remove(continued)
                if continued.handle.id not in {other.handle.id for other in self._turns}:
                    store.delete(continued.handle)
        return turn

    def turn_that_put_out(self, key: str, output: str) -> PastCall | None:
        """The newest call of a task whose answer is the task's output; None if the output is something else."""
        return next((turn for turn in self.turns_of(key) if output.strip() in turn.outputs), None)

    def release(self) -> None:
        """Delete all contexts of this run from their stores."""
        with self._lock:
            turns, self._turns = self._turns, []
        for turn in turns:
            turn.store.delete(turn.handle)


class Handover:
    """What was made inside of a `handover` block."""

    def __init__(self, run: Run) -> None:
        self._run = run

    @property
    def handle(self) -> ContextHandle | None:
        """The handle of the newest context; None while there is none."""
        turns = self._run.turns
        return turns[-1].handle if turns else None

    @property
    def handles(self) -> dict[str, ContextHandle]:
        """The newest handle of each task, by the task's id (of agents outside of tasks: by the agent's id)."""
        return {turn.key: turn.handle for turn in self._run.turns}

    @property
    def calls(self) -> list[dict[str, Any]]:
        """How each answer came about, in order; what the completed events carry in ``usage["avp"]``."""
        return [dict(turn.metadata) for turn in self._run.turns]

    def release(self) -> None:
        """Delete the contexts that were made inside of the block."""
        self._run.release()


_block: ContextVar[Run | None] = ContextVar("avp_crewai_handover", default=None)
_kickoffs: dict[str, Run] = {}
_kickoffs_lock = threading.Lock()


@contextmanager
def handover(context: ContextHandle | Mapping[str, Any] | str | None = None, *, scope: str = "") -> Iterator[Handover]:
    """Begin on a context, and keep the contexts that are made, for everything that runs inside of the block.

    It works for `Crew.kickoff`, `Agent.kickoff` and `AvpLLM.call`, in threads and tasks that CrewAI starts, too. Calls
    inside that build on no earlier task begin on `context`. The contexts belong to whoever opened the block, until
    `Handover.release`, or until the store drops them (``ttl``, ``byte_budget``).

    Args:
        context: A handle, as a `ContextHandle`, as state has it (`ContextHandle.to_state`), or its id.
        scope: Whom the contexts belong to, such as a flow's or a user's id. `context` is honoured only if it was made
            under the same scope.

    Raises:
        InvalidHandleError: `context` is not a handle.

    Example:
        >>> with handover(self.state.research, scope=self.state.id) as made:
        ...     self.state.answer = solver.call("What is the result?")
        >>> self.state.solution = made.handle.to_state()
    """
    given = None if context is None else ContextHandle.from_state(_plain(context))
    run = Run(scope, given, keeps=True)
    token = _block.set(run)
    try:
        yield Handover(run)
    finally:
        _block.reset(token)


def _plain(context: ContextHandle | Mapping[str, Any] | str) -> Any:
    return dict(context) if isinstance(context, Mapping) else context


def run_of(crew: Any, task_id: str | None) -> Run | None:
    """The run that a call belongs to; None outside of crews and `handover` blocks.

    Args:
        crew: The crew of the agent that calls, if there is one.
        task_id: The task that runs, where the call does not say whose it is.
    """
    if block := _block.get():
        return block
    if hasattr(crew, "kickoff"):
        return _run_of_crew(crew)
    if task_id is None:
        return None
    with _kickoffs_lock:
        runs = list(_kickoffs.values())
    return next((run for run in runs if run.turns_of(task_id)), None)


def _run_of_crew(crew: Any) -> Run:
    key = str(crew.id)
    with _kickoffs_lock:
        if key in _kickoffs:
            return _kickoffs[key]
        hooks = get_global_hook_list(InterceptionPoint.EXECUTION_END)
        if _release_ended not in hooks:
            hooks.append(_release_ended)
        # a crew that is dropped in the middle of a kickoff never says that it ended
        weakref.finalize(crew, _release, key).atexit = False
        run = _kickoffs[key] = Run(scope=f"crew:{key}")
        return run


def _release_ended(ended: ExecutionEndContext) -> None:
    """CrewAI calls this when a kickoff has ended, well or not, before it returns."""
    if ended.crew is not None:
        _release(str(ended.crew.id))


def _release(key: str) -> None:
    with _kickoffs_lock:
        run = _kickoffs.pop(key, None)
    if run is not None:
        run.release()
