"""Contexts between agents over A2A: what cards announce, what messages hand over, and what a receiver does with it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from serving import free_port, running, serving

pytest.importorskip("a2a", reason='a2a-sdk is not installed: pip install "avp-agents[a2a]"')

import httpx
from a2a.client import A2ACardResolver, ClientConfig, create_client
from a2a.client.client import Client, ClientCallContext
from a2a.client.service_parameters import ServiceParametersFactory, with_a2a_extensions
from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.events import EventQueue
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.routes import create_agent_card_routes, create_jsonrpc_routes
from a2a.server.tasks import InMemoryTaskStore
from a2a.types import AgentCapabilities, AgentCard, AgentInterface, AgentSkill, Message, Part, Role, SendMessageRequest
from starlette.applications import Starlette

from avp_agents import Context, LatentEngine
from avp_agents.errors import AvpError, HandshakeError, LimitExceededError, TransportError
from avp_agents.protocol.handshake import CrossingMode
from avp_agents.transport import RemoteEngine
from avp_agents.transport.a2a import (
    EXTENSION_URI,
    Announcement,
    UrlPolicy,
    announce,
    announcement_of,
    introduce,
    offer,
    receive,
)
from avp_agents.transport.a2a.announcement import announcement_of_engine
from avp_agents.transport.a2a.structs import from_protobuf, to_struct, to_value
from avp_agents.transport.server import Binding, ServerLimits

FACT = "the lazy dog rests under the old tree"
WORDS = "the dog sleeps by the tree"
TOKEN = "token-of-one"


@pytest.fixture(scope="module")
def thought(engine: LatentEngine) -> Context:
    """What the sender's engine thinks."""
    return engine.think([{"role": "system", "content": "secret"}, {"role": "user", "content": FACT}], steps=3)


def card(url: str = "http://127.0.0.1:1/") -> AgentCard:
    return AgentCard(
        name="solver",
        description="Answers.",
        version="1",
        supported_interfaces=[AgentInterface(url=url, protocol_binding="JSONRPC", protocol_version="1.0")],
        capabilities=AgentCapabilities(streaming=False),
        default_input_modes=["text/plain"],
        default_output_modes=["text/plain"],
        skills=[AgentSkill(id="answer", name="answer", description="Answers.", tags=["answer"])],
    )


def message(*parts: Part) -> Message:
    """A message as it arrives: through the wire format."""
    sent = Message(role=Role.ROLE_USER, parts=[Part(text="where?"), *parts], message_id=uuid.uuid4().hex)
    return Message.FromString(sent.SerializeToString())


def reached(url: str, **changes: Any) -> UrlPolicy:
    given: dict[str, Any] = {"hosts": frozenset({urlsplit(url).netloc}), "networks": ["127.0.0.0/8"]}
    return UrlPolicy(**given | changes)


def test_a_card_announces_the_model_and_what_the_agent_takes(engine: LatentEngine) -> None:
    """Fingerprint, modes and limits; not required, so that other agents go on as before."""
    plain = card()
    assert announcement_of(plain) is None
    announce(plain, engine, url_bytes=1000)
    read = announcement_of(AgentCard.FromString(plain.SerializeToString()))
    assert read is not None
    assert read.hello.fingerprint == engine.fingerprint
    assert read.hello.modes == ("kv", "replay", "projection", "text")
    assert (read.raw_bytes, read.url_bytes) == (2 * 2**20, 1000)
    assert plain.capabilities.extensions[0].required is False
    assert read == announcement_of_engine(engine, url_bytes=1000)


@pytest.mark.parametrize("params", [{}, {"v": 2}, {"v": 1}, {"v": 1, "hello": {"v": 1}}, {"v": "1"}, {"v": 1.5}])
def test_an_announcement_that_makes_no_sense(params: dict[str, Any]) -> None:
    """Is an error of ours, and nothing else."""
    announcing = card()
    announcing.capabilities.extensions.add(uri=EXTENSION_URI, params=to_struct(params))
    with pytest.raises(AvpError):
        announcement_of(announcing)


