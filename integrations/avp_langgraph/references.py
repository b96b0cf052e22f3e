"""Which contexts checkpoints refer to, and how a copied checkpoint comes to refer to others.

Handles lie in channels, in the metadata of messages, in pending writes, in the arguments of a `Send`: anywhere in a
value. Values come from the checkpointer, which deserialises them by its own rules; nothing is deserialised here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from langgraph.checkpoint.base import Checkpoint, CheckpointTuple
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer

from avp_agents.errors import ConfigurationError
from avp_agents.handle import HANDLE_ID

_COLLECTIONS = (list, tuple, Set, deque)
_PLAIN = (bytes, bytearray, int, float, bool, type(None), type)


@dataclass(frozen=True)
class CheckpointReferences:
    """The handles that one checkpoint and its pending writes refer to.

    Attributes:
        thread, namespace, checkpoint: Where it is.
        run: The ``run_id`` in its metadata, None where there is none.
        has_deltas: Whether it stores changes since older checkpoints, whose writes then belong to its state.
        ids: Ids of handles.
    """

    thread: str
    namespace: str
    checkpoint: str
    run: str | None
    has_deltas: bool
    ids: frozenset[str]


def read_references(saved: CheckpointTuple) -> CheckpointReferences:
    """The handles in a checkpoint's channels and pending writes."""
    place = saved.config.get("configurable", {})
    run = saved.metadata.get("run_id")
    return CheckpointReferences(
        thread=str(place["thread_id"]),
        namespace=str(place.get("checkpoint_ns", "")),
        checkpoint=saved.checkpoint["id"],
        run=None if run is None else str(run),
        has_deltas=bool(saved.metadata.get("counters_since_delta_snapshot")),
        ids=frozenset(handle_ids((saved.checkpoint, saved.pending_writes))),
    )


def all_ids(references: Iterable[CheckpointReferences]) -> set[str]:
    """The handles that any of these checkpoints refers to."""
    return {handle_id for reference in references for handle_id in reference.ids}


def handle_ids(value: Any) -> Iterator[str]:
    """Everything in a value that reads like a handle's id, also inside longer strings.

    A collector errs on the side of keeping: a message may quote a handle, and a state may hold one as JSON text.
    """
    pending, seen = deque([value]), dict[int, Any]()
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            yield from HANDLE_ID.findall(item)
        elif not isinstance(item, _PLAIN) and id(item) not in seen:
            seen[id(item)] = item
            pending.extend(_parts(item))


def _parts(item: Any) -> Iterable[Any]:
    """What a collection or an object holds."""
    if isinstance(item, Mapping):
        return (*item.keys(), *item.values())
    if isinstance(item, _COLLECTIONS):
        return item
    slots = [name for cls in type(item).__mro__ for name in _names(cls.__dict__.get("__slots__", ()))]
    return (*getattr(item, "__dict__", {}).values(), *(getattr(item, name, None) for name in slots))


def _names(slots: str | Iterable[str]) -> Iterable[str]:
    names = (slots,) if isinstance(slots, str) else slots
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def referring_to(checkpoint: Checkpoint, ids: Mapping[str, str], serde: SerializerProtocol) -> Checkpoint:
    """The checkpoint with other handles in its channels: those that are keys of `ids` become their values."""
    values = {name: replace_ids(value, ids, serde) for name, value in checkpoint["channel_values"].items()}
    return {**checkpoint, "channel_values": values}


def replace_ids(value: Any, ids: Mapping[str, str], serde: SerializerProtocol) -> Any:
    """A value with other handles.

    All ids have one length, so that they can be replaced in the serialised value, wherever in it they are.

    Raises:
        ConfigurationError: The serializer hides its strings, so that they cannot be replaced.
    """
    if not any(handle_id in ids for handle_id in handle_ids(value)):
        return value
    plain = serde.serde if isinstance(serde, EncryptedSerializer) else serde
    kind, data = plain.dumps_typed(value)
    for old, new in ids.items():
        data = data.replace(old.encode(), new.encode())
    replaced = plain.loads_typed((kind, data))
    if any(handle_id in ids for handle_id in handle_ids(replaced)):
        raise ConfigurationError(
            f"Handles cannot be replaced in what {type(plain).__name__} writes. Let the chat models use scope='user', "
            "and copy the thread by the checkpointer's own means."
        )
    return replaced
