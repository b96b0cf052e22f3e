"""Engines whose weights are in this process; each can be found by the model whose context somebody holds."""

from __future__ import annotations

import os
import threading
from abc import abstractmethod
from typing import Self
from weakref import WeakSet

from avp_agents.crossing.sides import Crossing
from avp_agents.engine.verbs import EngineVerbs
from avp_agents.store import ContextStore


class LocalEngine(EngineVerbs):
    """An engine that can tell others of its contexts, and answer on them for any tenant."""

    @property
    @abstractmethod
    def loaded_fingerprint(self) -> str | None:
        """As `fingerprint`, but None where the weights are not loaded, or not any more."""

    @property
    @abstractmethod
    def crossing(self) -> Crossing:
        """What this model tells others of its contexts, and how it takes theirs."""

    @abstractmethod
    def for_store(self, store: ContextStore) -> Self:
        """This engine for another tenant: the same weights, batches and KV memory, with a store of its own."""


_engines: WeakSet[LocalEngine] = WeakSet()
_lock = threading.Lock()


def add_engine(engine: LocalEngine) -> None:
    """Note an engine; it is forgotten when nobody holds it any more."""
    with _lock:
        _engines.add(engine)


def find_engine(fingerprint: str) -> LocalEngine | None:
    """An open engine of this process that has loaded the model with this fingerprint."""
    with _lock:
        engines = list(_engines)
    return next((engine for engine in engines if engine.loaded_fingerprint == fingerprint), None)


def _forget_after_fork() -> None:
    """An engine belongs to the process that made it, and the lock may have been held when the process was forked."""
    global _lock
    _engines.clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