async def test_who_announced_nothing_gets_text(engine: LatentEngine, same: LatentEngine, thought: Context) -> None:
    """One text part, and nothing that would have to be understood."""
    parts = await offer(thought, engine, to=None, text=WORDS, token=TOKEN)
    assert [part.WhichOneof("content") for part in parts] == ["text"]
    got = await receive(message(*parts), same, token=TOKEN)
    assert (got.text, got.context, got.handoff.mode) == (f"where?\n{WORDS}", None, "text")


async def test_the_same_model_replays_what_came_in_the_message(
    engine: LatentEngine, same: LatentEngine, thought: Context
) -> None:
    """The handle is in the data, the lineage is raw; the text beside it is not read. The answer is the sender's own."""
    parts = await offer(thought, engine, to=announcement_of_engine(same), text=WORDS, token=TOKEN, agent="researcher")
    assert [part.WhichOneof("content") for part in parts] == ["text", "data", "raw"]
    assert from_protobuf(parts[1].data)["handle"] == thought.to_handle().to_state()
    got = await receive(message(*parts), same, token=TOKEN)
    assert got.context is not None
    assert (got.text, got.handoff.mode, got.context.recipe_id) == ("where?", "replay", thought.recipe_id)
    assert got.handle is not None
    assert (got.handle.agent, got.handle.id) == ("researcher", thought.to_handle().id)
    expected = engine.generate(got.text, context=thought, max_tokens=5)
    assert same.generate(got.text, context=got.context, max_tokens=5).token_ids == expected.token_ids


async def test_the_kv_cache_may_come_along(engine: LatentEngine, same: LatentEngine, thought: Context) -> None:
    """Where the sender adds it: it is there already, so the handshake takes it."""
    parts = await offer(thought, engine, to=announcement_of_engine(same), text=WORDS, token=TOKEN, kv=True)
    got = await receive(message(*parts), same, token=TOKEN)
    assert got.context is not None
    assert got.handoff.mode == "kv"
    assert set(got.handoff.estimated_ms) == {"kv", "replay"}
    assert same.generate("where?", context=got.context, max_tokens=2).handoff.positions_reused == len(thought)


@pytest.mark.parametrize(("mode", "done"), [(None, "reread"), ("projection", "projection"), ("text", "text")])
async def test_another_model_gets_what_was_read(
    engine: LatentEngine, other: LatentEngine, thought: Context, mode: CrossingMode | None, done: str
) -> None:
    """What users and tools said, with its vector where that was asked for; or the words beside it. No system prompt."""
    parts = await offer(thought, engine, to=announcement_of_engine(other), text=WORDS, token=TOKEN)
    got = await receive(message(*parts), other, token=TOKEN, mode=mode)
    assert got.context is not None
    assert got.handoff.mode == done
    told = str(other._runtime.tokenizer.decode(list(got.context.token_ids())))
    assert (FACT in told, WORDS in told, "secret" in told) == (done != "text", done == "text", False)
    with pytest.raises(HandshakeError):
        await receive(message(*parts), other, token=TOKEN, mode="kv")


