"""RemoteEngine does over HTTP what the engine does in this process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from contextlib import aclosing
from dataclasses import replace

import pytest
from langchain_core.messages import HumanMessage
from serving import free_port

from avp_agents import Engine, LatentEngine, LatentSegment, MemoryStore, Namespace
from avp_agents.answer.options import GenerateOptions
from avp_agents.errors import (
    AuthenticationError,
    ConfigurationError,
    ContextLostError,
    ContextWindowError,
    FingerprintMismatchError,
    InvalidHandleError,
    NotStoredError,
    PromptError,
    RequestTimeoutError,
    TransportError,
)
from avp_agents.transport import RemoteEngine
from avp_langgraph import AvpChatModel

LONG: GenerateOptions = {"max_tokens": 900, "min_tokens": 900}


@pytest.fixture
def local(engine: LatentEngine) -> LatentEngine:
    """The same model in this process, with nothing cached."""
    return engine.for_store(MemoryStore(namespace=Namespace("local", b"l" * 32)))


def idle(engine: LatentEngine) -> bool:
    """Whether the engine comes to rest within five seconds."""
    latest = time.monotonic() + 5
    while engine.stats().running and time.monotonic() < latest:
        time.sleep(0.02)
    return not engine.stats().running


def test_it_is_an_engine(remote: RemoteEngine, local: LatentEngine) -> None:
    """It says of itself what the engine says, and counts and encodes as the engine does."""
    assert isinstance(remote, Engine)
    assert (remote.fingerprint, remote.dtype) == (local.fingerprint, local.dtype)
    assert (remote.context_window, remote.model_path) == (local.context_window, "tiny")
    assert remote.tool_format == local.tool_format
    assert remote.count_tokens("the quick brown fox") == local.count_tokens("the quick brown fox")
    assert remote.encode("the quick <|im_end|>") == local.encode("the quick <|im_end|>")


def test_thoughts_and_answers_are_the_engines(remote: RemoteEngine, local: LatentEngine) -> None:
    """Same recipe, same greedy tokens; the answer is made on the thought's KV-cache, which never left the server."""
    thought, own = remote.think("what is the sum", steps=4), local.think("what is the sum", steps=4)
    assert thought.recipe_id == own.recipe_id
    assert (len(thought), thought.latent_steps) == (len(own), 4)

    answer, expected = (
        e.generate("solve this", context=c, max_tokens=8, logprobs=2) for e, c in ((remote, thought), (local, own))
    )
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    assert (answer.handoff.mode, answer.handoff.positions_reused) == ("kv", len(thought))
    assert answer.context.extends(thought)
    assert answer.logprobs is not None
    assert [token.token_id for token in answer.logprobs] == list(answer.token_ids)


def test_values_stay_on_the_server_until_somebody_looks(remote: RemoteEngine, local: LatentEngine) -> None:
    """A context knows its bytes without them; looking fetches them once."""
    thought = remote.think("the lazy dog", steps=3)
    received = remote.connection.bytes_received
    latents = thought.lineage[-1]
    assert isinstance(latents, LatentSegment)
    assert (len(latents), thought.nbytes) == (3, local.think("the lazy dog", steps=3).nbytes)
    assert remote.connection.bytes_received == received

    assert latents.embeddings.shape == (3, 32)
    assert thought.readout is not None
    assert thought.readout.token_ids.shape == thought.readout.probabilities.shape
    assert remote.connection.bytes_received > received
    again = remote.connection.bytes_received
    assert thought.readout.hidden.isfinite().all()
    assert remote.connection.bytes_received == again


def test_a_stream_comes_in_pieces(remote: RemoteEngine) -> None:
    """The pieces are the answer; the last one carries all of it."""
    *pieces, last = remote.stream("step by step", max_tokens=6, stop=["zz"])
    assert last.generation is not None
    assert "".join(piece.text for piece in (*pieces, last)) == last.generation.text
    assert len(pieces) >= 2


async def test_asynchronous_twins(remote: RemoteEngine) -> None:
    """Many at once, on an event loop; messages may stand for contexts."""
    thoughts = await asyncio.gather(*(remote.athink(f"token {i}", steps=2) for i in range(6)))
    assert len({thought.recipe_id for thought in thoughts}) == 6
    prompt = [{"role": "user", "content": "token 0"}, {"role": "assistant", "context": thoughts[0]}]
    answer = await remote.agenerate(prompt, max_tokens=3)
    assert answer.context.extends(thoughts[0])
    joined = await remote.ajoin(thoughts[:2], strategy="replay")
    assert joined.latent_steps == 4
    assert (await remote.areplay(joined)).recipe_id == joined.recipe_id
    await remote.aclose()


def test_contexts_are_kept_under_handles(remote: RemoteEngine, url: str) -> None:
    """Results are not stored until somebody puts them; a handle is honoured in its scope, by every client."""
    thought = remote.think("under the old tree", steps=2)
    with pytest.raises(NotStoredError):
        thought.to_handle()
    handle = remote.store.put(thought, scope="thread:1", agent="researcher", text="a thought")
    assert (handle.agent, thought.to_handle()) == ("researcher", handle)

    with RemoteEngine(url, token="token-of-one") as other:
        found = other.resolve(handle.to_state(), scope="thread:1")
        assert found.recipe_id == thought.recipe_id
        assert other.store.id_of(found, scope="thread:1") == handle.id
        with pytest.raises(ContextLostError):
            other.resolve(handle, scope="thread:2")
        assert other.generate("and then", context=found, max_tokens=2).context.extends(thought)


