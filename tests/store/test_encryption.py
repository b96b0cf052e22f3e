"""What lies on a server is encrypted; a wrong key is named, and altered bytes are absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from avp_agents.context import TokenSegment
from avp_agents.errors import ContextLostError, EncryptionKeyError, IntegrityError
from avp_agents.store import Encryption, ObjectStore
from avp_agents.store.encryption import CHUNK, plain_size, sealed_size
from avp_agents.testing import make_context
from avp_agents.testing.contexts import assert_same_kv, assert_same_lineage
from avp_agents.testing.store_suite import TENANT

KEY, OTHER_KEY = b"k" * 32, b"o" * 32


def open_store(folder: Path, encryption: Encryption | None) -> ObjectStore:
    return ObjectStore(folder.as_uri(), namespace=TENANT, encryption=encryption)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_what_is_sealed_opens_again(size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    sealed = Encryption(KEY).seal(data, "segments/1")

    assert Encryption(KEY).open(sealed, "segments/1") == data
    assert (len(sealed), plain_size(len(sealed))) == (sealed_size(size), size)


def test_equal_bytes_are_sealed_differently() -> None:
    assert Encryption(KEY).seal(b"same", "a") != Encryption(KEY).seal(b"same", "a")


@pytest.mark.parametrize("position", [6 + 8, 6 + 8 + 16, -1])
def test_altered_bytes_do_not_open(position: int) -> None:
    sealed = bytearray(Encryption(KEY).seal(b"x" * 100, "segments/1"))
    sealed[position] ^= 1

    with pytest.raises(IntegrityError):
        Encryption(KEY).open(sealed, "segments/1")


def test_bytes_of_another_name_cut_or_reordered_do_not_open() -> None:
    encryption = Encryption(KEY)
    sealed = encryption.seal(b"a" * CHUNK + b"b" * CHUNK, "payload/1")
    head, chunk = 30, CHUNK + 16
    swapped = sealed[:head] + sealed[head + chunk :] + sealed[head : head + chunk]

    for data, name in [
        (sealed, "payload/2"),
        (sealed[: head + chunk], "payload/1"),
        (sealed[:-1], "payload/1"),
        (sealed[:head], "payload/1"),
        (swapped, "payload/1"),
    ]:
        with pytest.raises(IntegrityError):
            encryption.open(data, name)


def test_nothing_readable_reaches_the_server(tmp_path: Path) -> None:
    store = open_store(tmp_path, Encryption(KEY))
    context = make_context()
    first = context.lineage[0]
    assert isinstance(first, TokenSegment)

    store.put(context, agent="researcher", text="a line for people")

    stored = b"".join(path.read_bytes() for path in files(tmp_path))
    assert b"researcher" not in stored
    assert b"a line for people" not in stored
    assert context.fingerprint.encode() not in stored
    assert b"layers.0.keys" not in stored
    assert b"".join(token.to_bytes(4, "little") for token in first.token_ids) not in stored


def test_a_wrong_key_is_named(tmp_path: Path) -> None:
    handle = open_store(tmp_path, Encryption(KEY)).put(make_context())

    with pytest.raises(EncryptionKeyError, match="another key"):
        open_store(tmp_path, Encryption(OTHER_KEY)).get(handle)
    with pytest.raises(EncryptionKeyError, match="encrypted data"):
        open_store(tmp_path, None).get(handle)


def test_plain_data_is_not_taken_for_encrypted(tmp_path: Path) -> None:
    handle = open_store(tmp_path, None).put(make_context())

    with pytest.raises(EncryptionKeyError, match="not encrypted"):
        open_store(tmp_path, Encryption(KEY)).get(handle)


def test_keys_can_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = open_store(tmp_path, Encryption(KEY)).put(make_context())
    monkeypatch.setenv("AVP_ENCRYPTION_KEY", f"{OTHER_KEY.hex()},{KEY.hex()}")
    store = open_store(tmp_path, Encryption.from_environment())

    new = store.put(make_context(seed=1))

    assert_same_kv(store.get(handle), make_context())
    assert_same_lineage(open_store(tmp_path, Encryption(OTHER_KEY)).get(new), make_context(seed=1))


@pytest.mark.parametrize("folder", ["handles", "segments", "kv", "payload"])
def test_altered_records_are_absent(tmp_path: Path, folder: str) -> None:
    store = open_store(tmp_path, Encryption(KEY))
    handle = store.put(make_context())
    for path in files(tmp_path):
        if path.parent.name == folder:
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    if folder in ("handles", "segments"):
        with pytest.raises(ContextLostError):
            store.get(handle)
    else:
        assert store.get(handle).kv is None
        assert_same_lineage(store.get(handle), make_context())
    assert store.stats().integrity_failures > 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "is not set"), ("not a key!", "neither hex nor base64"), ("ab" * 16, "16 bytes"), ("ab" * 33, "32 bytes")],
)
def test_malformed_keys_are_refused(monkeypatch: pytest.MonkeyPatch, text: str | None, reason: str) -> None:
    if text is None:
        monkeypatch.delenv("AVP_ENCRYPTION_KEY", raising=False)
    else:
        monkeypatch.setenv("AVP_ENCRYPTION_KEY", text)

    with pytest.raises(EncryptionKeyError, match=reason):
        Encryption.from_environment()
