"""What the tiers do together: lineages below at once, KV-caches below when the upper tier runs out of room."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from pool_kv import in_pool

from avp_agents.context import Context
from avp_agents.errors import ConfigurationError, ContextLostError
from avp_agents.store import DiskStore, MemoryStore, Namespace, TieredStore, default_store
from avp_agents.testing import ContextStoreConformance, make_context
from avp_agents.testing.contexts import assert_same_kv, assert_same_lineage
from avp_agents.testing.store_suite import OTHER_NAME, SAME_NAME_OTHER_KEY, TENANT


class TestConformance(ContextStoreConformance):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make_store(self, **options: Any) -> TieredStore:
        return TieredStore(MemoryStore(**options), DiskStore(self.folder, **options))

    def size_of_one(self, *, kv: bool = True) -> int:
        """Both tiers get the budget; the lower one, whose records are larger, reaches it first."""
        probe = DiskStore(self.folder, namespace=Namespace("probe", b"p" * 32))
        probe.put(make_context(), kv=kv)
        stats = probe.stats()
        return stats.lineage_bytes + stats.kv_bytes


def tiers(folder: Path, memory: int | None = None) -> TieredStore:
    """Tiers over one folder; each call is like another process."""
    return TieredStore(MemoryStore(namespace=TENANT, byte_budget=memory), DiskStore(folder, namespace=TENANT))


def bytes_of(context: Context) -> int:
    assert context.kv is not None
    return context.nbytes + context.kv.nbytes


@pytest.mark.parametrize("other", [OTHER_NAME, SAME_NAME_OTHER_KEY])
def test_tiers_of_different_namespaces_are_refused(tmp_path: Path, other: Namespace) -> None:
    with pytest.raises(ConfigurationError, match="namespace and key"):
        TieredStore(MemoryStore(namespace=TENANT), DiskStore(tmp_path, namespace=other))


def test_a_put_leaves_the_lineage_below_and_the_kv_above(tmp_path: Path) -> None:
    store = tiers(tmp_path)
    context = make_context()

    handle = store.put(context)

    assert store.get(handle) is context
    assert store.lower.stats().kv_bytes == 0
    assert_same_lineage(tiers(tmp_path).get(handle), context)


def test_evicted_kv_goes_below_and_comes_back(tmp_path: Path) -> None:
    contexts = [make_context(seed=seed) for seed in range(3)]
    store = tiers(tmp_path, memory=bytes_of(contexts[0]) * 5 // 2)

    handles = [store.put(context) for context in contexts]

    assert store.upper.get(handles[0]).kv is None
    assert store.lower.stats().kv_bytes > 0
    for handle, seed in zip(handles, range(3), strict=True):
        assert_same_kv(store.get(handle), make_context(seed=seed))
    assert store.upper.get(handles[2]).kv is not None


def test_a_kv_cache_that_exceeds_the_upper_tier_goes_straight_below(tmp_path: Path) -> None:
    context = make_context()
    store = tiers(tmp_path, memory=context.nbytes - 1)

    handle = store.put(context)

    assert not store.upper.contains(handle)
    assert_same_kv(store.get(handle), make_context())


def test_what_an_engine_evicts_is_kept_under_the_same_handle(tmp_path: Path) -> None:
    store = tiers(tmp_path)
    context = make_context()
    pooled = in_pool(context)
    handle = store.put(context, scope="thread-1")

    assert store.add_kv(store.get(handle).with_kv(pooled.to_host()))
    pooled.evicted = True

    assert_same_kv(store.get(handle), make_context())
    assert [listed.id for listed in store.list()] == [handle.id]


def test_what_another_process_stored_is_promoted(tmp_path: Path) -> None:
    handle = DiskStore(tmp_path, namespace=TENANT).put(make_context(), scope="thread-1")
    store = tiers(tmp_path)

    found = store.get(handle, scope="thread-1")

    assert_same_kv(found, make_context())
    assert store.get(handle) is found
    with pytest.raises(ContextLostError):
        store.get(handle, scope="thread-2")


def test_more_of_a_kv_cache_than_is_above_is_promoted(tmp_path: Path) -> None:
    """Another process first knows the keys of what a context goes on from, and later its own."""
    parent = make_context()
    child = make_context(parent=parent, seed=1)
    store, other = tiers(tmp_path), DiskStore(tmp_path, namespace=TENANT)
    other.put(parent)
    handle = other.put(child, kv=False)
    first = store.get(handle)

    other.add_kv(child)

    assert first.kv is not None
    assert first.kv.length == len(parent)
    assert_same_kv(store.get(handle), child)


def test_what_another_process_deleted_is_gone(tmp_path: Path) -> None:
    store, other = tiers(tmp_path), tiers(tmp_path)
    handles = [store.put(make_context(seed=seed)) for seed in range(2)]

    for handle in handles:
        other.delete(handle)

    assert not store.contains(handles[0])
    with pytest.raises(ContextLostError):
        store.get(handles[0])
    store.prune()
    assert store.upper.stats().contexts == 0


def test_an_eviction_above_does_not_bring_back_what_was_deleted_below(tmp_path: Path) -> None:
    context = make_context()
    store = tiers(tmp_path, memory=bytes_of(context) * 3 // 2)
    handle = store.put(context)
    DiskStore(tmp_path, namespace=TENANT).delete(handle)

    store.put(make_context(seed=1))

    assert not store.contains(handle)


def test_a_use_above_starts_the_ttl_below_anew(tmp_path: Path) -> None:
    store = tiers(tmp_path)
    handle = store.put(make_context(), ttl=3600)
    (record,) = tmp_path.rglob("*.handle")
    os.utime(record, (time.time() - 3000, time.time() - 3000))

    store.get(handle)

    assert time.time() - record.stat().st_mtime < 60


def test_the_first_writer_s_values_win_across_processes(tmp_path: Path) -> None:
    tiers(tmp_path).put(make_context(values=1))
    store = tiers(tmp_path)

    handle = store.put(make_context(values=2))

    assert_same_lineage(store.get(handle), make_context(values=1))


def test_a_retry_with_the_same_values_keeps_its_kv(tmp_path: Path) -> None:
    tiers(tmp_path).put(make_context())
    store = tiers(tmp_path)
    context = make_context()

    handle = store.put(context)

    assert store.get(handle) is context


def test_damage_below_does_not_cost_what_is_above(tmp_path: Path) -> None:
    store = tiers(tmp_path)
    handle = store.put(make_context(), kv=False)
    for path in tmp_path.rglob("*.segment"):
        path.write_bytes(b"torn")

    assert store.contains(handle)
    assert_same_lineage(store.get(handle), make_context())
    assert store.stats().integrity_failures > 0


def test_pins_hold_in_both_tiers(tmp_path: Path) -> None:
    store = tiers(tmp_path)
    handle = store.put(make_context())

    store.pin(handle)
    assert (store.upper.stats().pinned, store.lower.stats().pinned) == (1, 1)

    store.unpin(handle)
    assert (store.upper.stats().pinned, store.lower.stats().pinned) == (0, 0)


def test_the_default_store_lies_in_the_cache_folder_and_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)

    store = default_store(TENANT)
    store.put(make_context())

    assert isinstance(store.lower, DiskStore)
    assert store.lower.path == tmp_path / "avp-agents" / "contexts"
    assert (store.upper.byte_budget, store.lower.byte_budget) == (1 << 30, 10 << 30)
    assert store.lower.stats().contexts == 1
