"""Which store a URL names."""

from __future__ import annotations

from pathlib import Path

import pytest

from avp_agents.errors import ConfigurationError
from avp_agents.store import ObjectStore, RedisStore, open_store
from avp_agents.testing import make_context
from avp_agents.testing.contexts import assert_same_kv
from avp_agents.testing.store_suite import TENANT


def test_a_folder_is_shared_with_keys_and_values_where_that_is_wanted(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    handle = open_store(url, TENANT, share_kv=True).put(make_context())

    other = open_store(url, TENANT)

    assert isinstance(other.lower, ObjectStore)
    assert_same_kv(other.get(handle), make_context())


def test_a_redis_is_not_asked_before_it_is_needed() -> None:
    assert isinstance(open_store("redis://127.0.0.1:1/0", TENANT).lower, RedisStore)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/folder", r"begins with one of redis://"),
        ("/a/folder", r"begins with one of redis://"),
        ("mooncake+redis://10.0.0.5:6379/0", r"master=host:port"),
        ("mooncake+redis://10.0.0.5?master=10.0.0.5:50051&memory_bytes=1GB", r"a number of bytes, not '1GB'"),
        ("mooncake+ftp://host?master=10.0.0.5:50051", r"begins with one of redis://"),
    ],
)
def test_what_a_url_lacks_is_said(url: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        open_store(url, TENANT)


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(ConfigurationError) as raised:
        open_store("mooncake+redis://:hunter2@10.0.0.5/0", TENANT)

    assert "hunter2" not in str(raised.value)
