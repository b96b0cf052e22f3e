"""Contexts live as long as the checkpoints that refer to them.

    lifetimes = ContextLifetimes(store, checkpointer)
    lifetimes.sweep()                           # now and then: removes what no checkpoint refers to
    lifetimes.delete_thread("thread-1")         # the checkpointer's own verbs, for both
    lifetimes.copy_thread("thread-2", "thread-3")

It stands beside the checkpointer, not around it: graphs use their checkpointer as it is, no write waits for the store,
and what is deleted behind its back is found by the next sweep. A context that is gone all the same is no failure. The
next agent climbs down the ladder (`avp_agents.agent.ladder`) and says so.

Every verb is written once, as a plan (`avp_agents.agent.steps`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple

from avp_agents.agent.steps import Plan, arun, ask, run
from avp_agents.errors import ConfigurationError, ContextLostError
from avp_agents.store.base import ContextStore, PruneReport
from avp_langgraph.calls import thread_scope
from avp_langgraph.references import (
    CheckpointReferences,
    all_ids,
    handle_ids,
    read_references,
    referring_to,
    replace_ids,
)

logger = logging.getLogger("avp_langgraph")

Result = TypeVar("Result")
PruneStrategy = Literal["keep_latest", "delete"]

DEFAULT_GRACE = 3600.0
"""Seconds that a context may be idle before a sweep asks whether a checkpoint refers to it."""


@dataclass(frozen=True)
class LifetimeReport:
    """What a verb did.

    Attributes:
        removed: What left the store; in a dry run, what would have.
        live: Distinct contexts that the checkpoints that were looked at still refer to.
        checkpoints_stay: The checkpointer does not know the verb: only the store has forgotten.
    """

    removed: PruneReport = field(default_factory=PruneReport)
    live: int = 0
    checkpoints_stay: bool = False


class ContextLifetimes:
    """Keeps a store to what checkpoints refer to.

    Args:
        store: The store of the graphs' chat models (``model.engine.store``), or another one on the same backend and of
            the same namespace.
        *checkpointers: Every checkpointer whose graphs put contexts into this namespace. A sweep takes what none of
            them refers to for garbage; what is referred to from elsewhere has to be pinned (`ContextStore.pin`). Give
            an application a namespace of its own.

    Example:
        >>> lifetimes = ContextLifetimes(store, checkpointer)
        >>> lifetimes.sweep(dry_run=True).removed.contexts
        12

    The a-prefixed twins use the checkpointers' own asynchronous methods.
    """

    def __init__(self, store: ContextStore, *checkpointers: BaseCheckpointSaver[Any]) -> None:
        if not checkpointers:
            raise ConfigurationError("Without a checkpointer everything would be garbage; pass at least one.")
        self.store = store
        self.checkpointers = checkpointers

    def sweep(self, *, grace: float = DEFAULT_GRACE, dry_run: bool = False) -> LifetimeReport:
        """Remove every unpinned context that no checkpoint and no pending write refers to.

        Args:
            grace: Seconds that a context is spared after its last use, since it is put before its checkpoint is
                written. Longer than a node runs; with ``durability="exit"``, longer than a graph runs.
            dry_run: Remove nothing; report what would be.
        """
        return run(self._sweep(grace, dry_run))

    async def asweep(self, *, grace: float = DEFAULT_GRACE, dry_run: bool = False) -> LifetimeReport:
        """Asynchronous `sweep`."""
        return await arun(self._sweep(grace, dry_run))

    def delete_thread(self, thread_id: str) -> LifetimeReport:
        """Delete a thread's checkpoints and the contexts that were minted for it, referred to or not.

        Contexts minted for a user (chat models with ``scope="user"``) may serve that user's other threads; the next
        sweep takes those that do not. Pinned ones stay.
        """
        return run(self._delete_threads([thread_id]))

    async def adelete_thread(self, thread_id: str) -> LifetimeReport:
        """Asynchronous `delete_thread`."""
        return await arun(self._delete_threads([thread_id]))

    def delete_for_runs(self, run_ids: Sequence[str]) -> LifetimeReport:
        """Delete the checkpoints of runs, and the contexts that only those refer to.

        A checkpointer that does not know the verb keeps its checkpoints; time travel to those goes down the ladder.

        Args:
            run_ids: As in the metadata of the checkpoints (``run_id``).
        """
        return run(self._delete_for_runs(run_ids))

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> LifetimeReport:
        """Asynchronous `delete_for_runs`."""
        return await arun(self._delete_for_runs(run_ids))

    def prune(self, thread_ids: Sequence[str], *, strategy: PruneStrategy = "keep_latest") -> LifetimeReport:
        """Prune threads, and remove the contexts that only pruned checkpoints refer to.

        A checkpointer that does not know the verb (of LangGraph's own all but Postgres) keeps its checkpoints, which
        are small; time travel to those goes down the ladder.

        Args:
            thread_ids: Which threads.
            strategy: ``"keep_latest"`` keeps the latest checkpoint of each namespace, with all that it is built from;
                ``"delete"`` is `delete_thread`.

        Raises:
            ConfigurationError: The strategy is unknown.
        """
        return run(self._prune(thread_ids, strategy))

    async def aprune(self, thread_ids: Sequence[str], *, strategy: PruneStrategy = "keep_latest") -> LifetimeReport:
        """Asynchronous `prune`."""
        return await arun(self._prune(thread_ids, strategy))

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> int:
        """Copy a thread's checkpoints and pending writes to a new thread, which may use the contexts from then on.

        A handle is honoured only in the thread it was minted for. The copy therefore refers to handles of its own; the
        contexts behind them are stored once. A context that is lost already stays lost in the copy. The checkpoints
        keep their ids.

        Returns:
            The number of handles minted for the new thread.

        Raises:
            ConfigurationError: The target has checkpoints already, or a serializer hides its strings.
        """
        return run(self._copy_thread(source_thread_id, target_thread_id))

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> int:
        """Asynchronous `copy_thread`."""
        return await arun(self._copy_thread(source_thread_id, target_thread_id))

    def _sweep(self, grace: float, dry_run: bool) -> Plan[LifetimeReport]:
        live = all_ids((yield from self._references()))
        stored = yield from _call(self.store, "list")
        garbage = [handle.id for handle in stored if handle.id not in live]
        removed = yield from _call(self.store, "discard", garbage, idle=grace, dry_run=dry_run)
        return LifetimeReport(removed, len(live))

    def _delete_threads(self, thread_ids: Sequence[str]) -> Plan[LifetimeReport]:
        minted: list[str] = []
        for thread_id in thread_ids:
            for checkpointer in self.checkpointers:
                yield from _call(checkpointer, "delete_thread", thread_id)
            handles = yield from _call(self.store, "list", scope=thread_scope(thread_id))
            minted += [handle.id for handle in handles]
        return LifetimeReport((yield from _call(self.store, "discard", minted)))

    def _delete_for_runs(self, run_ids: Sequence[str]) -> Plan[LifetimeReport]:
        runs = set(run_ids)
        references = yield from self._references()
        going = [reference for reference in references if reference.run in runs]
        return (yield from self._forget(going, references, "delete_for_runs", list(run_ids)))

    def _prune(self, thread_ids: Sequence[str], strategy: PruneStrategy) -> Plan[LifetimeReport]:
        if strategy == "delete":
            return (yield from self._delete_threads(thread_ids))
        if strategy != "keep_latest":
            raise ConfigurationError(f"strategy must be 'keep_latest' or 'delete', not {strategy!r}.")
        references = yield from self._references()
        own = [reference for reference in references if reference.thread in set(thread_ids)]
        with_deltas = {reference.thread for reference in own if reference.has_deltas}
        latest: dict[tuple[str, str], str] = {}
        for reference in own:
            place = (reference.thread, reference.namespace)
            latest[place] = max(latest.get(place, ""), reference.checkpoint)
        going = [
            reference
            for reference in own
            if reference.checkpoint != latest[reference.thread, reference.namespace]
            and reference.thread not in with_deltas
        ]
        return (yield from self._forget(going, references, "prune", list(thread_ids), strategy=strategy))

    def _forget(
        self,
        going: Sequence[CheckpointReferences],
        references: Sequence[CheckpointReferences],
        verb: str,
        ids: list[str],
        **options: str,
    ) -> Plan[LifetimeReport]:
        """Carry out a checkpointer's verb, and remove what only the checkpoints that go with it refer to."""
        gone = set(going)
        live = all_ids(reference for reference in references if reference not in gone)
        stay = False
        for checkpointer in self.checkpointers:
            try:
                yield from _call(checkpointer, verb, ids, **options)
            except NotImplementedError:
                stay = True
                name = type(checkpointer).__name__
                logger.warning("%s cannot %s here: its checkpoints stay, their contexts are removed.", name, verb)
        removed = yield from _call(self.store, "discard", sorted(all_ids(going) - live))
        return LifetimeReport(removed, len(live), stay)

    def _references(self) -> Plan[list[CheckpointReferences]]:
        found: list[CheckpointReferences] = []
        for checkpointer in self.checkpointers:
            found += yield from _walk(checkpointer, None, read_references)
        return found

    def _copy_thread(self, source: str, target: str) -> Plan[int]:
        ids: dict[str, str] = {}
        for checkpointer in self.checkpointers:
            if (yield from _walk(checkpointer, _place(target), _whole, limit=1)):
                raise ConfigurationError(f"Thread {target!r} has checkpoints already; copy to a new thread.")
            newest_first = yield from _walk(checkpointer, _place(source), _whole)
            referred = {i for saved in newest_first for i in handle_ids((saved.checkpoint, saved.pending_writes))}
            yield from self._mint(referred - ids.keys(), source, target, ids)
            for saved in reversed(newest_first):
                yield from _copy_checkpoint(checkpointer, saved, target, ids)
        return len(ids)

    def _mint(self, handles: Iterable[str], source: str, target: str, ids: dict[str, str]) -> Plan[None]:
        """Put the contexts of one thread for another one, too; note which handle stands for which."""
        for handle_id in sorted(handles):
            try:
                context = yield from _call(self.store, "get", handle_id, scope=thread_scope(source))
            except ContextLostError:
                continue
            old = context.to_handle()
            label = {"scope": thread_scope(target), "agent": old.agent, "text": old.text}
            new = yield from _call(self.store, "put", context, **label)
            ids[handle_id] = new.id


def _call(target: Any, verb: str, *arguments: Any, **options: Any) -> Plan[Any]:
    """Call a method of a checkpointer or store, or on an event loop its a-prefixed twin."""
    return (yield from ask(getattr(target, verb), getattr(target, f"a{verb}"), *arguments, **options))


def _walk(
    checkpointer: BaseCheckpointSaver[Any],
    config: RunnableConfig | None,
    read: Callable[[CheckpointTuple], Result],
    limit: int | None = None,
) -> Plan[list[Result]]:
    """Go through a checkpointer's checkpoints, newest first, and read something off each."""

    def walk() -> list[Result]:
        return [read(saved) for saved in checkpointer.list(config, limit=limit)]

    async def awalk() -> list[Result]:
        return [read(saved) async for saved in checkpointer.alist(config, limit=limit)]

    return (yield from ask(walk, awalk))


def _copy_checkpoint(
    checkpointer: BaseCheckpointSaver[Any], saved: CheckpointTuple, target: str, ids: dict[str, str]
) -> Plan[None]:
    """Put a checkpoint and its pending writes under another thread."""
    namespace = saved.config.get("configurable", {}).get("checkpoint_ns", "")
    parent = (saved.parent_config or {}).get("configurable", {}).get("checkpoint_id")
    checkpoint = referring_to(saved.checkpoint, ids, checkpointer.serde)
    arguments = (_place(target, namespace, parent), checkpoint, saved.metadata, checkpoint["channel_versions"])
    place = yield from _call(checkpointer, "put", *arguments)
    writes: dict[str, list[tuple[str, Any]]] = {}
    for task_id, channel, value in saved.pending_writes or []:
        writes.setdefault(task_id, []).append((channel, replace_ids(value, ids, checkpointer.serde)))
    # the path's only use is the order of tasks, which is the order that they came in
    for order, (task_id, of_task) in enumerate(writes.items()):
        yield from _call(checkpointer, "put_writes", place, of_task, task_id, f"{order:06d}")


def _place(thread_id: str, namespace: str | None = None, checkpoint_id: str | None = None) -> RunnableConfig:
    place = {"thread_id": thread_id, "checkpoint_ns": namespace, "checkpoint_id": checkpoint_id}
    return {"configurable": {name: value for name, value in place.items() if value is not None}}


def _whole(saved: CheckpointTuple) -> CheckpointTuple:
    return saved
