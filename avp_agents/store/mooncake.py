"""KV-caches in the memory of many machines, by Mooncake: TCP, or RDMA in a data centre."""

from __future__ import annotations

import logging
import math
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, ClassVar, TypeVar

from typing_extensions import override

from avp_agents.errors import ConfigurationError, StoreUnavailableError
from avp_agents.store.blobs import PAYLOAD_CHUNK, Blobs, Payloads, Reachability, gathered, rechunked
from avp_agents.store.kv_shares import PayloadShares
from avp_agents.store.namespace import Namespace
from avp_agents.store.record_store import RecordStore

log = logging.getLogger(__name__)

DEFAULT_MEMORY_BYTES = 1 << 30
_BUFFER_BYTES = 8 * PAYLOAD_CHUNK

_Result = TypeVar("_Result")


class MooncakeStore(RecordStore):
    """Keeps KV-caches in Mooncake, and all else where `lineage` keeps it.

    Mooncake's memory is fast and volatile: what it evicts or loses with a machine is replayed from the lineage. The
    lineage's namespace, budget, TTL and encryption hold for the KV-caches too. Stores of one process with the same
    master, host and memory lend that memory once.

    Args:
        lineage: For lineages, handles and the KV-caches' index. It belongs to this store from now on.
        master: Mooncake's master, as ``host:port``.
        host: This machine's name or address, by which others reach it.
        memory_bytes: Memory that this process lends to all. With 0 it only uses others'.
        metadata: Mooncake's metadata server, as ``http://host:port/metadata``; by default its peers ask each other.
        protocol: ``"tcp"`` or ``"rdma"``.
        devices: The RDMA devices' names, separated by commas.
        max_kv_bytes: KV-caches larger than this are not kept. By default all are.
        timeout: Seconds after which a transfer of one KV-cache, or joining, is given up.

    Raises:
        ConfigurationError: The package ``mooncake`` is missing, or cannot be loaded.
        StoreUnavailableError: The master does not let this process join.

    Example:
        >>> store = MooncakeStore(RedisStore("redis://10.0.0.5"), master="10.0.0.5:50051", host="10.0.0.7")
    """

    def __init__(
        self,
        lineage: RecordStore,
        *,
        master: str,
        host: str,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        metadata: str = "P2PHANDSHAKE",
        protocol: str = "tcp",
        devices: str = "",
        max_kv_bytes: int | None = None,
        timeout: float = 10.0,
    ) -> None:
        setup = (host, metadata, memory_bytes, _BUFFER_BYTES, protocol, devices, master)
        client = _Client.joined(setup, f"Mooncake at {master}", timeout)
        super().__init__(
            lineage.records,
            PayloadShares(lineage.records, MooncakePayloads(client, lineage.blobs, lineage.namespace)),
            byte_budget=lineage.byte_budget,
            ttl=lineage.ttl,
            max_kv_bytes=max_kv_bytes,
        )


class MooncakePayloads(Payloads):
    """A namespace's KV-caches in Mooncake: ``avp/<tag>/<name>/<chunk>``; which there are, the index knows."""

    def __init__(self, client: _Client, index: Blobs, namespace: Namespace) -> None:
        self._client, self._index = client, index
        self._prefix = f"avp/{namespace.tag}/"
        # a payload never changes
        self._sizes: dict[str, int] = {}

    @override
    def read_payload(self, name: str, size: int) -> bytearray | None:
        keys = self._keys(name, size)
        return self._client.call(lambda store: gathered(size, lambda index: store.get(keys[index])))

    @override
    def write_payload(self, name: str, size: int, chunks: Iterable[bytes | memoryview]) -> None:
        """A payload that nothing comes to refer to is evicted as the least recently used.

        Raises:
            StoreUnavailableError: Also where its memory is full of what was just used.
        """
        for key, chunk in zip(self._keys(name, size), rechunked(chunks, PAYLOAD_CHUNK), strict=True):
            code = self._client.call(lambda store, key=key, chunk=chunk: store.put(key, chunk))
            if code != 0:
                raise StoreUnavailableError(f"{self._client.place} does not take {len(chunk)} bytes (code {code}).")

    @override
    def keep_payload(self, name: str, size: int) -> None:
        self._index.write({f"payloads/{name}": str(size).encode()})

    @override
    def remove_payloads(self, names: Sequence[str]) -> None:
        sizes = self.payload_sizes()
        keys = [key for name in names for key in self._keys(name, sizes.get(name, 0))]
        if keys:
            self._client.call(lambda store: [store.remove(key, True) for key in keys])
        if names:
            self._index.remove([f"payloads/{name}" for name in names])

    @override
    def payload_sizes(self) -> dict[str, int]:
        names = list(self._index.sizes("payloads"))
        new = [name for name in names if name not in self._sizes]
        found = self._index.read([f"payloads/{name}" for name in new])
        known = self._sizes | {name: int(size) for name, size in zip(new, found, strict=True) if size is not None}
        self._sizes = {name: known[name] for name in names if name in known}
        return dict(self._sizes)

    @override
    def close(self) -> None:
        """The memory that this process lends goes with it."""
        self._client.leave()

    def _keys(self, name: str, size: int) -> list[str]:
        return [f"{self._prefix}{name}/{index}" for index in range(math.ceil(size / PAYLOAD_CHUNK))]


