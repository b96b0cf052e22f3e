"""What is sent to a vLLM server, and what is made of its answers; with a stand-in for the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fake_vllm import WINDOW, FakeServer, serve

from avp_agents import Context, MemoryStore, Namespace
from avp_agents.errors import (
    AuthenticationError,
    AvpError,
    ConfigurationError,
    EngineBusyError,
    EngineError,
    ModelNotFoundError,
    TransportError,
)
from avp_agents.vllm import VllmEngine
from avp_agents.vllm.served_model import ServedModel
from avp_agents.vllm.server import Address, Server


@pytest.fixture(scope="module")
def running(served_model: ServedModel) -> Iterator[tuple[FakeServer, VllmEngine]]:
    """The stand-in, and an engine on it."""
    store = MemoryStore(namespace=Namespace("vllm-tests", b"k" * 32))
    with serve(served_model.settings.name) as fake:
        address = Address(fake.url, api_key=None, seconds=30)
        backend = Server(address, served_model, served_name=None, dtype="float32")
        with VllmEngine(served_model, backend, store) as engine:
            yield fake, engine


@pytest.fixture
def server(running: tuple[FakeServer, VllmEngine]) -> FakeServer:
    fake, _ = running
    fake.status, fake.answers, fake.bodies = 200, [], []
    return fake


@pytest.fixture
def engine(running: tuple[FakeServer, VllmEngine]) -> VllmEngine:
    return running[1]


def answers(ids: list[int], *, usage: dict[str, Any] | None = None, **first: Any) -> list[dict[str, Any]]:
    """The events of an answer, one token each; `first` are fields of the first one."""
    events: list[dict[str, Any]] = [{"choices": [{"token_ids": [id_], "finish_reason": None}]} for id_ in ids]
    events[0] |= first
    events[-1]["choices"][0]["finish_reason"] = "stop"
    return [*events, {"choices": [], "usage": usage or {}}]


def test_the_server_is_asked_what_it_runs(
    engine: VllmEngine, server: FakeServer, served_model: ServedModel, store: MemoryStore
) -> None:
    assert engine.context_window == WINDOW
    assert engine.dtype == "float32"
    assert VllmEngine.from_server(f"{server.url}/v1/", store=store).model_path == served_model.settings.name


def test_text_goes_as_token_ids(engine: VllmEngine, server: FakeServer, served_model: ServedModel) -> None:
    end = min(served_model.renderer.stop_ids)
    details = {"prompt_tokens_details": {"cached_tokens": 16}}
    server.answers = answers([*served_model.renderer.encode("It is far."), end], usage=details)

    answer = engine.generate("How far is the moon?", max_tokens=9)

    assert answer.text == "It is far."
    assert answer.usage.positions_reused == 16
    [(path, body)] = server.bodies
    assert path == "/v1/completions"
    assert body["prompt"] == list(served_model.renderer.plan("How far is the moon?").token_ids)
    assert body["model"] == "the-model"
    assert body["max_tokens"] == 9
    assert body["temperature"] == 0.0
    assert body["return_token_ids"]


def test_thoughts_go_as_content_parts(
    engine: VllmEngine, server: FakeServer, served_model: ServedModel, thought: Context
) -> None:
    ids = list(served_model.renderer.plan("And the sun?", thought).token_ids)
    read = [*thought.token_ids(), 49152, 49152, 49152, *ids]
    server.answers = answers([min(served_model.renderer.stop_ids)], prompt_token_ids=read)

    engine.generate("And the sun?", context=thought)

    [(path, body)] = server.bodies
    assert path == "/v1/chat/completions"
    [message] = body["messages"]
    assert [part["type"] for part in message["content"]] == ["text", "prompt_embeds", "text"]
    assert not body["add_generation_prompt"]


def test_a_server_that_reads_other_tokens_is_found_out(
    engine: VllmEngine, server: FakeServer, thought: Context
) -> None:
    server.answers = answers([5], prompt_token_ids=[1, 2, 3])

    with pytest.raises(EngineError, match="read other token ids"):
        engine.generate("And the sun?", context=thought)


LOGPROBS = [
    {"tokens": ["token_id:57"], "token_logprobs": [-0.5], "top_logprobs": [{"token_id:57": -0.5, "token_id:9": -1.5}]},
    {
        "content": [
            {
                "token": "token_id:57",
                "logprob": -0.5,
                "top_logprobs": [{"token": "token_id:57", "logprob": -0.5}, {"token": "token_id:9", "logprob": -1.5}],
            }
        ]
    },
]


@pytest.mark.parametrize("logprobs", LOGPROBS, ids=["completions", "chat"])
def test_logprobs_come_in_either_form(engine: VllmEngine, server: FakeServer, logprobs: dict[str, Any]) -> None:
    server.answers = answers([57])
    server.answers[0]["choices"][0]["logprobs"] = logprobs

    answer = engine.generate("Well?", logprobs=2, max_tokens=1)

    assert answer.logprobs is not None
    assert answer.logprobs[0].top == ((57, -0.5), (9, -1.5))


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, ConfigurationError),
        (401, AuthenticationError),
        (404, ModelNotFoundError),
        (429, EngineBusyError),
        (500, EngineError),
        (503, EngineBusyError),
    ],
)
def test_refusals_are_our_errors_with_the_servers_words(
    engine: VllmEngine, server: FakeServer, status: int, error: type[AvpError]
) -> None:
    server.status, server.answers = status, [{"error": {"message": "not today"}}]

    with pytest.raises(error, match="not today"):
        engine.generate("Well?")


def test_an_answer_that_breaks_off_is_no_answer(engine: VllmEngine, server: FakeServer) -> None:
    server.answers = answers([57])[:-1]
    server.answers[0]["choices"][0]["finish_reason"] = None

    with pytest.raises(TransportError, match="ended early"):
        engine.generate("Well?")


def test_an_error_in_the_stream_is_raised(engine: VllmEngine, server: FakeServer) -> None:
    server.answers = [{"error": {"message": "out of memory"}}]

    with pytest.raises(EngineError, match="out of memory"):
        engine.generate("Well?")


def test_a_server_that_is_not_there(store: MemoryStore) -> None:
    with pytest.raises(TransportError, match="running there"):
        VllmEngine.from_server("http://127.0.0.1:9", store=store)
    with pytest.raises(TransportError, match="http:// or https://"):
        VllmEngine.from_server("ftp://somewhere", store=store)


def test_a_model_that_is_not_served(server: FakeServer, store: MemoryStore) -> None:
    with pytest.raises(ModelNotFoundError, match="it serves the-model"):
        VllmEngine.from_server(server.url, served_name="another", store=store)


def test_the_dtype_of_a_wide_checkpoint_has_to_be_said(
    server: FakeServer, served_model: ServedModel, monkeypatch: pytest.MonkeyPatch, store: MemoryStore
) -> None:
    monkeypatch.setattr(served_model.config, "dtype", "float32")
    address = Address(server.url, api_key=None, seconds=30)
    engine = VllmEngine(served_model, Server(address, served_model, served_name=None, dtype=None), store)

    with pytest.raises(ConfigurationError, match="dtype="):
        engine.load()
