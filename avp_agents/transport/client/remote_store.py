"""The store of a server's namespace, from afar."""

from __future__ import annotations

import builtins
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import quote

from avp_agents.context import Context
from avp_agents.errors import TransportError
from avp_agents.handle import ContextHandle
from avp_agents.store import ContextStore, Namespace, PruneReport, StoreStats
from avp_agents.store.base import AnyHandle, id_of_handle
from avp_agents.transport.client.connection import Connection
from avp_agents.transport.wire import API

_KNOWN_IDS = 4096


class RemoteNamespace(Namespace):
    """A namespace whose key stays on the server.

    It knows the ids that the server told of; for any other context it gives one that stands for nothing.
    """

    def __init__(self, name: str, tag: str) -> None:
        super().__init__(name, secrets.token_bytes(32))
        object.__setattr__(self, "_tag", tag)
        object.__setattr__(self, "_ids", OrderedDict())

    @property
    def tag(self) -> str:
        """As the server says."""
        return self.__dict__["_tag"]

    def learn(self, recipe_id: str, scope: str, handle_id: str) -> None:
        """Note an id that the server told of."""
        ids: OrderedDict[tuple[str, str], str] = self.__dict__["_ids"]
        ids[(recipe_id, scope)] = handle_id
        while len(ids) > _KNOWN_IDS:
            ids.popitem(last=False)

    def handle_id(self, recipe_id: str, scope: str) -> str:
        """The id that the server told of, or one that stands for nothing."""
        return self.__dict__["_ids"].get((recipe_id, scope)) or super().handle_id(recipe_id, scope)


class RemoteStore(ContextStore):
    """Implements `ContextStore` with a server's.

    Args:
        connection: To the server.
        namespace: As the server named it.
        reference: Gives a context's id on the server; one that is not there is sent.
        resolve: Gives the context of a handle.
    """

    def __init__(
        self,
        connection: Connection,
        namespace: RemoteNamespace,
        reference: Callable[[Context], str],
        resolve: Callable[[AnyHandle, str | None], Context],
    ) -> None:
        super().__init__(namespace=namespace)
        self._connection, self._learn = connection, namespace.learn
        self._reference, self._resolve = reference, resolve

    def put(
        self,
        context: Context,
        *,
        kv: bool = True,
        scope: str = "",
        agent: str = "",
        text: str = "",
        ttl: float | None = None,
    ) -> ContextHandle:
        """See `ContextStore.put`. Whether a KV-cache is kept is the server's affair."""
        body = {"scope": scope, "agent": agent, "text": text, "seconds": ttl}
        answer = self._connection.ask("POST", f"{_path(self._reference(context))}/handles", body)
        handle = ContextHandle.from_state(_field(answer, "handle", dict))
        self._learn(context.recipe_id, scope, handle.id)
        context.attach(handle=handle)
        return handle

    def get(self, handle: AnyHandle, *, scope: str | None = None) -> Context:
        """See `ContextStore.get`. The context stays on the server; its values are fetched when somebody looks."""
        return self._resolve(handle, scope)

    def contains(self, handle: AnyHandle) -> bool:
        """See `ContextStore.contains`."""
        return _field(self._connection.ask("GET", f"{_path(handle)}/held"), "found", bool)

    def touch(self, handle: AnyHandle) -> bool:
        """See `ContextStore.touch`."""
        return _field(self._connection.ask("POST", f"{_path(handle)}/touch"), "found", bool)

    def delete(self, handle: AnyHandle) -> bool:
        """See `ContextStore.delete`."""
        return _field(self._connection.ask("DELETE", _path(handle)), "found", bool)

    def discard(self, handles: Iterable[AnyHandle], *, idle: float = 0.0, dry_run: bool = False) -> PruneReport:
        """See `ContextStore.discard`."""
        body = {"handles": [id_of_handle(handle) for handle in handles], "idle": idle, "dry_run": dry_run}
        return PruneReport(**self._connection.ask("POST", f"{API}/contexts/discard", body))

    def add_kv(self, context: Context) -> bool:
        """See `ContextStore.add_kv`. The server's engine keeps KV-caches itself; nothing is sent."""
        return self.contains(context.to_handle())

    def drop_kv(self, handle: AnyHandle) -> int:
        """See `ContextStore.drop_kv`."""
        return _field(self._connection.ask("DELETE", f"{_path(handle)}/kv"), "bytes", int)

    def pin(self, handle: AnyHandle) -> None:
        """See `ContextStore.pin`."""
        self._connection.ask("PUT", f"{_path(handle)}/pin")

    def unpin(self, handle: AnyHandle) -> None:
        """See `ContextStore.unpin`."""
        self._connection.ask("DELETE", f"{_path(handle)}/pin")

    def list(self, *, scope: str | None = None) -> builtins.list[ContextHandle]:
        """See `ContextStore.list`."""
        query = "" if scope is None else f"?scope={quote(scope, safe='')}"
        answer = self._connection.ask("GET", f"{API}/contexts{query}")
        return [ContextHandle.from_state(state) for state in _field(answer, "handles", list)]

    def prune(self) -> PruneReport:
        """See `ContextStore.prune`."""
        return PruneReport(**self._connection.ask("POST", f"{API}/contexts/prune", {}))

    def stats(self) -> StoreStats:
        """See `ContextStore.stats`."""
        return StoreStats(**self._connection.ask("GET", f"{API}/contexts/stats"))


def _path(handle: AnyHandle) -> str:
    return f"{API}/contexts/{quote(id_of_handle(handle), safe='')}"


def _field(answer: Any, name: str, kind: type[Any]) -> Any:
    value = answer.get(name) if isinstance(answer, dict) else None
    if type(value) is not kind:
        raise TransportError(f"The server's answer has no {name!r}; client and server may differ in version.")
    return value
