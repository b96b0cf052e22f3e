"""Contexts and latent thinking over MCP: tools, resources, the client, and who may use them."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from serving import serving, token

pytest.importorskip("mcp_types", reason='version 2 of mcp is not installed: pip install "avp-agents[mcp]"')

import httpx2
import mcp_types as types
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from mcp.server.mcpserver import MCPServer

from avp_agents import LatentEngine
from avp_agents.crossing.thought import Thought
from avp_agents.errors import (
    AuthenticationError,
    ConfigurationError,
    ContextLostError,
    ContextWindowError,
    HandshakeError,
    InvalidHandleError,
    LimitExceededError,
    TransportError,
)
from avp_agents.protocol.handshake import CrossingMode
from avp_agents.transport import RemoteEngine
from avp_agents.transport.mcp import EXTENSION, McpContexts, mount

FACT = "the lazy dog rests under the old tree"
LOST = "avp:1:" + 32 * "0"


@pytest.fixture(scope="module")
def base(engine: LatentEngine) -> Iterator[str]:
    """A server with an MCP endpoint."""
    with serving(engine, extend=mount) as url:
        yield url


def contexts(base: str, namespace: str = "one") -> McpContexts:
    return McpContexts(f"{base}/mcp", token=f"token-of-{namespace}", seconds=60)


@asynccontextmanager
async def plain_client(base: str, **options: Any) -> AsyncIterator[Any]:
    """Any MCP client: it knows nothing of contexts."""
    async with (
        httpx2.AsyncClient(headers=token("one"), trust_env=False) as http,
        Client(streamable_http_client(f"{base}/mcp", http_client=http), cache=None, **options) as client,
    ):
        yield client


async def test_think_there_and_answer_there(base: str, engine: LatentEngine) -> None:
    """The handle goes from one tool to the next; the answer is the engine's own."""
    async with contexts(base) as there:
        assert there.speaks_extension
        handle = await there.think(FACT, steps=3)
        answer = await there.generate("where?", context=handle, max_tokens=5)
        onward = await there.generate(context=answer.handle, max_tokens=2)
    thought = engine.think(FACT, steps=3)
    expected = engine.generate("where?", context=thought, max_tokens=5)
    assert (answer.text, answer.finish_reason) == (expected.text, "length")
    assert (answer.handoff.mode, answer.handoff.positions_reused) == ("kv", len(thought))
    assert onward.handoff.mode == "kv"


@pytest.mark.parametrize("mode", ["kv", "replay", "text", None])
async def test_the_same_model_goes_on_here(base: str, same: LatentEngine, mode: CrossingMode | None) -> None:
    """By its KV-cache, its lineage or its words; or as the handshake chooses, which says what it weighed."""
    async with contexts(base) as there:
        handle = await there.think(FACT, steps=3)
        crossed = await there.hand_over(handle, same, mode=mode, text_tokens=4)
        told = await there.describe(handle)
    assert crossed.handoff is not None
    if mode == "text":
        assert (crossed.handoff.mode, crossed.latent_steps) == ("text", 0)
        return
    assert len(crossed) == told["positions"]
    assert crossed.latent_steps == told["latent_steps"] == 3
    assert (crossed.kv is not None) is (crossed.handoff.mode == "kv")
    if mode is None:
        assert crossed.handoff.mode in ("kv", "replay")
        assert set(crossed.handoff.estimated_ms) == {"kv", "replay"}
    assert same.generate("where?", context=crossed, max_tokens=3).handoff.mode in ("kv", "replay")


@pytest.mark.parametrize(("mode", "done"), [(None, "reread"), ("projection", "projection")])
async def test_another_model_reads_what_was_read(
    base: str, other: LatentEngine, mode: CrossingMode | None, done: str
) -> None:
    """Its text alone; with its vector where that was asked for."""
    async with contexts(base) as there:
        crossed = await there.hand_over(await there.think(FACT, steps=3), other, mode=mode)
        with pytest.raises(HandshakeError, match="can use"):
            await there.hand_over(await there.think(FACT, steps=3), other, mode="kv")
    assert crossed.handoff is not None
    assert crossed.handoff.mode == done
    assert FACT in other._runtime.tokenizer.decode(list(crossed.token_ids()))


async def test_a_context_is_offered_to_a_graph(base: str, same: LatentEngine) -> None:
    """What came over is a context of the graph's engine like any other: a chat model answers on its handle."""
    langgraph = pytest.importorskip("avp_langgraph", reason='not installed: pip install "avp-agents[langgraph]"')
    async with contexts(base) as there:
        crossed = await there.hand_over(await there.think(FACT, steps=3), same, mode="replay")
    handle = same.store.put(crossed, agent="researcher")
    answer = await langgraph.AvpChatModel(engine=same, max_tokens=3).ainvoke("where?", avp_context=handle)
    made = answer.response_metadata["avp"]
    assert (made["mode"], made["positions_replayed"]) == ("replay", len(crossed))


