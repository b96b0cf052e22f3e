"""The engines of this process, so that one can be found by the model whose context somebody holds."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    from avp_agents.engine.latent_engine import LatentEngine

_engines: WeakSet[LatentEngine] = WeakSet()
_lock = threading.Lock()


def add_engine(engine: LatentEngine) -> None:
    """Note an engine; it is forgotten when nobody holds it any more."""
    with _lock:
        _engines.add(engine)


def find_engine(fingerprint: str) -> LatentEngine | None:
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
