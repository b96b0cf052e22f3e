"""Contexts up and down as frames: whole, in pieces, broken off and gone on with, and tampered with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from serving import serving, token

from avp_agents import Context, LatentEngine, LatentSegment, TokenSegment
from avp_agents.errors import AvpError, FrameIntegrityError, IntegrityError, LimitExceededError, TransportError
from avp_agents.kv_cache import HostKv
from avp_agents.protocol.frame_values import encode_context
from avp_agents.transport import RemoteEngine
from avp_agents.transport.client import frames
from avp_agents.transport.server import ServerLimits
from avp_agents.transport.wire import frame_key

API = "/avp/v1"
KEY = frame_key("token-of-one")


class BreakingStream(httpx.SyncByteStream):
    """A body that breaks off."""

    def __init__(self, stream: Any, after: int) -> None:
        self._stream, self._left = stream, after

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            yield chunk[: self._left]
            self._left -= len(chunk)
            if self._left <= 0:
                raise httpx.ReadError("broken off")

    def close(self) -> None:
        self._stream.close()


class BreakingTransport(httpx.BaseTransport):
    """Breaks every frame that is downloaded, and every other piece that is uploaded, off after so many bytes."""

    def __init__(self, after: int, times: int) -> None:
        self._transport, self.after, self.left = httpx.HTTPTransport(), after, times

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if self.left and request.method == "PATCH":
            self.left -= 1
            request.stream = BreakingStream(request.stream, self.after)
        response = self._transport.handle_request(request)
        if self.left and request.url.path.endswith("/frame"):
            self.left -= 1
            response.stream = BreakingStream(response.stream, self.after)
        return response

    def close(self) -> None:
        self._transport.close()


@pytest.fixture
def thought(engine: LatentEngine) -> Context:
    """A context of this process."""
    return engine.think("the quick brown fox jumps over the lazy dog", steps=4)


def upload(url: str, data: bytes, *, size: int | None = None) -> httpx.Response:
    """Upload some bytes at once, as somebody who does not use our client."""
    with httpx.Client(base_url=url, headers=token("one"), trust_env=False) as client:
        begun = client.post(f"{API}/uploads", json={"bytes": size or len(data)}).json()
        ended = client.patch(f"{API}/uploads/{begun['upload']}", content=data, headers={"upload-offset": "0"})
        if not ended.is_success:
            client.delete(f"{API}/uploads/{begun['upload']}")
        return ended


def same_values(one: Context, other: Context) -> bool:
    """Whether latents and readout agree, bit for bit."""
    latents = [[s.embeddings for s in c.lineage if isinstance(s, LatentSegment)] for c in (one, other)]
    assert one.readout is not None
    assert other.readout is not None
    pairs = [*zip(*latents, strict=True), (one.readout.hidden, other.readout.hidden)]
    return one.recipe_id == other.recipe_id and all(torch.equal(a, b) for a, b in pairs)


def test_a_context_up_and_down_again(remote: RemoteEngine, thought: Context, engine: LatentEngine) -> None:
    """Values and KV-cache come back bit for bit, and the engine generates on them as on its own."""
    there = remote.send(thought, kv=True)
    without, back = remote.fetch(there), remote.fetch(there, kv=True)
    assert same_values(back, thought)
    assert same_values(without, thought)
    assert without.kv is None
    assert thought.kv is not None
    assert back.kv is not None
    for found, expected in zip(back.kv.to_host().layers, thought.kv.to_host().layers, strict=True):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    answer = engine.generate("and so", context=engine.accept(back), max_tokens=4)
    assert answer.handoff.mode == "kv"


def test_a_lineage_is_small(remote: RemoteEngine, thought: Context) -> None:
    """What travels for a replay is a small part of what travels for the KV-cache, headers and all."""
    there = remote.send(thought, kv=True)
    before = remote.connection.bytes_received
    remote.fetch(there)
    lineage = remote.connection.bytes_received - before
    remote.fetch(there, kv=True)
    assert lineage < 0.3 * (remote.connection.bytes_received - before - lineage)


def test_ranges(url: str, remote: RemoteEngine, thought: Context) -> None:
    """A download goes on from an offset as long as it is the same frame."""
    path = f"{url}{API}/contexts/{remote.send(thought).reference}/frame?kv=1"
    whole = httpx.get(path, headers=token("one"), trust_env=False)
    resume = {"range": "bytes=1000-", "if-range": whole.headers["etag"]}
    rest = httpx.get(path, headers=token("one") | resume, trust_env=False)
    assert (rest.status_code, rest.content) == (206, whole.content[1000:])
    size = len(whole.content)
    assert rest.headers["content-range"] == f"bytes 1000-{size - 1}/{size}"

    other = httpx.get(path, headers=token("one") | resume | {"if-range": '"another"'}, trust_env=False)
    assert (other.status_code, len(other.content)) == (200, size)
    beyond = httpx.get(path, headers=token("one") | {"range": f"bytes={size}-"}, trust_env=False)
    assert beyond.status_code == 416


def test_transfers_that_break_off_go_on(
    url: str, remote: RemoteEngine, thought: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What arrived is not sent again; a server that keeps breaking off is given up on."""
    monkeypatch.setattr(frames, "PIECE_BYTES", 5000)
    breaking = BreakingTransport(after=3000, times=2)
    with RemoteEngine(url, token="token-of-one", transport=breaking) as shaky:
        assert shaky.info
        there = shaky.send(thought, kv=True)
        assert breaking.left == 0
        breaking.left = 3
        fetched = shaky.fetch(there, kv=True)
        assert breaking.left == 0
        assert same_values(fetched, thought)
        breaking.left, breaking.after = 100, 10
        with pytest.raises(TransportError, match="broke off"):
            shaky.fetch(there, kv=True)
    assert remote.resolve(there.reference).recipe_id == thought.recipe_id


