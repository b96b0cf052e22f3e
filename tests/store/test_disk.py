"""What a disk store does beyond what every store does: files, sharing, permissions, several openings of one folder."""

from __future__ import annotations

import errno
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from pool_kv import in_pool
from safetensors import safe_open

from avp_agents.context import Context, LatentSegment, TokenSegment
from avp_agents.errors import ConfigurationError, ContextLostError, StoreError
from avp_agents.kv_cache import HostKv
from avp_agents.store import DiskStore, Namespace
from avp_agents.store import files as store_files
from avp_agents.testing import ContextStoreConformance, make_context
from avp_agents.testing.contexts import assert_same_kv, assert_same_lineage, thread_of
from avp_agents.testing.store_suite import OTHER_NAME, TENANT


class TestConformance(ContextStoreConformance):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make_store(self, **options: Any) -> DiskStore:
        return DiskStore(self.folder, **options)


def disk_store(folder: Path, **options: Any) -> DiskStore:
    """A store over `folder`; a second one is like another process."""
    return DiskStore(folder, namespace=TENANT, **options)


def files(folder: Path, kind: str = "") -> list[Path]:
    return sorted(path for path in folder.rglob(f"*{kind}") if path.is_file())


def bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


# what lies on the disk


def test_another_process_finds_everything(tmp_path: Path) -> None:
    handle = disk_store(tmp_path).put(make_context(), agent="researcher", text="a line")
    other = disk_store(tmp_path)

    assert other.list() == [handle]
    assert_same_lineage(other.get(handle), make_context())
    assert_same_kv(other.get(handle), make_context())


def test_only_the_owner_can_read(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "store"
    store = disk_store(folder)
    store.pin(store.put(make_context()))

    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]

    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in files(folder)} == {0o600}


def test_one_record_and_one_kv_file_per_segment(tmp_path: Path) -> None:
    store = disk_store(tmp_path)
    parent = make_context()
    for context in (parent, make_context(parent=parent, seed=1), make_context(parent=parent, seed=2)):
        store.put(context)

    assert len(files(tmp_path, ".segment")) == len(files(tmp_path, ".safetensors")) == 6
    assert len(files(tmp_path, ".handle")) == 3


def test_kv_files_are_plain_safetensors(tmp_path: Path) -> None:
    context = make_context(steps=0, dtype="bfloat16")
    disk_store(tmp_path).put(context)

    (path,) = files(tmp_path, ".safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        found = HostKv(
            tuple((file.get_tensor(f"layers.{i}.keys"), file.get_tensor(f"layers.{i}.values")) for i in (0, 1))
        )

    assert (metadata["start"], metadata["stop"]) == ("0", "12")
    assert_same_kv(context, context.with_kv(found))


def test_a_thread_takes_little_more_than_its_last_context(tmp_path: Path) -> None:
    turns = thread_of(20, tokens=30, head_dim=64)
    whole, last = disk_store(tmp_path / "whole"), disk_store(tmp_path / "last")

    for turn in turns:
        whole.put(turn)
    last.put(turns[-1])

    kv = turns[-1].kv
    assert kv is not None
    assert bytes_on_disk(tmp_path / "whole") <= 1.1 * bytes_on_disk(tmp_path / "last")
    assert bytes_on_disk(tmp_path / "whole") <= 1.1 * (turns[-1].nbytes + kv.nbytes)


def test_only_the_new_positions_are_read_from_an_engine(tmp_path: Path) -> None:
    store = disk_store(tmp_path)
    parent = make_context(steps=0, kv_short=1)
    child = make_context(parent=parent, seed=1, steps=0)
    expected = make_context(parent=parent, seed=1, steps=0)
    parent_kv, child_kv = in_pool(parent), in_pool(child)

    store.put(parent)
    handle = store.put(child)
    store.put(child)

    assert (parent_kv.reads, child_kv.reads) == ([(0, 11)], [(11, 24)])
    assert_same_kv(store.get(handle), expected)


def test_a_kv_cache_evicted_while_it_is_stored_costs_no_context(tmp_path: Path) -> None:
    store = disk_store(tmp_path)
    context = make_context()
    in_pool(context).evict_at_read = True

    handle = store.put(context)

    assert_same_lineage(store.get(handle), make_context())
    assert store.get(handle).kv is None


def test_a_mapped_kv_cache_outlives_its_file(tmp_path: Path) -> None:
    store = disk_store(tmp_path)
    handle = store.put(make_context(steps=0))
    found = store.get(handle)

    store.delete(handle)

    assert files(tmp_path, ".safetensors") == []
    assert_same_kv(found, make_context(steps=0))


def test_writing_into_a_mapped_kv_cache_does_not_reach_the_file(tmp_path: Path) -> None:
    store = disk_store(tmp_path)
    handle = store.put(make_context(steps=0))

    kv = store.get(handle).kv
    assert kv is not None
    kv.to_host().layers[0][0].zero_()

    assert_same_kv(disk_store(tmp_path).get(handle), make_context(steps=0))