async def test_a_server_without_the_extension_is_read_as_text(same: LatentEngine) -> None:
    """Any text resource of any MCP server; nothing else than text can be asked for."""
    other_server = MCPServer("notes")

    @other_server.resource("notes://dog")
    def dog() -> str:
        return FACT

    there = McpContexts("http://127.0.0.1:9/mcp")
    async with Client(other_server) as client:
        there._entered = client
        assert not there.speaks_extension
        crossed = await there.hand_over("notes://dog", same)
        assert crossed.handoff is not None
        assert (crossed.handoff.mode, crossed.handoff.reason) == ("text", "the other side offers text only")
        assert FACT in same._runtime.tokenizer.decode(list(crossed.token_ids()))
        with pytest.raises(HandshakeError, match="text only"):
            await there.hand_over("notes://dog", same, mode="kv")
        with pytest.raises(TransportError):
            await there.hand_over("notes://cat", same)
        with pytest.raises(TransportError, match="tool failed"):
            await there.think("x")


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_what_a_client_sees_that_knows_nothing_of_contexts(base: str, mode: str) -> None:
    """Ordinary tools with schemas, a link to a resource, and text in it; also in the older protocol."""
    async with plain_client(base, mode=mode) as client:
        tools = (await client.list_tools()).tools
        assert [tool.name for tool in tools] == ["think", "generate", "describe", "delete"]
        assert all(tool.input_schema["additionalProperties"] is False and tool.output_schema for tool in tools)
        thought = await client.call_tool("think", {"prompt": FACT, "steps": 2})
        text, link = thought.content
        assert isinstance(link, types.ResourceLink)
        assert link.uri in text.text
        read = (await client.read_resource(link.uri)).contents[0]
        assert (read.mime_type, read.text) == ("text/plain", f"user: {FACT}")
        answer = await client.call_tool("generate", {"context": link.uri, "max_tokens": 3})
        assert answer.content[0].text == answer.structured_content["text"]


async def test_a_system_prompt_is_never_told(base: str) -> None:
    """Not as text and not in a thought."""
    with RemoteEngine(base, token="token-of-one") as remote:
        told = [{"role": "system", "content": "secret"}, {"role": "user", "content": FACT}]
        handle = remote.store.put(remote.think(told, steps=2))
    async with plain_client(base) as client:
        read = (await client.read_resource(handle.id)).contents[0]
        assert read.text == f"user: {FACT}"
        blob = (await client.read_resource(f"{handle.id}/thought")).contents[0]
    thought = Thought.decode(base64.b64decode(blob.blob))
    assert [message.content for message in thought.messages] == [FACT]


async def test_contexts_are_listed_newest_first(base: str) -> None:
    """A page at a time; a cursor that was made up is refused."""
    async with plain_client(base) as client:
        newest = (await client.call_tool("think", {"prompt": "a listed thought", "steps": 1})).structured_content
        listed = await client.list_resources()
        assert listed.resources[0].uri == newest["handle"]["id"]
        assert listed.resources[0].description == "a listed thought"
        with pytest.raises(MCPError, match="cursor"):
            await client.list_resources(cursor="-1")
        templates = (await client.list_resource_templates()).resource_templates
        assert templates[0].uri_template == "avp:1:{context}"


async def test_a_deleted_context_is_gone(base: str) -> None:
    """Deleting twice says so."""
    async with contexts(base) as there:
        handle = await there.think("to be deleted", steps=1)
        assert await there.delete(handle) is True
        assert await there.delete(handle) is False
        with pytest.raises(ContextLostError):
            await there.describe(handle)


async def test_namespaces_share_nothing(base: str, same: LatentEngine) -> None:
    """Neither tools nor resources of one namespace reach another's contexts; nor are they listed."""
    async with contexts(base) as one, contexts(base, "two") as two:
        handle = await one.think(FACT, steps=2)
        for attempt in (two.describe(handle), two.generate(context=handle), two.hand_over(handle, same)):
            with pytest.raises(ContextLostError):
                await attempt
        assert await two.delete(handle) is False
        assert (await one.describe(handle))["latent_steps"] == 2
        listed = await two._client.list_resources()
    assert handle.id not in [resource.uri for resource in listed.resources]


async def test_what_a_graph_keeps_for_a_thread_is_not_offered(base: str) -> None:
    """Only handles of the scope "" are honoured."""
    with RemoteEngine(base, token="token-of-one") as remote:
        kept = remote.store.put(remote.think("kept for a thread", steps=1), scope="thread-1")
    async with contexts(base) as there:
        with pytest.raises(ContextLostError):
            await there.describe(kept)
        with pytest.raises(ContextLostError):
            await there._read(f"{kept.id}/frame")


