"""Contexts in Redis or Valkey, shared by all machines that reach it."""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from typing_extensions import override

from avp_agents.errors import ConfigurationError, StoreUnavailableError
from avp_agents.store.blobs import (
    PAYLOAD_CHUNK,
    Blobs,
    Kind,
    Payloads,
    Reachability,
    gathered,
    in_batches,
    rechunked,
    redacted,
    renewed,
)
from avp_agents.store.checked_blobs import CheckedBlobs
from avp_agents.store.encryption import Encryption
from avp_agents.store.kv_shares import PayloadShares
from avp_agents.store.namespace import Namespace
from avp_agents.store.record_store import RecordStore

if TYPE_CHECKING:
    from redis import Redis

SCHEMES = ("redis", "rediss", "unix")
DEFAULT_MAX_KV_BYTES = 64 << 20
LEASE_SECONDS = 3.0
"""A killed writer's lock is free after this long."""

PAYLOAD_SECONDS = 600
"""A payload that nothing came to refer to is gone after this long."""

_NOW = "local t = redis.call('TIME') local now = t[1] + t[2] / 1000000 "
_TOUCH = _NOW + "redis.call('ZADD', KEYS[1], string.format('%.6f', now), ARGV[1])"
_RENEW = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end return 0"
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class RedisStore(RecordStore):
    """Keeps contexts in a Redis or Valkey server: lineages and handles always, KV-caches up to a size.

    Writers of a namespace take turns for the milliseconds that a put takes; a put is one transaction, and one whose
    writer lost its turn (it was suspended, say) is refused. Times are the server's. Whether contexts outlive the
    server's restart is the server's configuration (``appendonly yes``).

    Args:
        url: ``redis://[user:password@]host[:port][/database]``, ``rediss://`` for TLS, ``unix://path``; for Valkey too.
        namespace, byte_budget, ttl: See `RecordStore`.
        encryption: Seals everything that goes to the server.
        max_kv_bytes: KV-caches larger than this are not kept. By default 64 MiB: Redis holds them in memory.
        timeout: Seconds after which an answer, or another writer's turn, is no longer waited for.

    Raises:
        ConfigurationError: The URL is not one, or the package ``redis`` is missing.

    Example:
        >>> store = TieredStore(MemoryStore(namespace="team-a"), RedisStore("redis://10.0.0.5", namespace="team-a"))
        >>> engine = LatentEngine.from_pretrained("Qwen/Qwen2.5-7B-Instruct", store=store)
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: Namespace | str = "default",
        byte_budget: int | None = None,
        ttl: float | None = None,
        max_kv_bytes: int | None = DEFAULT_MAX_KV_BYTES,
        encryption: Encryption | None = None,
        timeout: float = 5.0,
    ) -> None:
        tenant = Namespace.of(namespace)
        blobs = RedisBlobs(url, tenant, timeout)
        records = CheckedBlobs(blobs, tenant, encryption)
        super().__init__(
            records, PayloadShares(records, blobs), byte_budget=byte_budget, ttl=ttl, max_kv_bytes=max_kv_bytes
        )


class RedisBlobs(Blobs, Payloads):
    """A namespace's keys. All begin with ``avp:{name-tag}:``, so that a cluster keeps them on one node.

    <kind>/<id>          string     a small blob
    <kind>               set        the ids of that kind
    payload/<name>       hash       a payload's chunks, by number; expires until something refers to it
    payloads             hash       bytes by name, of those that something refers to
    uses                 sorted set handles by their last use
    lock                 string     the token of who adds or removes at the moment
    """

    def __init__(self, url: str, namespace: Namespace, timeout: float) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                'RedisStore needs redis. Install it with: pip install "avp-agents[redis]"'
            ) from error
        super().__init__(redacted(url))
        # one more try, at once: a connection that idled may have been closed by the server
        retry = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
        options: dict[str, Any] = {"socket_timeout": timeout, "socket_connect_timeout": timeout, "retry": retry}
        try:
            self._client = cast("Redis", redis.Redis.from_url(url, **options))
        except ValueError as error:
            raise ConfigurationError(
                f"Not the URL of a Redis server: {self.place!r}. Write redis://host:6379/0, or rediss:// for TLS."
            ) from error
        self._prefix = f"avp:{{{namespace.name}-{namespace.tag[:8]}}}:"
        self._timeout = timeout
        self._asking = Reachability(self.place, (redis.RedisError, OSError))
        self._held = threading.local()

    @override
    def read(self, names: Sequence[str]) -> list[bytes | None]:
        if not names:
            return []
        with self._asking():
            return cast("list[bytes | None]", self._client.mget([self._key(name) for name in names]))

    @override
    def existing(self, names: Sequence[str]) -> set[str]:
        with self._asking():
            pipe = self._client.pipeline(transaction=False)
            for name in names:
                pipe.exists(self._key(name))
            return {name for name, there in zip(names, pipe.execute(), strict=True) if there}

    @override
    def add(self, blobs: Mapping[str, bytes]) -> set[str]:
        """One transaction."""
        with self._asking(), self._transaction() as pipe:
            for name, data in blobs.items():
                pipe.set(self._key(name), data, nx=True)
            for name in blobs:
                kind, _, own_id = name.partition("/")
                pipe.sadd(self._key(kind), own_id)
            return {name for name, added in zip(blobs, pipe.execute(), strict=False) if added}

    @override
    def write(self, blobs: Mapping[str, bytes]) -> None:
        """One transaction."""
        with self._asking(), self._transaction() as pipe:
            for name, data in blobs.items():
                kind, _, own_id = name.partition("/")
                pipe.set(self._key(name), data)
                pipe.sadd(self._key(kind), own_id)
            pipe.execute()

    @override
    def remove(self, names: Sequence[str]) -> None:
        """One transaction."""
        with self._asking(), self._transaction() as pipe:
            for name in names:
                kind, _, own_id = name.partition("/")
                pipe.unlink(self._key(name))
                pipe.srem(self._key(kind), own_id)
            pipe.execute()

    @override
    def sizes(self, kind: Kind) -> dict[str, int]:
        """Blobs that the server evicted by a policy of its own are not there."""
        with self._asking():
            ids = [member.decode() for member in cast("set[bytes]", self._client.smembers(self._key(kind)))]
            found: dict[str, int] = {}
            for some in in_batches(ids):
                pipe = self._client.pipeline(transaction=False)
                for own_id in some:
                    pipe.strlen(self._key(f"{kind}/{own_id}"))
                found |= {own_id: size for own_id, size in zip(some, pipe.execute(), strict=True) if size}
        return found

    @override
    def use(self, handle_id: str) -> None:
        with self._asking():
            self._client.eval(_TOUCH, 1, self._key("uses"), handle_id)

    @override
    def uses(self, handle_id: str | None = None) -> dict[str, float]:
        with self._asking():
            if handle_id is not None:
                score = cast("float | None", self._client.zscore(self._key("uses"), handle_id))
                return {} if score is None else {handle_id: score}
            scores = cast("list[tuple[bytes, float]]", self._client.zrange(self._key("uses"), 0, -1, withscores=True))
            return {member.decode(): score for member, score in scores}

    @override
    def forget_uses(self, handle_ids: Sequence[str]) -> None:
        if handle_ids:
            with self._asking():
                self._client.zrem(self._key("uses"), *handle_ids)

    @override
    def now(self) -> float:
        """The server's clock."""
        with self._asking():
            seconds, microseconds = cast("tuple[int, int]", self._client.time())
        return seconds + microseconds / 1e6

    @override
    def read_payload(self, name: str, size: int) -> bytearray | None:
        def chunk(index: int) -> bytes | None:
            with self._asking():
                return cast("bytes | None", self._client.hget(self._key(f"payload/{name}"), str(index)))

        return gathered(size, chunk)

    @override
    def write_payload(self, name: str, size: int, chunks: Iterable[bytes | memoryview]) -> None:
        key = self._key(f"payload/{name}")
        for index, chunk in enumerate(rechunked(chunks, PAYLOAD_CHUNK)):
            with self._asking():
                pipe = self._client.pipeline()
                pipe.hset(key, str(index), chunk)
                pipe.expire(key, PAYLOAD_SECONDS)
                pipe.execute()

    @override
    def keep_payload(self, name: str, size: int) -> None:
        with self._asking():
            pipe = self._client.pipeline()
            pipe.persist(self._key(f"payload/{name}"))
            pipe.hset(self._key("payloads"), name, str(size))
            pipe.execute()

    @override
    def remove_payloads(self, names: Sequence[str]) -> None:
        if names:
            with self._asking():
                pipe = self._client.pipeline()
                pipe.unlink(*(self._key(f"payload/{name}") for name in names))
                pipe.hdel(self._key("payloads"), *names)
                pipe.execute()

    @override
    def payload_sizes(self) -> dict[str, int]:
        with self._asking():
            sizes = cast("dict[bytes, bytes]", self._client.hgetall(self._key("payloads")))
        return {name.decode(): int(size) for name, size in sizes.items()}

    @override
    @contextmanager
    def writing(self) -> Iterator[None]:
        """One writer at a time.

        Raises:
            StoreUnavailableError: Other writers' turns took longer than the timeout.
        """
        key, token = self._key("lock"), secrets.token_hex(16).encode()
        until = time.monotonic() + self._timeout
        while not self._acquire(key, token):
            if time.monotonic() > until:
                raise StoreUnavailableError(
                    f"{self.place} was locked by other writers of this namespace for {self._timeout:g} s. Try again."
                )
            time.sleep(random.uniform(0.001, 0.01))
        self._held.token = token
        try:
            with renewed(lambda: self._ask_lock(_RENEW, key, token, int(1e3 * LEASE_SECONDS)), LEASE_SECONDS / 3):
                yield
        finally:
            self._held.token = None
            self._ask_lock(_RELEASE, key, token)

    @override
    def close(self) -> None:
        self._client.close()

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _acquire(self, key: str, token: bytes) -> bool:
        with self._asking():
            return bool(self._client.set(key, token, nx=True, px=int(1e3 * LEASE_SECONDS)))

    def _ask_lock(self, script: str, key: str, token: bytes, *arguments: int) -> bool:
        with self._asking():
            return bool(self._client.eval(script, 1, key, token, *arguments))

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        """A transaction that is carried out only if the lock is still ours by then."""
        from redis import WatchError

        lost = f"{self.place}: this writer was held up for more than {LEASE_SECONDS:g} s and lost its turn. Try again."
        pipe = self._client.pipeline()
        try:
            pipe.watch(self._key("lock"))
            if pipe.get(self._key("lock")) != self._held.token:
                raise StoreUnavailableError(lost)
            pipe.multi()
            yield pipe
        except WatchError as error:
            raise StoreUnavailableError(lost) from error
        finally:
            pipe.reset()
