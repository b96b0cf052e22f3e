"""Who may read what is stored, how long it stays, and that many may use a store at once."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from avp_agents.context import Context
from avp_agents.errors import ContextLostError, InvalidHandleError, StoreFullError
from avp_agents.store import ContextStore, Namespace
from avp_agents.testing.contexts import assert_same_kv, assert_same_lineage, make_context
from avp_agents.testing.store_suite import OTHER_NAME, SAME_NAME_OTHER_KEY, SHORT_TTL, TENANT, StoreSuite


class StoreLifetimes(StoreSuite):
    """Scopes, namespaces, TTL, budgets, pins, concurrency."""

    # scopes and namespaces

    def test_a_handle_is_honoured_in_its_scope_only(self, store: ContextStore) -> None:
        handle = store.put(make_context(), scope="thread-1")

        assert store.get(handle, scope="thread-1").recipe_id == make_context().recipe_id
        assert store.get(handle).recipe_id == make_context().recipe_id, "scope=None must ask no question"
        for scope in ("thread-2", ""):
            with pytest.raises(ContextLostError):
                store.get(handle, scope=scope)

    def test_scopes_have_handles_of_their_own_over_the_same_bytes(self, store: ContextStore) -> None:
        context = make_context()
        first = store.put(context, scope="a")
        one = store.stats()

        second = store.put(context, scope="b")

        both = store.stats()
        assert first.id != second.id, "two scopes must have two handles"
        assert (both.contexts, both.segments) == (2, one.segments), "two scopes must share their segments"
        assert (both.lineage_bytes, both.kv_bytes) == (one.lineage_bytes, one.kv_bytes), "the bytes must be kept once"
        for handle in (first, second):
            assert store.get(handle).to_handle().id == handle.id, "a context must carry the handle it was got by"
        store.delete(first)
        assert_same_kv(store.get(second), make_context())

    def test_list_is_oldest_first_and_by_scope(self, store: ContextStore) -> None:
        handles = [store.put(make_context(seed=i), scope="even" if i % 2 == 0 else "odd") for i in range(4)]

        assert [h.id for h in store.list()] == [h.id for h in handles], "list must be oldest first"
        assert [h.id for h in store.list(scope="odd")] == [handles[1].id, handles[3].id], "list must filter by scope"
        assert store.list(scope="none") == [], "an unknown scope must be empty"

    @pytest.mark.parametrize("other", [SAME_NAME_OTHER_KEY, OTHER_NAME], ids=["same-name", "same-key"])
    def test_nothing_is_shared_across_namespaces(self, store: ContextStore, other: Namespace) -> None:
        foreign = self.make_store(namespace=other)
        handle = store.put(make_context())

        assert not foreign.contains(handle), "another namespace must not know the handle"
        with pytest.raises(ContextLostError):
            foreign.get(handle)
        assert foreign.list() == [], "another namespace must not list it"
        assert not foreign.delete(handle), "another namespace must not delete it"
        own = foreign.put(make_context())
        assert own.id != handle.id, "the same recipe must have another id in another namespace"
        foreign.delete(own)
        assert_same_lineage(store.get(handle), make_context())
        foreign.close()

    # lifetimes

    def test_what_outlived_its_ttl_is_lost(self, store: ContextStore) -> None:
        mortal, lasting = store.put(make_context(seed=1), ttl=SHORT_TTL), store.put(make_context(seed=2))

        time.sleep(SHORT_TTL + 0.05)

        assert not store.contains(mortal), "an expired context must be gone, pruned or not"
        with pytest.raises(ContextLostError):
            store.get(mortal)
        store.prune()
        assert [h.id for h in store.list()] == [lasting.id], "what has no TTL must stay"
        assert store.stats().contexts == 1, "prune must remove what has expired"

    def test_the_store_s_ttl_holds_where_put_names_none(self) -> None:
        store = self.make_store(namespace=TENANT, ttl=SHORT_TTL)
        mortal, lasting = store.put(make_context(seed=1)), store.put(make_context(seed=2), ttl=3600)

        time.sleep(SHORT_TTL + 0.05)

        assert not store.contains(mortal), "the store's TTL must hold where put names none"
        assert store.contains(lasting), "put's TTL must take precedence over the store's"
        store.close()

    def test_pins_spare_from_ttl(self, store: ContextStore) -> None:
        handle = store.put(make_context(), ttl=SHORT_TTL)
        store.pin(handle)
        assert store.stats().pinned == 1, "stats must count pins"

        time.sleep(SHORT_TTL + 0.05)
        store.prune()

        assert_same_lineage(store.get(handle), make_context())
        store.unpin(handle)
        assert store.stats().pinned == 0, "unpin must undo pin"
        time.sleep(SHORT_TTL + 0.05)
        assert not store.contains(handle), "after unpin the TTL must hold again"

    def test_over_budget_kv_goes_before_lineages(self) -> None:
        size = self.size_of_one()
        store = self.make_store(namespace=TENANT, byte_budget=size * 5 // 2)

        handles = [store.put(make_context(seed=i)) for i in range(4)]

        for seed, handle in enumerate(handles):
            assert_same_lineage(store.get(handle), make_context(seed=seed))
        stats = store.stats()
        assert stats.byte_budget is not None
        assert stats.lineage_bytes + stats.kv_bytes <= stats.byte_budget, "a store must keep to its budget"
        assert stats.evictions > 0, "stats must count evictions"
        store.close()

    def test_over_budget_the_least_recently_used_context_goes(self) -> None:
        size = self.size_of_one(kv=False)
        store = self.make_store(namespace=TENANT, byte_budget=size * 7 // 2)
        handles = [store.put(make_context(seed=i), kv=False) for i in range(3)]
        store.get(handles[0])
        assert store.touch(handles[2]), "touch must say that the context is there"

        newest = store.put(make_context(seed=3), kv=False)

        kept = [store.contains(handle) for handle in (*handles, newest)]
        assert kept == [True, False, True, True], "the least recently used must go, and get and touch are uses"
        store.close()

    def test_pins_spare_from_eviction(self) -> None:
        size = self.size_of_one(kv=False)
        store = self.make_store(namespace=TENANT, byte_budget=size * 5 // 2)
        pinned = store.put(make_context(seed=0), kv=False)
        store.pin(pinned)

        for seed in range(1, 5):
            store.put(make_context(seed=seed), kv=False)

        assert store.contains(pinned), "a pinned context must stay, however old"
        store.pin(store.list()[-1])
        with pytest.raises(StoreFullError):
            store.put(make_context(seed=9), kv=False)
        store.close()

    def test_prune_reports_what_it_removed(self, store: ContextStore) -> None:
        store.put(make_context(), ttl=SHORT_TTL)
        time.sleep(SHORT_TTL + 0.05)

        report = store.prune()

        assert (report.contexts, report.segments) == (1, 2), "prune must count contexts and segments"
        assert report.lineage_bytes > 0, "prune must count bytes"
        again = store.prune()
        assert (again.contexts, again.segments) == (0, 0), "a second prune must find nothing"

    def test_discard_removes_what_is_neither_pinned_nor_in_use(self, store: ContextStore) -> None:
        parent = make_context()
        idle, pinned, kept, used = (
            store.put(c)
            for c in (make_context(parent=parent, seed=1), make_context(seed=2), parent, make_context(seed=3))
        )
        store.pin(pinned)
        time.sleep(0.1)
        store.touch(used)

        report = store.discard([idle, pinned, used, idle.id, "avp:1:" + "0" * 32], idle=0.1)

        assert [h.id for h in store.list()] == [pinned.id, kept.id, used.id], "only what is idle and unpinned must go"
        assert (report.contexts, report.segments) == (1, 2), "segments that others use must stay"
        assert report.lineage_bytes > 0, "discard must count bytes"
        assert_same_lineage(store.get(kept), parent)
        with pytest.raises(InvalidHandleError):
            store.discard([kept, "nonsense"])
        assert store.contains(kept), "with a malformed handle nothing must be removed"

    def test_a_dry_discard_removes_nothing(self, store: ContextStore) -> None:
        handles = [store.put(make_context(seed=seed)) for seed in range(2)]
        before = store.stats()

        report = store.discard(handles, dry_run=True)

        assert store.stats() == before, "a dry run must remove nothing"
        assert store.discard(handles) == report, "a dry run must report what would be removed"
        assert store.stats().contexts == 0, "discard must remove what nobody uses"

    # counting, concurrency, asynchrony

    def test_stats_count(self, store: ContextStore) -> None:
        handle = store.put(make_context())
        store.get(handle)
        store.get(handle)
        with pytest.raises(ContextLostError):
            store.get("avp:1:" + "0" * 32)

        stats = store.stats()

        assert (stats.contexts, stats.segments) == (1, 2), "stats must count handles and segments"
        assert (stats.hits, stats.misses) == (2, 1), "stats must count hits and misses"
        assert stats.lineage_bytes >= make_context().nbytes, "stats must count lineage bytes"
        assert stats.kv_bytes > 0, "stats must count KV bytes"
        assert stats.integrity_failures == 0, "nothing was torn"

    def test_threads_may_use_a_store_at_once(self, store: ContextStore) -> None:
        shared = make_context()

        def work(worker: int) -> list[str]:
            kept = []
            for turn in range(5):
                context = make_context(parent=shared, seed=1 + 5 * worker + turn)
                handle = store.put(context, scope=f"thread-{worker}")
                assert_same_lineage(store.get(handle, scope=f"thread-{worker}"), context)
                assert_same_kv(store.get(handle), context)
                if turn % 2:
                    assert store.delete(handle), "a thread must find what it put"
                else:
                    kept.append(handle.id)
            return kept

        with ThreadPoolExecutor(8) as pool:
            kept = [handle for handles in pool.map(work, range(8)) for handle in handles]

        assert sorted(h.id for h in store.list()) == sorted(kept), "what threads put and did not delete must be there"
        assert store.stats().integrity_failures == 0, "concurrent use must tear nothing"

    def test_threads_that_put_one_recipe_agree(self, store: ContextStore) -> None:
        contexts = [make_context(values=values) for values in range(8)]

        with ThreadPoolExecutor(8) as pool:
            handles = list(pool.map(partial(store.put, kv=False), contexts))

        assert len({handle.id for handle in handles}) == 1, "all writers of a recipe must get one handle"
        found = store.get(handles[0])
        winners = [c for c in contexts if c.readout and found.readout and c.readout.hidden.equal(found.readout.hidden)]
        assert len(winners) == 1, "what is stored must be what one of the writers put"
        assert_same_lineage(found, winners[0])

    def test_every_verb_has_an_async_twin(self, store: ContextStore) -> None:
        async def use() -> None:
            context = make_context()
            handle = await store.aput(context, scope="s", agent="a", text="t", ttl=3600)
            assert_same_lineage(await store.aget(handle, scope="s"), context)
            assert await store.acontains(handle), "acontains must find what aput stored"
            assert await store.atouch(handle), "atouch must find what aput stored"
            assert await store.aadd_kv(context), "aadd_kv must find what aput stored"
            await store.apin(handle)
            assert (await store.astats()).pinned == 1, "apin must pin"
            await store.aunpin(handle)
            assert [h.id for h in await store.alist(scope="s")] == [handle.id], "alist must list"
            assert await store.adrop_kv(handle) > 0, "adrop_kv must drop"
            assert (await store.aprune()).contexts == 0, "aprune must spare what has not expired"
            assert (await store.adiscard([handle], dry_run=True)).contexts == 1, "adiscard must report"
            assert await store.adelete(handle), "adelete must delete"
            with pytest.raises(ContextLostError):
                await store.aget(handle)

        asyncio.run(use())

    def test_tasks_may_use_a_store_at_once(self, store: ContextStore) -> None:
        async def use() -> list[Context]:
            handles = await asyncio.gather(*(store.aput(make_context(seed=i)) for i in range(16)))
            return await asyncio.gather(*(store.aget(handle) for handle in handles))

        for seed, found in enumerate(asyncio.run(use())):
            assert_same_lineage(found, make_context(seed=seed))
