"""What the link to a server carries decides between moving a KV-cache and rebuilding it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import open_engine
from tiny_models import TinyModels

from avp_agents import LatentEngine
from avp_agents.errors import ContextLostError
from avp_agents.transport import RemoteEngine
from avp_agents.transport.client import hand_over

PROMPT = "the quick brown fox jumps over the lazy dog and then it rests under the old tree"


class SlowStream(httpx.SyncByteStream):
    """A body that comes at a limited rate."""

    def __init__(self, stream: Any, bytes_per_second: float) -> None:
        self._stream, self._rate = stream, bytes_per_second

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            time.sleep(len(chunk) / self._rate)
            yield chunk

    def close(self) -> None:
        self._stream.close()


class SlowTransport(httpx.BaseTransport):
    """A link of a limited rate."""

    def __init__(self, bytes_per_second: float) -> None:
        self._transport, self._rate = httpx.HTTPTransport(http1=False, http2=True), bytes_per_second

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self._transport.handle_request(request)
        response.stream = SlowStream(response.stream, self._rate)
        return response

    def close(self) -> None:
        self._transport.close()


@pytest.fixture(scope="module")
def solver(models: TinyModels) -> Iterator[LatentEngine]:
    """The same model as the server's, as in another process."""
    with open_engine(models.path("llama")) as solver:
        yield solver


def test_a_slow_link_is_replayed_over(url: str, remote: RemoteEngine, solver: LatentEngine) -> None:
    """The same context over the same server: what the link carries decides."""
    handle = remote.store.put(remote.think(PROMPT, steps=4), scope="s")
    remote.generate("warm", context=remote.resolve(handle, scope="s"), max_tokens=1)
    with RemoteEngine(url, token="token-of-one", transport=SlowTransport(50_000)) as slow:
        crossed = hand_over(handle, slow, solver, scope="s")
    assert crossed.handoff is not None
    assert (crossed.handoff.mode, crossed.kv) == ("replay", None)
    assert "quicker" in crossed.handoff.reason
    with pytest.raises(ContextLostError):
        hand_over(handle, remote, solver, scope="another")


def test_link_speed_is_measured_once(remote: RemoteEngine) -> None:
    """By a probe, unless transfers have told already."""
    link = remote.link()
    assert link.bytes_per_second > 1e5
    received = remote.connection.bytes_received
    assert remote.link() == link
    assert remote.connection.bytes_received == received
