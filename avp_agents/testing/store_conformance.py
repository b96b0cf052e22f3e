"""What every context store promises, as a pytest class. A backend passes it or it is not one.

>>> class TestMyStore(ContextStoreConformance):
...     def make_store(self, **options):
...         return MyStore("redis://localhost", **options)

It needs neither an engine nor a model: contexts are made of small random tensors.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from avp_agents.context import Context
from avp_agents.errors import ConfigurationError, ContextLostError, InvalidHandleError, NotStoredError, StoreFullError
from avp_agents.store import ContextStore, Namespace
from avp_agents.testing.contexts import assert_same_kv, assert_same_lineage, make_context

TENANT = Namespace("tenant", b"k" * 32)
SAME_NAME_OTHER_KEY = Namespace("tenant", b"x" * 32)
OTHER_NAME = Namespace("other", b"k" * 32)
SHORT_TTL = 0.5


class ContextStoreConformance:
    """Subclass it, name it ``Test...``, and override `make_store`."""

    def make_store(self, **options: Any) -> ContextStore:
        """A store over this test's own backend.

        Called several times in some tests: stores of one namespace may then share what they hold, stores of different
        namespaces must not. A test begins with an empty backend.

        Args:
            options: ``namespace`` (a `Namespace`, always), ``byte_budget`` and ``ttl`` (some tests).
        """
        raise NotImplementedError("Override make_store(**options) to return your store.")

    @pytest.fixture
    def store(self) -> Iterator[ContextStore]:
        """An unbounded store that keeps what it has."""
        store = self.make_store(namespace=TENANT)
        yield store
        store.close()

    # put and get

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_get_returns_what_was_put(self, store: ContextStore, dtype: str) -> None:
        context = make_context(dtype=dtype)

        handle = store.put(context, agent="researcher", text="24 * 17 + 3")
        found = store.get(handle)

        assert_same_lineage(found, make_context(dtype=dtype))
        assert_same_kv(found, make_context(dtype=dtype))
        assert (found.fingerprint, found.dtype) == (context.fingerprint, dtype), "the model's identity must come back"

    def test_put_describes_the_context_in_its_handle(self, store: ContextStore) -> None:
        context = make_context()

        handle = store.put(context, scope="thread-1", agent="researcher", text="24 * 17 + 3")

        assert handle.id == store.id_of(context, scope="thread-1"), "the id must be the keyed digest of recipe and scope"
        assert (handle.agent, handle.text) == ("researcher", "24 * 17 + 3"), "agent and text must be on the handle"
        assert (handle.tokens, handle.bytes) == (len(context), context.nbytes), "the handle must tell the size"
        assert handle.model == context.fingerprint[:16], "the handle must tell the model"
        assert context.to_handle() == handle, "put must note the handle on the context"
        assert store.get(handle).to_handle() == handle, "a context out of a store must know its handle"

    def test_a_handle_may_come_as_state_or_id(self, store: ContextStore) -> None:
        handle = store.put(make_context())
        state = json.loads(json.dumps(handle.to_state()))

        for form in (handle, state, handle.id):
            assert store.get(form).recipe_id == make_context().recipe_id, "every form of a handle must resolve"
            assert store.contains(form), "every form of a handle must be recognised"

    @pytest.mark.parametrize(
        "malformed",
        ["", "avp:1:", "avp:1:" + "A" * 32, "avp:2:" + "0" * 32, "avp:1:" + "0" * 31 + "/", "avp:1:../../etc/passwd"],
    )
    def test_malformed_handles_are_refused(self, store: ContextStore, malformed: str) -> None:
        for verb in (store.get, store.contains, store.touch, store.delete, store.drop_kv, store.pin, store.unpin):
            with pytest.raises(InvalidHandleError):
                verb(malformed)

    def test_unknown_handles_are_lost(self, store: ContextStore) -> None:
        unknown = "avp:1:" + "0" * 32

        with pytest.raises(ContextLostError):
            store.get(unknown)
        with pytest.raises(ContextLostError):
            store.pin(unknown)
        assert not store.contains(unknown), "contains must not find what was never put"
        assert not store.touch(unknown), "touch must say that nothing was there"
        assert not store.delete(unknown), "delete must say that nothing was there"
        assert store.drop_kv(unknown) == 0, "drop_kv must free nothing where nothing is"
        store.unpin(unknown)

    def test_an_empty_context_cannot_be_put(self, store: ContextStore) -> None:
        with pytest.raises(ConfigurationError):
            store.put(Context("0" * 64, "float32", ()))

    def test_the_first_writer_of_a_recipe_wins(self, store: ContextStore) -> None:
        first, second = make_context(values=1), make_context(values=2)

        handle = store.put(first, agent="first")
        again = store.put(second, agent="second")

        assert again == handle, "a later put of the same recipe must return the handle of the first"
        assert_same_lineage(store.get(handle), make_context(values=1))
        assert_same_kv(store.get(handle), make_context(values=1))

    def test_put_is_idempotent(self, store: ContextStore) -> None:
        context = make_context()

        handles = {store.put(context).id for _ in range(3)}

        assert len(handles) == 1, "the same context must always get the same handle"
        assert store.stats().contexts == 1, "putting a context again must not store it again"

    # KV-caches

    def test_kv_can_be_left_out_and_added_later(self, store: ContextStore) -> None:
        handle = store.put(make_context(), kv=False)
        assert store.get(handle).kv is None, "put(kv=False) must not store the KV-cache"

        store.put(make_context())

        assert_same_kv(store.get(handle), make_context())

    def test_add_kv_completes_what_is_stored(self, store: ContextStore) -> None:
        handle = store.put(make_context(), kv=False, scope="thread-1")
        offered = store.get(handle)
        assert make_context().kv is not None
        offered.attach(kv=make_context().kv)

        assert store.add_kv(offered), "add_kv must say that the context is there"
        assert_same_kv(store.get(handle), make_context())
        assert [h.id for h in store.list()] == [handle.id], "add_kv must not make another handle"

    def test_add_kv_brings_nothing_back(self, store: ContextStore) -> None:
        context = make_context()
        handle = store.put(context)
        store.delete(handle)

        assert not store.add_kv(context), "add_kv must say that the context is gone"
        assert not store.contains(handle), "add_kv must not bring a deleted context back"

    def test_add_kv_needs_a_context_that_was_put(self, store: ContextStore) -> None:
        with pytest.raises(NotStoredError):
            store.add_kv(make_context())

    def test_kv_of_other_values_is_not_kept(self, store: ContextStore) -> None:
        handle = store.put(make_context(values=1, tokens=12), kv=False)

        store.put(make_context(values=2, tokens=12))

        of_tokens_at_most = store.get(handle).kv_len <= 12
        assert of_tokens_at_most, "a KV-cache must not be paired with latents it was not computed from"

    @pytest.mark.parametrize("short", [1, 5])
    def test_kv_may_be_shorter_than_the_lineage(self, store: ContextStore, short: int) -> None:
        context = make_context(steps=0, kv_short=short)

        found = store.get(store.put(context))

        assert found.kv_len == len(found) - short, "a KV-cache must come back with the positions it had"
        assert_same_kv(found, make_context(steps=0, kv_short=short))

    def test_drop_kv_keeps_the_lineage(self, store: ContextStore) -> None:
        handle = store.put(make_context())

        freed = store.drop_kv(handle)

        assert freed > 0, "drop_kv must say how much it freed"
        assert store.get(handle).kv is None, "after drop_kv there must be no KV-cache"
        assert_same_lineage(store.get(handle), make_context())
        assert store.drop_kv(handle) == 0, "drop_kv must free nothing the second time"

    def test_drop_kv_spares_what_another_handle_uses(self, store: ContextStore) -> None:
        handle = store.put(make_context(), scope="a")
        store.put(make_context(), scope="b")

        assert store.drop_kv(handle) == 0, "a KV-cache that another handle uses must stay"
        assert_same_kv(store.get(handle), make_context())

    def test_drop_kv_spares_descendants(self, store: ContextStore) -> None:
        parent = make_context()
        handle, child_handle = store.put(parent), store.put(make_context(parent=parent, seed=1))

        store.drop_kv(handle)

        assert_same_kv(store.get(child_handle), make_context(parent=make_context(), seed=1))

    # families of contexts

    def test_twenty_turns_come_back_whole(self, store: ContextStore) -> None:
        turns = thread_of(20)
        handles = [store.put(turn) for turn in turns]

        for handle, turn in zip(handles, turns, strict=True):
            assert_same_lineage(store.get(handle), turn)
            assert_same_kv(store.get(handle), turn)

    def test_a_child_can_be_put_before_its_parent(self, store: ContextStore) -> None:
        parent = make_context()
        child = make_context(parent=parent, seed=1)

        child_handle, handle = store.put(child), store.put(parent)

        assert_same_lineage(store.get(child_handle), child)
        assert_same_lineage(store.get(handle), parent)
        assert_same_kv(store.get(handle), parent)

    def test_equal_prefixes_are_kept_once(self, store: ContextStore) -> None:
        parent = make_context(tokens=500, steps=0)
        store.put(parent, kv=False)
        alone = store.stats().lineage_bytes

        for seed in range(1, 4):
            store.put(make_context(parent=parent, seed=seed, tokens=10, steps=0), kv=False)

        stats = store.stats()
        assert (stats.contexts, stats.segments) == (4, 4), "a shared segment must be one segment"
        assert stats.lineage_bytes < 2 * alone, "a shared segment must be kept once"

    def test_delete_removes_only_what_nothing_else_uses(self, store: ContextStore) -> None:
        parent = make_context()
        sibling, child = make_context(parent=parent, seed=1), make_context(parent=parent, seed=2)
        handle, sibling_handle, child_handle = store.put(parent), store.put(sibling), store.put(child)

        assert store.delete(handle), "delete must say that the handle was there"
        assert not store.contains(handle), "a deleted handle must be gone"
        assert_same_lineage(store.get(child_handle), child)
        assert_same_kv(store.get(child_handle), child)
        store.delete(child_handle)
        assert_same_kv(store.get(sibling_handle), sibling)
        store.delete(sibling_handle)
        stats = store.stats()
        left = stats.contexts, stats.segments, stats.lineage_bytes, stats.kv_bytes
        assert left == (0, 0, 0, 0), "deleting the last handle must leave nothing behind"

    def test_delete_is_idempotent(self, store: ContextStore) -> None:
        handle = store.put(make_context())

        assert store.delete(handle), "the first delete must find the handle"
        assert not store.delete(handle), "the second delete must find nothing"
        with pytest.raises(ContextLostError):
            store.get(handle)

    def test_a_deleted_context_can_be_put_again(self, store: ContextStore) -> None:
        store.delete(store.put(make_context(values=1)))

        handle = store.put(make_context(values=2))

        assert_same_lineage(store.get(handle), make_context(values=2))

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
        winner = next(c for c in contexts if found.readout is not None and found.readout.hidden.equal(hidden_of(c)))
        assert_same_lineage(found, winner)

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

    def size_of_one(self, *, kv: bool = True) -> int:
        """Bytes that count against `byte_budget` for one context of `make_context`'s default size."""
        probe = self.make_store(namespace=Namespace("probe", b"p" * 32))
        handle = probe.put(make_context(), kv=kv)
        stats = probe.stats()
        probe.delete(handle)
        probe.close()
        return stats.lineage_bytes + stats.kv_bytes


def thread_of(turns: int, **options: Any) -> list[Context]:
    """A conversation: each context extends the one before, whose last token has no KV yet."""
    contexts: list[Context] = []
    for turn in range(turns):
        parent = contexts[-1] if contexts else None
        contexts.append(make_context(parent=parent, seed=turn, steps=0, kv_short=1, **options))
    return contexts


def hidden_of(context: Context) -> Any:
    """The hidden state of a context that has a readout."""
    assert context.readout is not None
    return context.readout.hidden
