"""What a memory store does beyond what every store does: it keeps references, and knows where a KV-cache lies."""

from __future__ import annotations

from typing import Any

import pytest
from pool_kv import in_pool

from avp_agents.context import Context
from avp_agents.store import MemoryStore
from avp_agents.store import memory as memory_module
from avp_agents.testing import ContextStoreConformance, make_context
from avp_agents.testing.store_suite import TENANT


class TestConformance(ContextStoreConformance):
    def make_store(self, **options: Any) -> MemoryStore:
        return MemoryStore(**options)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(namespace=TENANT)


def bytes_of_kv(context: Context) -> int:
    assert context.kv is not None
    return context.kv.nbytes


def test_get_returns_the_object_that_was_put(store: MemoryStore) -> None:
    context = make_context()

    assert store.get(store.put(context)) is context


def test_a_second_scope_does_not_change_what_the_first_handle_gives(store: MemoryStore) -> None:
    context = make_context()
    first, second = store.put(context, scope="a"), store.put(context, scope="b")

    found = store.get(first, scope="a")

    assert found.to_handle() == first
    assert store.get(second) is context


def test_kv_in_an_engine_s_pool_counts_nothing(store: MemoryStore) -> None:
    context = make_context()
    in_pool(context)

    store.put(context)

    assert store.stats().kv_bytes == 0
    assert store.get(context.to_handle()).kv is context.kv


def test_kv_that_moved_to_the_host_counts_from_the_next_look(store: MemoryStore) -> None:
    context = make_context()
    host = context.kv
    in_pool(context)
    store.put(context)

    context.attach(kv=host)

    assert store.stats().kv_bytes == bytes_of_kv(context)


def test_a_host_copy_replaces_what_an_engine_is_about_to_evict(store: MemoryStore) -> None:
    context = make_context()
    pooled = in_pool(context)
    handle = store.put(context)

    store.add_kv(context.with_kv(pooled.to_host()))
    pooled.evicted = True

    assert store.get(handle).kv_len == len(context)


def test_an_engine_s_own_copy_does_not_replace_a_host_copy(store: MemoryStore) -> None:
    handle = store.put(make_context())
    other = make_context()
    in_pool(other)

    store.put(other)

    found = store.get(handle).kv
    assert found is not None
    assert not found.on_device


def test_evicting_a_kv_cache_does_not_take_it_from_a_caller() -> None:
    context = make_context()
    store = MemoryStore(namespace=TENANT, byte_budget=context.nbytes + bytes_of_kv(context) // 2)

    handle = store.put(context)

    assert context.kv_len == len(context)
    assert store.get(handle).kv is None
    assert store.stats().kv_bytes == 0


def test_evicted_kv_caches_are_spilled_least_recently_used_first() -> None:
    contexts = [make_context(seed=seed) for seed in range(3)]
    spilled: list[Context] = []
    size = contexts[0].nbytes + bytes_of_kv(contexts[0])
    store = MemoryStore(namespace=TENANT, byte_budget=size * 5 // 2)
    store.spill_to(spilled.append)
    handles = [store.put(context) for context in contexts[:2]]
    store.get(handles[0])

    store.put(contexts[2])

    assert [context.to_handle() for context in spilled] == [handles[1]]
    assert [context.kv_len for context in spilled] == [len(contexts[1])]


def test_a_kv_cache_counts_as_used_when_any_of_its_handles_was() -> None:
    shared, other = make_context(seed=1), make_context(seed=2)
    size = shared.nbytes + bytes_of_kv(shared)
    store = MemoryStore(namespace=TENANT, byte_budget=size * 5 // 2)
    store.put(shared, scope="old")
    store.put(other)
    store.put(shared, scope="new")

    store.put(make_context(seed=3))

    assert store.get(store.id_of(shared, scope="old")).kv is not None
    assert store.get(store.id_of(other)).kv is None


def test_a_use_starts_the_ttl_anew(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(memory_module, "monotonic", lambda: clock[0])
    handle = store.put(make_context(), ttl=10)

    for clock[0] in (9.0, 18.0, 27.0):
        assert store.touch(handle)
    clock[0] = 37.0

    assert not store.contains(handle)


def test_a_missing_readout_is_completed(store: MemoryStore) -> None:
    whole = make_context()
    handle = store.put(Context(whole.fingerprint, whole.dtype, whole.lineage))

    store.put(whole)

    assert store.get(handle).readout is whole.readout
    store.delete(handle)
    assert store.stats().lineage_bytes == 0


def test_a_parent_is_not_given_up_while_its_child_would_keep_its_bytes() -> None:
    parent = make_context(kv_short=None, tokens=400)
    child, other = make_context(parent=parent, seed=1, kv_short=None), make_context(seed=2, kv_short=None)
    store = MemoryStore(namespace=TENANT, byte_budget=child.nbytes + other.nbytes - 1)
    handle, child_handle = store.put(parent), store.put(child)

    store.put(other)

    assert (store.contains(handle), store.contains(child_handle)) == (True, False)


def test_a_context_of_two_scopes_goes_when_nothing_else_can() -> None:
    context = make_context(kv_short=None)
    store = MemoryStore(namespace=TENANT, byte_budget=context.nbytes)
    handles = [store.put(context, scope=scope) for scope in "ab"]

    store.put(make_context(seed=1, kv_short=None))

    assert [store.contains(handle) for handle in handles] == [False, False]
