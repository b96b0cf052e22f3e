"""Whatever goes into a store comes out of it: values, KV-caches, and families of contexts that share a beginning."""

from __future__ import annotations

import json

import pytest

from avp_agents.context import Context
from avp_agents.errors import ConfigurationError, ContextLostError, InvalidHandleError, NotStoredError
from avp_agents.store import ContextStore
from avp_agents.testing.contexts import assert_same_kv, assert_same_lineage, make_context, thread_of
from avp_agents.testing.store_suite import StoreSuite


class StoreValues(StoreSuite):
    """Values, KV-caches, families."""

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

        assert handle.id == store.id_of(context, scope="thread-1"), (
            "the id must be the keyed digest of recipe and scope"
        )
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
