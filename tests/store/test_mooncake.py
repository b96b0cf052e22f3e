"""KV-caches in a real Mooncake over TCP, lineages in a real Redis."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Server, mooncake_master

from avp_agents.errors import StoreUnavailableError
from avp_agents.store import open_store as store_at
from avp_agents.store.mooncake import MooncakeStore
from avp_agents.store.redis import RedisStore
from avp_agents.testing import ContextStoreConformance, make_context
from avp_agents.testing.contexts import assert_same_kv, assert_same_lineage
from avp_agents.testing.store_suite import TENANT

MEMORY = 64 << 20


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with mooncake_master(tmp_path_factory.mktemp("mooncake")) as server:
        yield server


def open_store(url: str, master: Server, **options: Any) -> MooncakeStore:
    lineage = RedisStore(url, **options)
    return MooncakeStore(lineage, master=f"127.0.0.1:{master.port}", host="127.0.0.1", memory_bytes=MEMORY)


@pytest.fixture(scope="module")
def _peer(redis_process: Server, master: Server) -> Iterator[None]:
    """A store that stays open, so that the others of this module need not join Mooncake again."""
    store = open_store(f"redis://127.0.0.1:{redis_process.port}/1", master, namespace=TENANT)
    yield
    store.close()


@pytest.mark.usefixtures("_peer")
class TestConformance(ContextStoreConformance):
    @pytest.fixture(autouse=True)
    def _servers(self, redis_url: str, master: Server) -> None:
        self.url, self.master = redis_url, master

    def make_store(self, **options: Any) -> MooncakeStore:
        return open_store(self.url, self.master, **options)


READER = """
import sys
from avp_agents.store import MooncakeStore, Namespace, RedisStore
url, master, handle = sys.argv[1:]
lineage = RedisStore(url, namespace=Namespace("tenant", b"k" * 32))
store = MooncakeStore(lineage, master=master, host="127.0.0.1", memory_bytes=0)
print(store.get(handle).kv_len)
store.close()
"""


@pytest.mark.usefixtures("_peer")
def test_another_process_gets_the_kv_cache(redis_url: str, master: Server) -> None:
    context = make_context(tokens=2000, head_dim=64)
    store = open_store(redis_url, master, namespace=TENANT)
    handle = store.put(context)

    command = [sys.executable, "-c", READER, redis_url, f"127.0.0.1:{master.port}", handle.id]
    other = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert other.stdout.split()[-1:] == [str(context.kv_len)], other.stderr[-2000:]
    store.close()


@pytest.mark.usefixtures("_peer")
def test_a_url_names_it(redis_url: str, master: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVP_STORE_KEY", "22" * 32)
    url = f"mooncake+{redis_url}?master=127.0.0.1:{master.port}&host=127.0.0.1&memory_bytes={MEMORY}"
    store, other = store_at(url), store_at(url)

    handle = store.put(make_context())

    assert isinstance(store.lower, MooncakeStore)
    assert_same_kv(other.get(handle), make_context())
    store.close()
    other.close()


def test_without_mooncake_the_lineage_is_left(redis_url: str, tmp_path: Path) -> None:
    with mooncake_master(tmp_path) as master:
        lineage = RedisStore(redis_url, namespace=TENANT)
        address = f"127.0.0.1:{master.port}"
        store = MooncakeStore(lineage, master=address, host="127.0.0.1", memory_bytes=MEMORY, timeout=1)
        handle = store.put(make_context())
        assert_same_kv(store.get(handle), make_context())

        master.freeze()
        asked = time.monotonic()
        found = store.get(handle)
        other = store.put(make_context(seed=1))
        took = time.monotonic() - asked
        master.thaw()
        store.close()

    assert_same_lineage(found, make_context())
    assert found.kv is None
    assert other.id != handle.id
    assert took < 5, "nothing may be waited for longer than the timeout"


def test_a_master_that_is_not_there_is_a_clear_error(redis_url: str) -> None:
    pytest.importorskip("mooncake", reason="Mooncake is not installed: pip install 'avp-agents[mooncake]'")
    with pytest.raises(StoreUnavailableError, match="Mooncake at 127"):
        MooncakeStore(RedisStore(redis_url, namespace=TENANT), master="127.0.0.1:9", host="127.0.0.1", timeout=2)
