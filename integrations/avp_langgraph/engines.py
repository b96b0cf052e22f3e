"""One engine per model, options and namespace in a process, however many chat models ask for it.

Chat models hold no weights: they look their engine up here when they are first called. Two threads that ask at once get
the same engine; asking for one model does not wait for another one to load.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from avp_agents.engine.base import Engine
from avp_agents.errors import ConfigurationError


@dataclass
class _Slot:
    """An engine that is loaded, or is about to be by whoever holds the lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    engine: Engine | None = None


_slots: dict[str, _Slot] = {}
_slots_lock = threading.Lock()


def shared_engine(
    model: str | None = None, options: Mapping[str, Any] | None = None, *, namespace: str | None = None
) -> Engine:
    """The process's engine for `model`, made by ``LatentEngine.from_pretrained(model, **options)`` at the first call.

    Args:
        model: Name or folder of a Hugging Face model; None is the embedded default model.
        options: JSON data, such as ``{"dtype": "bfloat16", "device": "cuda"}``.
        namespace: The tenant whose store and KV-caches it uses; None is the default one. Each has an engine of its own.

    Raises:
        ConfigurationError: The options are not JSON data.
        ModelError: The model cannot be found or is not supported.
    """
    given = dict(options or {})
    slot = _slot_of(model, given, namespace)
    with slot.lock:
        if slot.engine is None:
            from avp_agents.engine.latent_engine import LatentEngine
            from avp_agents.store import default_store

            store = default_store(namespace=namespace or "default")
            slot.engine = LatentEngine.from_pretrained(model, store=store, **given)
        return slot.engine


def close_engines() -> None:
    """Close every shared engine and forget it; the next call of a chat model loads its engine again."""
    with _slots_lock:
        slots = list(_slots.values())
        _slots.clear()
    for slot in slots:
        with slot.lock:
            if slot.engine is not None:
                slot.engine.close()


def _slot_of(model: str | None, options: dict[str, Any], namespace: str | None) -> _Slot:
    try:
        key = json.dumps([model, options, namespace], sort_keys=True)
    except TypeError as error:
        raise ConfigurationError(
            f"engine_options must be JSON data ({error}). For a store, a device map of objects or the like, build the "
            "engine yourself and pass it: AvpChatModel(engine=LatentEngine.from_pretrained(...))."
        ) from error
    with _slots_lock:
        return _slots.setdefault(key, _Slot())


def _forget_after_fork() -> None:
    """An engine belongs to the process that made it, and a lock may have been held when the process was forked."""
    global _slots_lock
    _slots.clear()
    _slots_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