# gaps and overlaps along a chain


def test_a_dropped_parent_leaves_no_gap(tmp_path: Path) -> None:
    """Whatever files go missing, a cache that is read has no hole, and the next put fills what is missing."""
    store = disk_store(tmp_path)
    turns = thread_of(3)
    handles = [store.put(turn) for turn in turns]
    for path in files(tmp_path, ".safetensors"):
        kept = path.read_bytes()
        path.unlink()

        found = disk_store(tmp_path).get(handles[-1])
        assert_prefix_of(found, turns[-1])
        assert found.kv_len < turns[-1].kv_len

        store.put(turns[-1])
        assert_same_kv(disk_store(tmp_path).get(handles[-1]), turns[-1])
        path.write_bytes(kept)


def test_a_longer_cache_replaces_a_much_shorter_one(tmp_path: Path) -> None:
    store = disk_store(tmp_path)
    handle = store.put(make_context(steps=0, kv_short=8))

    store.put(make_context(steps=0))

    assert store.get(handle).kv_len == 12


def test_a_child_goes_on_where_a_parent_s_kv_ended_or_later(tmp_path: Path) -> None:
    """The parent's KV is first one position short, then stored again whole: the child's file overlaps, and fits."""
    store = disk_store(tmp_path)
    parent = make_context(steps=0)
    assert parent.kv is not None
    short = parent.with_kv(parent.kv.to_host(0, 11))
    child = make_context(parent=parent, seed=1, steps=0)
    store.put(short)
    handle = store.put(child)
    first = next(p for p in files(tmp_path, ".safetensors") if '"start":"0"' in p.read_bytes()[:300].decode("latin1"))
    first.unlink()

    store.put(parent)

    assert_same_kv(store.get(handle), child)


def assert_prefix_of(found: Context, whole: Context) -> None:
    if found.kv is not None and whole.kv is not None:
        assert_same_kv(found, whole.with_kv(whole.kv.to_host(0, found.kv_len)))


# what cannot be stored


def broken_contexts() -> dict[str, Context]:
    good = make_context()
    tokens, latent = good.lineage
    assert isinstance(latent, LatentSegment)
    assert good.kv is not None
    assert good.readout is not None

    def with_latents(embeddings: torch.Tensor) -> Context:
        return Context(good.fingerprint, good.dtype, (tokens, LatentSegment(embeddings, latent.recipe)))

    ragged = HostKv(((torch.zeros(2, 4, 8), torch.zeros(2, 3, 8)),))
    return {
        "negative id": Context(good.fingerprint, good.dtype, (TokenSegment((1, -1)),)),
        "NaN latents": with_latents(torch.full((4, 16), torch.nan)),
        "latents of another dtype": with_latents(torch.zeros(4, 16, dtype=torch.float16)),
        "latents of another shape": with_latents(torch.zeros(64)),
        "unknown dtype": Context(good.fingerprint, "int8", good.lineage),
        "KV longer than the lineage": Context(good.fingerprint, good.dtype, (tokens,)).with_kv(good.kv),
        "KV of another dtype": good.with_kv(HostKv(((torch.zeros(2, 4, 8).double(), torch.zeros(2, 4, 8).double()),))),
        "ragged KV": good.with_kv(ragged),
    }


@pytest.mark.parametrize("what", broken_contexts())
def test_what_could_not_be_read_back_is_refused(tmp_path: Path, what: str) -> None:
    store = disk_store(tmp_path)

    with pytest.raises(ConfigurationError):
        store.put(broken_contexts()[what])

    assert store.stats().kv_bytes == 0


def test_a_full_disk_is_reported_and_tears_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = disk_store(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(store_files.os, "fsync", full)
        with pytest.raises(StoreError, match="No space left"):
            store.put(make_context())

    assert [path for path in files(tmp_path) if path.name.startswith(".tmp-")] == []
    assert store.list() == []
    assert_same_kv(store.get(store.put(make_context())), make_context())


def test_a_path_that_is_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(StoreError, match="path"):
        disk_store(tmp_path / "file")


# deletion, pruning, budget


def test_deleting_a_namespace_deletes_only_it(tmp_path: Path) -> None:
    store, other = disk_store(tmp_path), DiskStore(tmp_path, namespace=OTHER_NAME)
    handle, kept = store.put(make_context()), other.put(make_context())

    store.delete_namespace()

    assert store.list() == []
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("tenant")]
    assert_same_kv(other.get(kept), make_context())
    with pytest.raises(ContextLostError):
        store.get(handle)
    assert_same_lineage(store.get(store.put(make_context())), make_context())


def test_prune_sweeps_what_killed_writers_left(tmp_path: Path) -> None:
    store = disk_store(tmp_path)
    parent = make_context()
    kept = store.put(parent)
    orphaned = store.put(make_context(parent=parent, seed=1))
    before = files(tmp_path)
    segments = files(tmp_path, ".segment")[0].parent
    (segments / ".tmp-0123456789abcdef").write_bytes(b"torn")
    (segments / f"{'0' * 32}.safetensors").write_bytes(b"KV of a segment that never was")
    next(path for path in files(tmp_path, ".handle") if orphaned.id[6:] in path.name).unlink()

    report = store.prune()

    assert report.segments == 2
    assert len(files(tmp_path)) == len(before) - 1 - 2 - 2
    assert_same_kv(store.get(kept), parent)


