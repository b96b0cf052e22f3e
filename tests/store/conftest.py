"""What the tests of shared stores share: a real Redis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from servers import Server, redis_server


@pytest.fixture(scope="module")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Redis server for a module's tests; those that stop or freeze one start their own."""
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_url(redis_process: Server) -> str:
    """An empty database."""
    url = f"redis://127.0.0.1:{redis_process.port}/0"
    redis.Redis.from_url(url).flushdb()
    return url
