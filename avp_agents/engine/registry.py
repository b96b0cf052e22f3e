"""One engine per model, options and namespace in a process, however many chat models ask for it.

Chat models hold no weights: they look their engine up here when they are first called. Two threads that ask at once get
the same engine; asking for one model does not wait for another one to load. The engines of one model's namespaces share
its weights and batches, but no context and no KV-cache (`LatentEngine.for_store`).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from avp_agents.engine.protocol import Engine
from avp_agents.errors import ConfigurationError

if TYPE_CHECKING:
    from avp_agents.engine.latent_engine import LatentEngine


@dataclass
class _Slot:
    """A model's engines by namespace; whoever holds the lock may be about to load it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    engines: dict[str, LatentEngine] = field(default_factory=dict)


_slots: dict[str, _Slot] = {}
_slots_lock = threading.Lock()


def shared_engine(
    model: str | None = None, options: Mapping[str, Any] | None = None, *, namespace: str | None = None
) -> Engine:
    """The process's engine for `model`, made by ``LatentEngine.from_pretrained(model, **options)`` at the first call.

    Args:
        model: Name or folder of a Hugging Face model; None is the embedded default model.
        options: JSON data, such as ``{"dtype": "bfloat16", "device": "cuda"}``.
        namespace: The tenant whose store and KV-caches it uses; None is the default one.

    Raises:
        ConfigurationError: The options are not JSON data.
        ModelError: The model cannot be found or is not supported.
    """
    given = dict(options or {})
    tenant = namespace or "default"
    slot = _slot_of(model, given)
    with slot.lock:
        if tenant not in slot.engines:
            from avp_agents.engine.latent_engine import LatentEngine
            from avp_agents.store import default_store

            store = default_store(namespace=tenant)
            loaded = next(iter(slot.engines.values()), None)
            slot.engines[tenant] = (
                LatentEngine.from_pretrained(model, store=store, **given) if loaded is None else loaded.for_store(store)
            )
        return slot.engines[tenant]


def close_engines() -> None:
    """Close every shared engine and forget it; the next call of a chat model loads its engine again."""
    with _slots_lock:
        slots = list(_slots.values())
        _slots.clear()
    for slot in slots:
        with slot.lock:
            for engine in slot.engines.values():
                engine.close()


def _slot_of(model: str | None, options: dict[str, Any]) -> _Slot:
    try:
        key = json.dumps([model, options], sort_keys=True)
    except TypeError as error:
        raise ConfigurationError(
            f"engine_options must be JSON data ({error}). For a store, a device map of objects or the like, build the "
            "engine yourself and pass it to the chat model: engine=LatentEngine.from_pretrained(...)."
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
