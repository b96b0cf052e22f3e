"""Contexts in an object storage: a real S3 server, and a folder."""

from __future__ import annotations

import os
import secrets
import socket
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from servers import Server, s3_server

from avp_agents.errors import ConfigurationError, StoreUnavailableError
from avp_agents.store import MemoryStore, ObjectStore, TieredStore
from avp_agents.store.objects import ObjectBlobs
from avp_agents.testing import ContextStoreConformance, make_context
from avp_agents.testing.contexts import assert_same_kv
from avp_agents.testing.store_suite import TENANT


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(server: Server) -> str:
    """The URL of a new bucket."""
    name = f"contexts-{secrets.token_hex(4)}"
    made = urllib.request.Request(f"http://127.0.0.1:{server.port}/{name}", method="PUT")
    with urllib.request.urlopen(made, timeout=10):
        return f"s3://{name}/team"


@pytest.fixture
def options(server: Server) -> dict[str, str]:
    """How the server is reached."""
    endpoint = f"http://127.0.0.1:{server.port}"
    return {"endpoint": endpoint, "access_key_id": "key", "secret_access_key": "secret", "region": "us-east-1"}


class TestS3Conformance(ContextStoreConformance):
    @pytest.fixture(autouse=True)
    def _bucket(self, bucket: str, options: dict[str, str]) -> None:
        self.bucket, self.options = bucket, options

    def make_store(self, **options: Any) -> ObjectStore:
        return ObjectStore(self.bucket, options=self.options, **options)


@pytest.fixture
def folder(tmp_path: Path) -> ObjectStore:
    """A store in an empty folder."""
    return ObjectStore(tmp_path.as_uri(), namespace=TENANT)


def test_large_kv_is_uploaded_in_parts_and_read_in_ranges(bucket: str, options: dict[str, str], server: Server) -> None:
    context = make_context(tokens=2500, head_dim=512)
    assert context.kv is not None
    assert context.kv.nbytes > 2 * 2**23
    store = ObjectStore(bucket, options=options, namespace=TENANT)

    assert_same_kv(store.get(store.put(context)), context)

    requests = server.log.read_text()
    assert "partNumber=3" in requests
    assert requests.count(" 206 ") >= 3


def test_a_bucket_that_is_not_there_is_a_clear_error(options: dict[str, str]) -> None:
    store = ObjectStore("s3://no-such-bucket", options=options, namespace=TENANT)

    with pytest.raises(StoreUnavailableError, match=r"s3://no-such-bucket cannot be used"):
        store.put(make_context())


def test_a_server_that_answers_nothing_costs_one_timeout(tmp_path: Path, options: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        elsewhere = options | {"endpoint": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        store = ObjectStore("s3://contexts", options=elsewhere, namespace=TENANT, timeout=0.5)
        tiers = TieredStore(MemoryStore(namespace=TENANT), store)

        asked = time.monotonic()
        handle = tiers.put(make_context())
        for _ in range(10):
            assert_same_kv(tiers.get(handle), make_context())

        assert time.monotonic() - asked < 3


@pytest.mark.parametrize("url", ["contexts", "http://example.com/contexts", "s3://"])
def test_what_is_no_storage_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="s3://bucket/prefix"):
        ObjectStore(url, namespace=TENANT)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="colour"):
        ObjectStore("s3://contexts", options={"colour": "red"}, namespace=TENANT)


def test_a_folder_keeps_contexts_too(tmp_path: Path, folder: ObjectStore) -> None:
    parent = make_context()
    handles = [folder.put(parent), folder.put(make_context(parent=parent, seed=1)), folder.put(make_context(seed=2))]
    again = ObjectStore(tmp_path.as_uri(), namespace=TENANT)

    assert_same_kv(again.get(handles[0]), make_context())
    assert again.delete(handles[0])
    assert again.discard(handles[2:]).contexts == 1
    assert [handle.id for handle in folder.list()] == [handles[1].id]
    assert_same_kv(folder.get(handles[1]), make_context(parent=make_context(), seed=1))


def test_who_removes_waits_for_who_writes_and_they_for_it(folder: ObjectStore) -> None:
    order: list[str] = []

    def remove() -> None:
        with folder.blobs.removing():
            order.append("removes")
            time.sleep(0.3)
            order.append("removed")

    def write() -> None:
        with folder.blobs.writing():
            order.append("writes")

    with ThreadPoolExecutor(2) as pool:
        with folder.blobs.writing(), folder.blobs.writing():
            removing = pool.submit(remove)
            time.sleep(0.3)
            order.append("wrote")
        while "removes" not in order:
            time.sleep(0.01)
        pool.submit(write).result()
        removing.result()

    assert order == ["wrote", "removes", "removed", "writes"]


@pytest.mark.parametrize("lock", ["writing/1", "removing"])
def test_a_killed_process_s_lock_is_taken_over(
    tmp_path: Path, folder: ObjectStore, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    monkeypatch.setattr("avp_agents.store.objects.LEASE_SECONDS", 0.5)
    handle = folder.put(make_context())
    (root,) = tmp_path.iterdir()
    (root / "locks" / lock).parent.mkdir(parents=True, exist_ok=True)
    (root / "locks" / lock).write_bytes(b"of a dead one")

    assert folder.delete(handle)
    assert not list((root / "locks").rglob("*1"))


def test_payloads_that_nothing_refers_to_go_once_nothing_can(tmp_path: Path, folder: ObjectStore) -> None:
    folder.put(make_context())
    payloads = next(tmp_path.rglob("payload"))
    young, old = payloads / f"{'0' * 32}-1", payloads / f"{'0' * 32}-2"
    for path in (young, old):
        path.write_bytes(b"left by a killed writer, or just being written")
    os.utime(old, (0, 0))

    assert isinstance(folder.blobs, ObjectBlobs)
    folder.blobs.remove_abandoned({path.name for path in payloads.iterdir()} - {young.name, old.name})

    assert young.exists()
    assert not old.exists()