@pytest.mark.parametrize("given", [{}, {"authorization": "Bearer wrong"}])
async def test_without_a_token_nobody_gets_in(base: str, given: dict[str, str]) -> None:
    """Refused by the same gate as everything else, before MCP sees it."""
    asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    refused = httpx.post(f"{base}/mcp", json=asked, headers=given, trust_env=False)
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    with pytest.raises((AuthenticationError, TransportError)):
        async with McpContexts(f"{base}/mcp", token=given.get("authorization", "")[7:] or None):
            pass


def test_a_web_page_of_another_site_does_not_get_in(base: str) -> None:
    """Host and Origin are checked as for the other endpoints."""
    asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    for headers in ({"host": "attacker.example"}, {"origin": "https://attacker.example"}):
        refused = httpx.post(f"{base}/mcp", json=asked, headers=token("one") | headers, trust_env=False)
        assert refused.status_code == 403


def test_a_body_over_the_limit_is_refused(base: str) -> None:
    """As everywhere."""
    refused = httpx.post(f"{base}/mcp", content=b" " * (4 * 2**20 + 1), headers=token("one"), trust_env=False)
    assert refused.status_code == 413


@pytest.mark.parametrize(
    ("tool", "arguments", "error"),
    [
        ("think", {"prompt": FACT, "steps": -1}, ConfigurationError),
        ("think", {"prompt": 3}, ConfigurationError),
        ("think", {"prompt": FACT, "stepz": 3}, ConfigurationError),
        ("think", {}, ConfigurationError),
        ("generate", {}, ConfigurationError),
        ("generate", {"prompt": FACT, "temperature": -1}, ConfigurationError),
        ("generate", {"prompt": FACT, "max_tokens": 10**6}, ContextWindowError),
        ("describe", {"context": LOST}, ContextLostError),
        ("describe", {"context": "../../etc/passwd"}, InvalidHandleError),
        ("delete", {"context": "x"}, InvalidHandleError),
        ("explode", {}, ConfigurationError),
    ],
)
async def test_what_makes_no_sense_is_refused(
    base: str, tool: str, arguments: dict[str, Any], error: type[Exception]
) -> None:
    """As the class that the engine raises; and the server goes on."""
    async with contexts(base) as there:
        with pytest.raises(error) as caught:
            await there._structured(tool, arguments)
        assert type(caught.value).__module__ == "avp_agents.errors"


@pytest.mark.parametrize("uri", [LOST, f"{LOST}/frame", "avp:2:x", "avp:1:x", "file:///etc/passwd", f"{LOST}/../x", ""])
async def test_resources_that_are_not_there(base: str, uri: str) -> None:
    """Whatever a URI spells, it names a context of the namespace or nothing."""
    async with plain_client(base) as client:
        with pytest.raises(MCPError) as caught:
            await client.read_resource(uri)
        assert caught.value.data["error"]["code"] in ("ContextLostError", "InvalidHandleError", "ConfigurationError")


async def test_a_kv_cache_too_large_for_mcp_is_replayed(
    base: str, same: LatentEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server refuses it and says where to get it; the client knows beforehand and takes the lineage."""
    from avp_agents.transport.mcp import resources

    monkeypatch.setattr(resources, "RESOURCE_BYTES", 2**12)
    async with contexts(base) as there:
        handle = await there.think(FACT, steps=2)
        with pytest.raises(LimitExceededError, match="more than the 4096 that go over MCP"):
            await there._read(f"{handle.id}/kv")
        crossed = await there.hand_over(handle, same)
    assert crossed.handoff is not None
    assert (crossed.handoff.mode, crossed.handoff.reason) == ("replay", "no KV-cache is left")


async def test_the_extension_is_announced(base: str) -> None:
    """Among the server's capabilities, with a version; the handshake's facts are a resource."""
    async with plain_client(base) as client:
        assert client.server_capabilities.extensions[EXTENSION] == {"version": 1}
        told = json.loads((await client.read_resource("avp:handshake")).contents[0].text)
    assert told["hello"]["modes"] == ["kv", "replay", "projection", "text"]
    assert len(told["hello"]["fingerprint"]) == 64


async def test_nobody_is_there() -> None:
    """Says so, as an error of ours."""
    with pytest.raises(TransportError, match="cannot be reached"):
        async with McpContexts("http://127.0.0.1:9/mcp", seconds=5):
            pass


async def test_requests_are_counted(base: str) -> None:
    """Under the endpoint's route."""
    async with contexts(base) as there:
        await there.think("counted", steps=1)
    metrics = httpx.get(f"{base}/metrics", headers=token("one"), trust_env=False).text
    assert 'route="POST /mcp"' in metrics
