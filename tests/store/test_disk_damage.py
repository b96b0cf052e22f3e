"""Files that are torn, altered or exchanged are noticed, counted, and treated as absent: never used as data."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avp_agents.errors import ContextLostError, StoreError
from avp_agents.handle import ContextHandle
from avp_agents.store import DiskStore
from avp_agents.testing import make_context
from avp_agents.testing.contexts import assert_same_kv, assert_same_lineage
from avp_agents.testing.store_suite import TENANT

Damage = Callable[[bytes], bytes]

PARENT = make_context()
CHILD = make_context(parent=PARENT, seed=1, dtype="float32")
KINDS = ["handle", "segment", "safetensors"]

offsets = st.floats(0, 1, exclude_max=True)


def flip(where: float, bit: int) -> Damage:
    """One bit changed, at a share of the file's length."""

    def damage(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[int(where * len(data))] ^= 1 << bit
        return bytes(changed)

    return damage


damages = st.one_of(
    st.builds(flip, offsets, st.integers(0, 7)),
    # the headers are short: most flips above hit the payload
    st.integers(0, 63).map(lambda at: lambda data: bytes([*data[:at], data[at] ^ 0xFF, *data[at + 1 :]])),
    offsets.map(lambda share: lambda data: data[: int(share * len(data))]),
    st.binary(min_size=1, max_size=40).map(lambda rest: lambda data: data + rest),
    st.just(lambda data: bytes(len(data))),
    # a length field that asks for the whole address space
    st.just(lambda data: b"\xff" * 16 + data[16:]),
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a parent and a child."""
    folder = tmp_path_factory.mktemp("pristine")
    store = DiskStore(folder, namespace=TENANT)
    store.put(PARENT)
    store.put(CHILD)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "store"))


def files(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.rglob(f"*.{kind}"))


def check_reads(folder: Path) -> int:
    """Read everything: it is right or it is lost. Returns the failures counted."""
    store = DiskStore(folder, namespace=TENANT)
    for context in (PARENT, CHILD):
        try:
            found = store.get(store.id_of(context))
        except ContextLostError:
            assert not store.contains(store.id_of(context))
            continue
        assert_same_lineage(found, context)
        if found.kv is not None and context.kv is not None:
            assert_same_kv(found, context.with_kv(context.kv.to_host(0, found.kv_len)))
    return store.stats().integrity_failures


@pytest.mark.parametrize("kind", KINDS)
@given(choice=st.integers(0, 3), damage=damages)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_passes_for_data(folder: Path, kind: str, choice: int, damage: Damage) -> None:
    found = files(folder, kind)
    path = found[choice % len(found)]
    whole = path.read_bytes()

    path.write_bytes(damage(whole))
    try:
        assert check_reads(folder) > 0
    finally:
        path.write_bytes(whole)
    assert check_reads(folder) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_of_a_header_counts(folder: Path, kind: str) -> None:
    path = files(folder, kind)[0]
    whole = path.read_bytes()
    for at in range(0, min(len(whole), 600), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x01]) + whole[at + 1 :])
        assert check_reads(folder) > 0, f"byte {at} of {path.name} is not covered by its MAC"


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cannot_take_another_s_place(folder: Path, kind: str) -> None:
    one, other = files(folder, kind)[:2]
    one_bytes, other_bytes = one.read_bytes(), other.read_bytes()

    one.write_bytes(other_bytes)
    other.write_bytes(one_bytes)

    assert check_reads(folder) > 0


def test_a_change_after_the_first_read_is_noticed(folder: Path) -> None:
    """A KV file is checked once per process, and again when it is another file than the one that was checked."""
    store = DiskStore(folder, namespace=TENANT)
    handle = store.id_of(PARENT)
    assert store.get(handle).kv_len == len(PARENT)
    path = next(p for p in files(folder, "safetensors") if b'"start":"0"' in p.read_bytes())
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)

    assert store.get(handle).kv is None
    assert store.stats().integrity_failures == 1


def test_damage_is_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = files(folder, "safetensors")[0]
    path.write_bytes(path.read_bytes()[:-1])

    with caplog.at_level(logging.WARNING):
        check_reads(folder)

    assert f"KV-cache of segment {path.stem}" in caplog.text
    assert "MAC mismatch" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_putting_again_repairs(folder: Path, kind: str) -> None:
    for path in files(folder, kind):
        path.write_bytes(b"torn")
    store = DiskStore(folder, namespace=TENANT)

    for context in (PARENT, CHILD):
        assert_same_lineage(store.get(store.put(context)), context)
        assert_same_kv(store.get(store.id_of(context)), context)

    assert check_reads(folder) == 0


def test_a_kv_cache_is_not_paired_with_latents_that_replaced_its_own(folder: Path) -> None:
    """A torn lineage is put again by another run, whose latents differ in their last bits; the old KV stays unused."""
    for path in files(folder, "segment"):
        path.write_bytes(b"torn")
    store = DiskStore(folder, namespace=TENANT)

    handle = store.put(make_context(values=1), kv=False)

    assert_same_lineage(store.get(handle), make_context(values=1))
    assert store.get(handle).kv_len <= len(PARENT.lineage[0])


@pytest.mark.parametrize("kind", KINDS)
def test_prune_removes_what_cannot_be_read(folder: Path, kind: str) -> None:
    for path in files(folder, kind):
        path.write_bytes(b"torn")
    store = DiskStore(folder, namespace=TENANT)

    store.prune()

    expected = 2 if kind == "safetensors" else 0
    assert len(store.list()) == expected
    assert len(files(folder, "segment")) == 2 * expected


def test_a_record_without_its_segments_is_lost(folder: Path) -> None:
    for path in files(folder, "segment"):
        path.unlink()
    store = DiskStore(folder, namespace=TENANT)

    with pytest.raises(ContextLostError):
        store.get(ContextHandle(store.id_of(PARENT)))
    assert store.prune().contexts == 2


def test_an_unreadable_file_is_an_error_not_an_absence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read for want of descriptors or permission may be whole: nothing is concluded, or removed."""
    store = DiskStore(folder, namespace=TENANT)

    def refuse(path: Path) -> bytes:
        raise PermissionError(f"[Errno 13] Permission denied: {path}")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", refuse)
        for verb in (lambda: store.get(store.id_of(PARENT)), store.prune):
            with pytest.raises(StoreError, match="Permission denied"):
                verb()

    assert check_reads(folder) == 0