def test_the_servers_store(remote: RemoteEngine) -> None:
    """All that a store does."""
    store = remote.store
    handle = store.put(remote.think("please solve", steps=2), scope="s")
    assert store.contains(handle)
    assert store.touch(handle)
    assert handle.id in {stored.id for stored in store.list(scope="s")}
    store.pin(handle)
    assert store.stats().pinned == 1
    assert store.discard([handle]).contexts == 0
    store.unpin(handle)
    assert store.drop_kv(handle) >= 0
    assert store.prune().contexts == 0
    assert store.discard([handle], dry_run=True).contexts == 1
    assert store.delete(handle)
    assert not store.delete(handle)
    with pytest.raises(ContextLostError):
        store.get(handle, scope="s")


def test_contexts_made_elsewhere_are_sent(remote: RemoteEngine, local: LatentEngine) -> None:
    """A context of the same model is sent when it is used; with its KV-cache, where asked for. Others are refused."""
    made_here = local.think("question and answer", steps=3)
    answer = remote.generate("go on", context=made_here, max_tokens=3)
    assert answer.handoff.mode == "replay"
    assert answer.token_ids == local.generate("go on", context=made_here, max_tokens=3).token_ids
    with_kv = remote.send(local.think("with its cache", steps=2), kv=True)
    assert remote.generate("go on", context=with_kv, max_tokens=3).handoff.mode == "kv"
    with pytest.raises(FingerprintMismatchError):
        remote.generate("go on", context=replace(made_here, fingerprint="0" * 64))


def test_errors_are_the_engines(remote: RemoteEngine) -> None:
    """Each arrives as its own class, with what it knows."""
    with pytest.raises(ConfigurationError, match="temperature"):
        remote.generate("x", temperature=-1)
    with pytest.raises(ConfigurationError, match="Unknown option"):
        remote.generate("x", top_q=1)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ContextWindowError) as caught:
        remote.generate("x " * 2000)
    assert caught.value.window == remote.context_window
    with pytest.raises(PromptError):
        remote.think([{"role": "oracle", "content": "x"}])
    with pytest.raises(InvalidHandleError):
        remote.resolve("avp:1:nothing")
    with pytest.raises(RequestTimeoutError):
        remote.generate("x", timeout=0.05, max_tokens=900, min_tokens=900)


def test_leaving_a_stream_frees_the_sequence(remote: RemoteEngine, engine: LatentEngine) -> None:
    """Over HTTP/2 a client cannot hang up on one answer alone; it cancels the request by name."""
    stream = remote.stream("on and on", **LONG)
    next(stream)
    assert engine.stats().running == 1
    stream.close()
    assert idle(engine)
    assert remote.generate("and now", max_tokens=2).text is not None


async def test_cancelling_a_task_frees_the_sequence(remote: RemoteEngine, engine: LatentEngine) -> None:
    """As for an engine in this process."""
    for work in (lambda: remote.agenerate("on and on", **LONG), lambda: remote.athink("on and on", steps=900)):
        task = asyncio.create_task(work())
        for _ in range(100):
            await asyncio.sleep(0.02)
            if engine.stats().running:
                break
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(idle, engine)
    async with aclosing(remote.astream("on and on", **LONG)) as chunks:
        await anext(chunks)
    assert await asyncio.to_thread(idle, engine)
    await remote.aclose()


def test_graph_workers_share_it(remote: RemoteEngine) -> None:
    """A chat model on a remote engine thinks and answers as on one in this process."""
    researcher = AvpChatModel(engine=remote, mode="latent", latent_steps=3)
    solver = AvpChatModel(engine=remote, max_tokens=4)
    question = HumanMessage("what is the sum of twenty four and seventeen?")
    thought = researcher.invoke([question])
    answer = solver.invoke([question, thought])
    assert answer.response_metadata["avp"]["mode"] == "kv"
    assert answer.response_metadata["avp"]["positions_reused"] > 3
    assert solver.invoke([question, thought, answer, HumanMessage("and?")]).response_metadata["avp"]["mode"] == "kv"


def test_a_server_that_cannot_be_used(url: str) -> None:
    """Nobody there, no token, a wrong one, no URL."""
    with pytest.raises(TransportError, match="Cannot connect"):
        RemoteEngine(f"http://127.0.0.1:{free_port()}").think("x")
    for token in (None, "token-of-nobody"):
        with RemoteEngine(url, token=token) as remote, pytest.raises(AuthenticationError):
            remote.think("x")
    with pytest.raises(TransportError, match="token="):
        RemoteEngine("http://user:secret@host")


def test_a_client_needs_no_torch() -> None:
    """Not before somebody looks at latent values."""
    code = "import sys, avp_agents.transport.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
