"""From a server's engine to one in this process, in every mode, and as the handshake chooses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import open_engine
from tiny_models import TinyModels

from avp_agents import LatentEngine
from avp_agents.errors import ContextLostError, HandshakeError
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


@pytest.fixture(scope="module")
def other_model(models: TinyModels) -> Iterator[LatentEngine]:
    """Another model with the same vocabulary."""
    with open_engine(models.path("qwen2")) as other:
        yield other


def test_modes_of_the_same_model(remote: RemoteEngine, solver: LatentEngine) -> None:
    """The answers of `kv` and `replay` are those on the server; `replay` moves little, `text` words only."""
    thought = remote.think(PROMPT, steps=4)
    expected = remote.generate("and so", context=thought, max_tokens=6)
    bytes_moved = {}
    for mode in ("kv", "replay"):
        crossed = hand_over(thought, remote, solver, mode=mode)
        answer = solver.generate("and so", context=crossed, max_tokens=6)
        assert answer.token_ids == expected.token_ids
        assert crossed.handoff is not None
        assert (crossed.handoff.mode, crossed.handoff.reason) == (mode, "asked for")
        bytes_moved[mode] = crossed.handoff.bytes
    assert bytes_moved["replay"] < bytes_moved["kv"] / 4
    told = hand_over(thought, remote, solver, mode="text", text_tokens=5)
    assert told.latent_steps == 0
    assert solver.generate("and so", context=told, max_tokens=2).context.extends(told)


def test_another_model_gets_a_projection(remote: RemoteEngine, other_model: LatentEngine) -> None:
    """What the source was about to say, and the text that it read; neither its weights nor its tokenizer."""
    thought = remote.think(PROMPT, steps=4)
    crossed = hand_over(thought, remote, other_model, mode="projection")
    assert crossed.handoff is not None
    assert (crossed.handoff.mode, crossed.fingerprint) == ("projection", other_model.fingerprint)
    assert crossed.latent_steps == 1
    assert other_model.generate("and so", context=crossed, max_tokens=2).handoff.mode in ("kv", "replay")
    with pytest.raises(HandshakeError, match="not kv"):
        hand_over(thought, remote, other_model, mode="kv")
    chosen = hand_over(thought, remote, other_model)
    assert chosen.handoff is not None
    assert chosen.handoff.mode in ("projection", "reread")


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