def test_pieces_must_follow_one_another(url: str, thought: Context) -> None:
    """A piece from a wrong offset is refused with the right one; a piece beyond the end is refused."""
    data = encode_context(thought, key=KEY, with_kv=False).assemble()
    with httpx.Client(base_url=url, headers=token("one"), trust_env=False) as client:
        path = f"{API}/uploads/{client.post(f'{API}/uploads', json={'bytes': len(data)}).json()['upload']}"
        assert client.patch(path, content=bytes(data[:100]), headers={"upload-offset": "0"}).json()["offset"] == 100
        wrong = client.patch(path, content=b"x", headers={"upload-offset": "7"})
        assert (wrong.status_code, wrong.headers["upload-offset"]) == (409, "100")
        assert client.patch(path, content=bytes(data), headers={"upload-offset": "100"}).status_code == 413
        assert client.get(path).json() == {"offset": 100}
        done = client.patch(path, content=bytes(data[100:]), headers={"upload-offset": "100"}).json()
        assert done["context"]["handle"]["id"].startswith("avp:1:")
        assert client.get(path).status_code == 404


def test_frames_that_are_not_ours(url: str, thought: Context) -> None:
    """Altered, made with another token, cut short, or no frames at all."""
    data = bytearray(encode_context(thought, key=KEY).assemble())
    data[len(data) // 2] ^= 1
    altered = upload(url, bytes(data))
    assert (altered.status_code, altered.json()["error"]["code"]) == (422, "FrameIntegrityError")
    foreign = upload(url, bytes(encode_context(thought, key=frame_key("token-of-two")).assemble()))
    assert foreign.status_code == 422
    for noise in (b"x" * 17, b"\0" * 5000, bytes(data[:100])):
        refused = upload(url, noise)
        assert refused.status_code in (400, 413, 422)
        assert refused.json()["error"]["code"] != "EngineError"


def test_values_that_the_model_cannot_have_made(remote: RemoteEngine, thought: Context) -> None:
    """They would fail the forward pass of everybody in the batch, so they never reach it."""
    tokens, latents = thought.lineage[0], thought.lineage[-1]
    assert isinstance(latents, LatentSegment)
    kv = HostKv(((torch.zeros(2, len(thought), 8), torch.zeros(2, len(thought), 8)),))
    wide = replace(latents, embeddings=torch.zeros(4, 64))
    for context in (
        replace(thought, lineage=(TokenSegment((5, 100_000)),), readout=None),
        replace(thought, lineage=(tokens, wide), readout=None),
        replace(thought, lineage=(), readout=None),
    ):
        with pytest.raises(AvpError) as caught:
            remote.send(context)
        assert not isinstance(caught.value, FrameIntegrityError)
    with pytest.raises(IntegrityError, match="layers"):
        remote.send(thought.with_kv(kv), kv=True)


def test_a_context_larger_than_the_server_takes(engine: LatentEngine, thought: Context) -> None:
    """Is refused before anything is sent."""
    with (
        serving(engine, limits=ServerLimits(upload_bytes=1000)) as url,
        RemoteEngine(url, token="token-of-one") as remote,
        pytest.raises(LimitExceededError),
    ):
        remote.send(thought)