def test_files_with_other_names_are_left_alone(tmp_path: Path) -> None:
    store = disk_store(tmp_path)
    handle = store.put(make_context())
    outside = tmp_path / "outside"
    outside.write_text("not ours")
    handles = files(tmp_path, ".handle")[0].parent
    alien = [handles / "notes.handle", handles / f"{'0' * 33}.handle", handles / "..handle"]
    for path in alien:
        path.symlink_to(outside)

    store.prune()

    assert [listed.id for listed in store.list()] == [handle.id]
    assert all(path.exists() for path in alien)
    assert outside.read_text() == "not ours"


def test_a_budget_is_kept_when_a_store_is_opened_again(tmp_path: Path) -> None:
    for seed in range(6):
        disk_store(tmp_path).put(make_context(seed=seed))
    size = disk_store(tmp_path).stats()
    budget = (size.lineage_bytes + size.kv_bytes) // 2

    store = disk_store(tmp_path, byte_budget=budget)
    store.put(make_context(seed=9))

    stats = store.stats()
    assert stats.lineage_bytes + stats.kv_bytes <= budget
    assert store.contains(store.id_of(make_context(seed=9)))


def test_processes_that_write_at_once_keep_to_the_budget_together(tmp_path: Path) -> None:
    probe = disk_store(tmp_path / "probe")
    probe.put(make_context())
    size = probe.stats().lineage_bytes + probe.stats().kv_bytes
    budget = 10 * size
    stores = [disk_store(tmp_path / "store", byte_budget=budget) for _ in range(3)]

    for seed in range(30):
        stores[seed % 3].put(make_context(seed=seed))

    stats = stores[0].stats()
    assert stats.lineage_bytes + stats.kv_bytes <= budget * (1 + 3 / 64)


def test_a_context_s_own_ancestors_are_not_evicted_for_it(tmp_path: Path) -> None:
    parent = make_context(tokens=400, steps=0, kv_short=None)
    probe = disk_store(tmp_path / "probe")
    probe.put(parent)
    store = disk_store(tmp_path / "store", byte_budget=probe.stats().lineage_bytes + 400)
    store.put(parent)
    other = store.put(make_context(seed=5, tokens=10, steps=0, kv_short=None))

    child = make_context(parent=parent, seed=1, tokens=10, steps=0, kv_short=None)
    handle = store.put(child)

    assert_same_lineage(store.get(handle), child)
    assert not store.contains(other)


def test_last_uses_survive_a_restart(tmp_path: Path) -> None:
    handle = disk_store(tmp_path).put(make_context(), ttl=3600)
    (record,) = files(tmp_path, ".handle")
    os.utime(record, (time.time() - 4000, time.time() - 4000))

    assert not disk_store(tmp_path).contains(handle)


def test_the_readout_of_a_context_put_after_its_child_is_kept(tmp_path: Path) -> None:
    store = disk_store(tmp_path)
    parent = make_context()
    store.put(make_context(parent=parent, seed=1))
    assert store.stats().contexts == 1

    handle = store.put(parent)

    assert_same_lineage(disk_store(tmp_path).get(handle), parent)


def test_namespaces_of_one_name_do_not_share_a_folder(tmp_path: Path) -> None:
    keys = [b"a" * 32, b"b" * 32]

    for key in keys:
        DiskStore(tmp_path, namespace=Namespace("tenant", key)).put(make_context())

    assert len(list(tmp_path.iterdir())) == len(keys)


def test_the_readout_of_a_context_put_at_the_same_time_as_its_child_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child's segments include the parent's, without the parent's readout."""
    store, other = disk_store(tmp_path), disk_store(tmp_path)
    parent = make_context()
    turns = iter([lambda: other.put(make_context(parent=make_context(), seed=1))])
    writing = store.blobs.writing

    def overtaken() -> AbstractContextManager[None]:
        for put in turns:
            put()
        return writing()

    monkeypatch.setattr(store.blobs, "writing", overtaken)

    handle = store.put(parent)

    assert_same_lineage(disk_store(tmp_path).get(handle), make_context())


def test_a_longer_kv_cache_stored_meanwhile_is_not_replaced_by_a_shorter_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = disk_store(tmp_path), disk_store(tmp_path)
    turns = iter([lambda: other.put(make_context(steps=0))])
    make_room = store._make_room

    def overtaken(*arguments: Any, **options: Any) -> bool:
        if options.get("kv_only"):
            for put in turns:
                put()
        return make_room(*arguments, **options)

    monkeypatch.setattr(store, "_make_room", overtaken)

    handle = store.put(make_context(steps=0, kv_short=5))

    assert store.get(handle).kv_len == 12