async def test_an_altered_frame_is_not_used(
    engine: LatentEngine, same: LatentEngine, thought: Context, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor one of another secret: the words beside it are read, and the handoff says why."""
    parts = await offer(thought, engine, to=announcement_of_engine(same), text=WORDS, token=TOKEN)
    altered = [*parts[:2], Part()]
    altered[2].CopyFrom(parts[2])
    altered[2].raw = parts[2].raw[:-40] + b"\0" * 40
    for given, token in ((altered, TOKEN), (parts, "another")):
        got = await receive(message(*given), same, token=token)
        assert got.context is not None
        assert got.handoff.mode == "text"
        assert got.handoff.notes[0].startswith("replay: ")
        assert "of no use" in caplog.text
        with pytest.raises(AvpError):
            await receive(message(*given), same, token=token, mode="replay")


async def test_raw_bytes_above_what_was_announced(engine: LatentEngine, same: LatentEngine, thought: Context) -> None:
    """The sender is told; a receiver that gets them all the same takes none of them."""
    told = Announcement(same.crossing.hello(), raw_bytes=100)
    with pytest.raises(LimitExceededError, match="Serve the engine"):
        await offer(thought, engine, to=told, text=WORDS, token=TOKEN)
    parts = await offer(thought, engine, to=announcement_of_engine(same), text=WORDS, token=TOKEN)
    got = await receive(message(*parts, Part(raw=bytes(2 * 2**20))), same, token=TOKEN)
    assert (got.handoff.mode, "were announced" in got.handoff.notes[0]) == ("text", True)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda told: told | {"v": 2},
        lambda told: told | {"handle": {"v": 1, "id": "../../etc/passwd"}},
        lambda told: told | {"positions": -1},
        lambda told: told | {"positions": 1.5},
        lambda told: told | {"kv_bytes": "many"},
        lambda told: told | {"hello": None},
        lambda told: {"x": [[[[]]]]},
    ],
)
async def test_a_description_that_makes_no_sense(
    engine: LatentEngine, same: LatentEngine, thought: Context, break_it: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """All text of the message is read, that beside the context too; the reason is told."""
    text, described, payload = await offer(thought, engine, to=announcement_of_engine(same), text=WORDS, token=TOKEN)
    described.data.CopyFrom(to_value(break_it(from_protobuf(described.data))))
    got = await receive(message(text, described, payload), same, token=TOKEN)
    assert (got.text, got.context) == (f"where?\n{WORDS}", None)
    assert "cannot be understood" in got.handoff.reason


async def test_metadata_of_others_is_left_alone(engine: LatentEngine, same: LatentEngine, thought: Context) -> None:
    """Parts that are not ours, or that claim a mode that there is not, are not payloads."""
    parts = await offer(thought, engine, to=announcement_of_engine(same), text=WORDS, token=TOKEN)
    odd = [Part(raw=b"x", metadata=to_struct({EXTENSION_URI: note})) for note in ({"mode": "teleport"}, {"mode": []})]
    odd.append(Part(url="https://elsewhere.example/", metadata=to_struct({EXTENSION_URI: "kv"})))
    got = await receive(message(*odd, *parts), same, token=TOKEN)
    assert got.handoff.mode == "replay"


async def test_a_served_engine_offers_urls(engine: LatentEngine, same: LatentEngine) -> None:
    """The receiver fetches from the server what the handshake chooses, if it may."""
    with serving(engine) as url, RemoteEngine(url, token=TOKEN) as remote:
        there = remote.think(FACT, steps=3)
        to = announcement_of_engine(same, url_bytes=2**30)
        parts = await offer(there, remote, to=to, text=WORDS, token=TOKEN)
        assert [part.WhichOneof("content") for part in parts] == ["text", "data", "url", "url"]
        assert TOKEN not in str(parts)
        got = await receive(message(*parts), same, token=TOKEN, urls=reached(url))
        assert got.context is not None
        assert got.handoff.mode in ("kv", "replay")
        assert got.context.recipe_id == there.recipe_id
        for mode in ("kv", "replay"):
            crossed = await receive(message(*parts), same, token=TOKEN, urls=reached(url), mode=mode)
            assert (crossed.handoff.mode, crossed.handoff.bytes > 0) == (mode, True)
        small = await receive(message(*parts), same, token=TOKEN, urls=reached(url, max_bytes=4096))
        assert small.handoff.mode == "replay"


async def test_a_url_that_may_not_be_fetched(engine: LatentEngine, same: LatentEngine) -> None:
    """Leaves the text; with another token the server refuses, too."""
    with serving(engine) as url, RemoteEngine(url, token=TOKEN) as remote:
        to = announcement_of_engine(same, url_bytes=2**30)
        parts = await offer(remote.think(FACT, steps=2), remote, to=to, text=WORDS, token=TOKEN)
        none = await receive(message(*parts), same, token=TOKEN)
        assert (none.handoff.mode, none.handoff.notes) == ("text", ())
        for policy, token in (
            (UrlPolicy(frozenset({"elsewhere.example"})), TOKEN),
            (UrlPolicy(frozenset({urlsplit(url).netloc})), TOKEN),
            (reached(url), "token-of-two"),
        ):
            got = await receive(message(*parts), same, token=token, urls=policy)
            assert got.context is not None
            assert got.handoff.mode == "text"
            assert len(got.handoff.notes) == 2
        with pytest.raises(TransportError):
            await receive(message(*parts), same, token=TOKEN, urls=UrlPolicy(frozenset()), mode="kv")


async def test_who_takes_no_urls_gets_none(engine: LatentEngine, same: LatentEngine) -> None:
    """The words, and the handle."""
    with serving(engine) as url, RemoteEngine(url, token=TOKEN) as remote:
        parts = await offer(
            remote.think(FACT, steps=2), remote, to=announcement_of_engine(same), text=WORDS, token=TOKEN
        )
    assert [part.WhichOneof("content") for part in parts] == ["text", "data"]


class Solver(AgentExecutor):
    """Answers on the context that a message hands over, and hands its own back if the other side can take it."""

    def __init__(self, engine: LatentEngine) -> None:
        self.engine = engine

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        assert context.message is not None
        got = await receive(context.message, self.engine, token=TOKEN)
        answer = await self.engine.agenerate(got.text, context=got.context, max_tokens=4)
        back = await offer(
            answer.context, self.engine, to=announcement_of(context.message), text=answer.text, token=TOKEN
        )
        mode = Part(text=f"mode: {got.handoff.mode}")
        await event_queue.enqueue_event(Message(role=Role.ROLE_AGENT, parts=[mode, *back], message_id=uuid.uuid4().hex))

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        raise AssertionError("nobody cancels")


@asynccontextmanager
async def agent(engine: LatentEngine, *, speaks: bool) -> AsyncIterator[tuple[AgentCard, Client]]:
    """An A2A agent on a real port: its card, and a client of it."""
    where = Binding(port=free_port())
    own = card(f"{where.url}/")
    if speaks:
        announce(own, engine)
    handler = DefaultRequestHandler(Solver(engine), InMemoryTaskStore(), own)
    app = Starlette(routes=[*create_agent_card_routes(own), *create_jsonrpc_routes(handler, "/")])
    with running(app, where, ServerLimits()) as url:
        async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
            read = await A2ACardResolver(http, url).get_agent_card()
            yield read, await create_client(read, client_config=ClientConfig(httpx_client=http, streaming=False))


@pytest.mark.parametrize("speaks", [True, False])
async def test_two_agents(engine: LatentEngine, same: LatentEngine, thought: Context, speaks: bool) -> None:
    """Over JSON-RPC: the card tells whether the other side takes contexts, and the answer may be one as well."""
    async with agent(same, speaks=speaks) as (read, client):
        told = announcement_of(read)
        assert (told is not None) is speaks
        asking = message(*await offer(thought, engine, to=told, text=WORDS, token=TOKEN))
        introduce(asking, engine)
        parameters = ServiceParametersFactory.create([with_a2a_extensions([EXTENSION_URI])])
        sent = client.send_message(
            SendMessageRequest(message=asking), context=ClientCallContext(service_parameters=parameters)
        )
        answer = [event async for event in sent][-1].message
    mode, *_ = answer.parts
    assert mode.text == ("mode: replay" if speaks else "mode: text")
    back = await receive(answer, engine, token=TOKEN)
    assert back.context is not None
    assert back.handoff.mode == "replay"
    assert back.context.extends(thought) is speaks
