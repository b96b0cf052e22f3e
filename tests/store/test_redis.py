"""Contexts in a real Redis server."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import redis
from servers import redis_server

from avp_agents.errors import ConfigurationError, ContextLostError, StoreUnavailableError
from avp_agents.store import Encryption, MemoryStore, Namespace, RedisStore, TieredStore
from avp_agents.store.redis import RedisBlobs
from avp_agents.testing import ContextStoreConformance, make_context
from avp_agents.testing.contexts import assert_same_kv, assert_same_lineage
from avp_agents.testing.store_suite import TENANT


class TestConformance(ContextStoreConformance):
    @pytest.fixture(autouse=True)
    def _server(self, redis_url: str) -> None:
        self.url = redis_url

    def make_store(self, **options: Any) -> RedisStore:
        return RedisStore(self.url, **options)


class TestEncryptedBelowMemoryConformance(ContextStoreConformance):
    """Memory over an encrypted Redis."""

    @pytest.fixture(autouse=True)
    def _server(self, redis_url: str) -> None:
        self.url = redis_url

    def below(self, **options: Any) -> RedisStore:
        return RedisStore(self.url, encryption=Encryption(b"e" * 32), **options)

    def make_store(self, **options: Any) -> TieredStore:
        return TieredStore(MemoryStore(**options), self.below(**options), share_kv=True)

    def size_of_one(self, *, kv: bool = True) -> int:
        """Both tiers get the budget; the lower one, whose records are larger, reaches it first."""
        probe = self.below(namespace=Namespace("probe", b"p" * 32))
        probe.put(make_context(), kv=kv)
        stats = probe.stats()
        return stats.lineage_bytes + stats.kv_bytes


def keys(url: str) -> list[str]:
    client = redis.Redis.from_url(url, decode_responses=True)
    return sorted(key.partition("}:")[2] for key in client.scan_iter())


def test_kv_above_a_size_is_not_kept(redis_url: str) -> None:
    context = make_context()
    assert context.kv is not None
    store = RedisStore(redis_url, namespace=TENANT, max_kv_bytes=context.kv.nbytes - 1)

    handle = store.put(context)

    assert store.get(handle).kv is None
    assert_same_lineage(store.get(handle), context)


def test_large_kv_crosses_in_pieces(redis_url: str) -> None:
    context = make_context(tokens=3000, head_dim=512)
    assert context.kv is not None
    assert context.kv.nbytes > 3 * 2**23
    store = RedisStore(redis_url, namespace=TENANT, max_kv_bytes=None)

    assert_same_kv(store.get(store.put(context)), context)


def test_a_put_leaves_no_lock_and_no_unreferred_payload(redis_url: str) -> None:
    store = RedisStore(redis_url, namespace=TENANT)

    store.delete(store.put(make_context()))

    assert keys(redis_url) == []


def test_a_killed_writer_s_payload_expires(redis_url: str) -> None:
    blobs = RedisBlobs(redis_url, TENANT, timeout=5)
    blobs.write_payload("0" * 32 + "-1", 3, [b"abc"])

    client = redis.Redis.from_url(redis_url)
    (key,) = client.keys("*payload*")

    assert 0 < client.ttl(key) <= 600


def test_a_killed_writer_s_lock_expires(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avp_agents.store.redis.LEASE_SECONDS", 0.3)
    store = RedisStore(redis_url, namespace=TENANT)
    client = redis.Redis.from_url(redis_url)
    client.set(f"avp:{{tenant-{TENANT.tag[:8]}}}:lock", "of a dead one", px=300)

    handle = store.put(make_context())

    assert store.contains(handle)


def test_a_writer_that_was_held_up_is_refused(redis_url: str) -> None:
    blobs = RedisBlobs(redis_url, TENANT, timeout=5)

    with blobs.writing():
        redis.Redis.from_url(redis_url).set(f"avp:{{tenant-{TENANT.tag[:8]}}}:lock", "somebody else's by now")
        with pytest.raises(StoreUnavailableError, match="lost its turn"):
            blobs.add({"segments/" + "0" * 32: b"late"})

    assert blobs.existing(["segments/" + "0" * 32]) == set()


def test_what_the_server_evicted_is_lost_and_can_be_put_again(redis_url: str) -> None:
    store = RedisStore(redis_url, namespace=TENANT)
    handle = store.put(make_context())
    client = redis.Redis.from_url(redis_url)
    client.delete(next(client.scan_iter("*segments/*")))

    assert not store.contains(handle)
    with pytest.raises(ContextLostError):
        store.get(handle)
    store.put(make_context())
    assert_same_lineage(store.get(handle), make_context())


def test_altered_bytes_are_absent(redis_url: str) -> None:
    store = RedisStore(redis_url, namespace=TENANT)
    handle = store.put(make_context())
    client = redis.Redis.from_url(redis_url)
    for key in client.scan_iter("*segments/*"):
        client.setrange(key, 20, b"altered")

    with pytest.raises(ContextLostError):
        store.get(handle)
    assert store.stats().integrity_failures > 0
    store.put(make_context())
    assert_same_lineage(store.get(handle), make_context())


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", ""])
def test_what_is_no_redis_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="redis://host"):
        RedisStore(url, namespace=TENANT)


def test_a_server_that_is_not_there_is_named_without_its_password() -> None:
    store = RedisStore("redis://user:secret@127.0.0.1:9/0", namespace=TENANT)

    with pytest.raises(StoreUnavailableError, match=r"redis://127.0.0.1:9/0 cannot be used") as failure:
        store.put(make_context())

    assert "secret" not in str(failure.value)
    assert "secret" not in repr(store.place)


def test_a_server_that_answers_nothing_costs_one_timeout(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        store = RedisStore(f"redis://127.0.0.1:{server.port}", namespace=TENANT, timeout=0.5)
        handle = store.put(make_context())
        server.freeze()

        asked = time.monotonic()
        for _ in range(20):
            with pytest.raises(StoreUnavailableError):
                store.get(handle)

        assert time.monotonic() - asked < 2


def test_tiers_go_on_without_the_server_and_settle_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avp_agents.store.blobs.PAUSE", 0.1)
    with redis_server(tmp_path) as server:
        url = f"redis://127.0.0.1:{server.port}"
        store = TieredStore(MemoryStore(namespace=TENANT), RedisStore(url, namespace=TENANT))
        before = store.put(make_context())
        server.kill()

        during = store.put(make_context(seed=1), scope="thread", agent="researcher")

        assert_same_kv(store.get(before), make_context())
        assert_same_kv(store.get(during), make_context(seed=1))
        assert store.contains(before)
        with pytest.raises(StoreUnavailableError):
            store.get("avp:1:" + "0" * 32)

        server.start()
        time.sleep(0.2)
        assert_same_lineage(store.get(during, scope="thread"), make_context(seed=1))
        elsewhere = RedisStore(url, namespace=TENANT)
        assert_same_lineage(elsewhere.get(during, scope="thread"), make_context(seed=1))
        assert elsewhere.get(during).to_handle().agent == "researcher"


def test_many_writers_and_a_budget(redis_url: str) -> None:
    probe = RedisStore(redis_url, namespace=Namespace("probe", b"p" * 32))
    probe.put(make_context(), kv=False)
    budget = 6 * probe.stats().lineage_bytes

    def work(worker: int) -> None:
        store = RedisStore(redis_url, namespace=TENANT, byte_budget=budget)
        for turn in range(5):
            store.put(make_context(seed=100 * worker + turn), kv=False)

    workers = [threading.Thread(target=work, args=(worker,)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    store = RedisStore(redis_url, namespace=TENANT, byte_budget=budget)
    assert store.stats().lineage_bytes <= budget * 8 / 6, "over it is at most what two others wrote at the same moment"
    store.prune()
    assert 0 < store.stats().lineage_bytes <= budget
    assert store.stats().contexts >= 4