class _Client:
    """Mooncake's client. Its calls may hang for half a minute, so each runs on a thread that can be left behind."""

    _joined: ClassVar[dict[tuple[Any, ...], _Client]] = {}
    _joining = threading.Lock()

    def __init__(self, place: str, timeout: float) -> None:
        try:
            from mooncake.store import MooncakeDistributedStore  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigurationError(
                f'Mooncake cannot be loaded ({error}). Install it with: pip install "avp-agents[mooncake]"; it '
                "needs libibverbs too (on Debian: apt-get install libibverbs1)."
            ) from error
        self.place, self._timeout = place, timeout
        self._store = MooncakeDistributedStore()
        self._asking = Reachability(place, (TimeoutError,))
        self._users = self._running = 0
        self._idle = threading.Condition()

    @classmethod
    def joined(cls, setup: tuple[Any, ...], place: str, timeout: float) -> _Client:
        """One of Mooncake's peers; the same for all that ask with the same setup. Each of them calls `leave` once.

        Raises:
            StoreUnavailableError: The master does not answer, or refuses.
        """
        with cls._joining:
            client = cls._joined.get(setup)
            if client is None:
                client = cls(place, timeout)
                client.knock(setup[-1])
                code = client.call(lambda store: store.setup(*setup))
                if code != 0:
                    raise StoreUnavailableError(f"{place} does not let this process join (code {code}).")
                cls._joined[setup] = client
            client._users += 1
            return client

    def knock(self, master: str) -> None:
        """See whether anybody listens: Mooncake's own way to find out takes a minute and a half, and nothing else runs.

        Raises:
            StoreUnavailableError: Nobody does.
        """
        host, _, port = master.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigurationError(f"Mooncake's master is given as host:port, not as {master!r}.")
        with Reachability(self.place, (OSError,))(), socket.create_connection((host, int(port)), self._timeout):
            pass

    def leave(self) -> None:
        """Stop being a peer if nobody else uses this one; no longer waited for than the timeout."""
        with self._joining:
            self._users -= 1
            if self._users > 0:
                return
            for setup in [setup for setup, client in self._joined.items() if client is self]:
                del self._joined[setup]
        with self._idle:
            if not self._idle.wait_for(lambda: self._running == 0, self._timeout):
                # closing it under a call that still runs would crash the process
                log.warning(
                    "%s still has calls that do not return; this process stays its peer until it ends.", self.place
                )
                return
        with suppress(TimeoutError):
            self._within_timeout(self._store.close)

    def call(self, action: Callable[[Any], _Result]) -> _Result:
        """`action`'s result.

        Raises:
            StoreUnavailableError: There was none in time.
        """
        with self._asking():
            return self._within_timeout(lambda: action(self._store))

    def _within_timeout(self, action: Callable[[], _Result]) -> _Result:
        future: Future[_Result] = Future()

        def run() -> None:
            try:
                future.set_result(action())
            except Exception as error:
                future.set_exception(error)
            finally:
                with self._idle:
                    self._running -= 1
                    self._idle.notify_all()

        with self._idle:
            self._running += 1
        threading.Thread(target=run, name="avp-mooncake", daemon=True).start()
        try:
            return future.result(self._timeout)
        except TimeoutError as error:
            raise TimeoutError(f"no answer within {self._timeout:g} s") from error
