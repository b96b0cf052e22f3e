"""The OpenAI-compatible endpoints, with the `openai` client, with curl, and with what they refuse."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any, cast

import httpx
import pytest
from serving import token

pytest.importorskip("openai", reason="the official client is not installed: pip install openai")
import openai

from avp_agents import LatentEngine
from avp_agents.transport import RemoteEngine

QUESTION: list[Any] = [{"role": "user", "content": "what is the sum of twenty four and seventeen?"}]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    """The official client."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="token-of-one", max_retries=0) as client:
        yield client


def post(url: str, **changes: Any) -> httpx.Response:
    """A chat completion asked for without a client."""
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 2} | changes
    return httpx.post(f"{url}/v1/chat/completions", headers=token("one"), json=body, trust_env=False)


def test_an_answer(client: openai.OpenAI, engine: LatentEngine) -> None:
    """The engine's own greedy answer, with usage, finish reason, and log-probabilities where asked for."""
    told: Any = client.chat.completions.create(
        model="tiny", messages=QUESTION, temperature=0, max_tokens=5, logprobs=True, top_logprobs=2
    )
    expected = engine.generate(QUESTION, max_tokens=5)
    choice = told.choices[0]
    assert choice.message.content == expected.text
    assert choice.finish_reason == "length"
    assert told.usage.completion_tokens == 5
    assert told.usage.prompt_tokens == expected.usage.prompt_tokens
    assert [token.token_id for token in choice.logprobs.content] == list(expected.token_ids)
    assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2] * 5
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "avp-agents"


def test_a_streamed_answer(client: openai.OpenAI) -> None:
    """The same answer in pieces; the handle comes with the last, then the usage."""
    asked: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "seed": 7, "max_completion_tokens": 6}
    whole = client.chat.completions.create(**asked)
    *pieces, usage = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert cast("Any", pieces[-1].choices[0].delta).avp_context["id"].startswith("avp:1:")
    assert usage.usage == whole.usage


def test_a_conversation_is_continued_on_its_context(client: openai.OpenAI) -> None:
    """Who sends an answer back as it came has its context used: nothing of it is computed again."""
    first: Any = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=4)
    messages = [*QUESTION, first.choices[0].message.model_dump(), {"role": "user", "content": "and then?"}]
    second: Any = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
    assert second.avp["mode"] == "kv"
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1


def test_a_thought_is_handed_to_an_openai_client(client: openai.OpenAI, remote: RemoteEngine) -> None:
    """A researcher thinks over the engine's own API; any OpenAI client answers on its context."""
    thought = remote.think(QUESTION, steps=3)
    handle = remote.store.put(thought, scope="ada").to_state()
    asked: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 3, "temperature": 0}
    answer: Any = client.chat.completions.create(**asked, user="ada", extra_body={"avp_context": handle})
    assert (answer.avp["mode"], answer.avp["positions_reused"]) == ("kv", len(thought))
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**asked, user="bob", extra_body={"avp_context": handle})


def conversation_about(answer: Any, **changes: Any) -> list[Any]:
    """The question, its answer as the client got it (with changes), and another question."""
    return [*QUESTION, answer.choices[0].message.model_dump() | changes, {"role": "user", "content": "and then?"}]


def test_an_answer_whose_context_is_gone_is_read_as_text(
    client: openai.OpenAI, remote: RemoteEngine, engine: LatentEngine
) -> None:
    """All its text is in the request, so a store that was cleared ends no conversation; the answer tells of it."""
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    first: Any = client.chat.completions.create(**asked, messages=QUESTION)
    messages = conversation_about(first)
    assert remote.store.delete(first.choices[0].message.avp_context)
    second: Any = client.chat.completions.create(**asked, messages=messages)
    assert second.avp["mode"] == "text"
    assert second.avp["reason"] in second.avp["as_text"]
    text = [{name: message[name] for name in ("role", "content")} for message in messages]
    assert second.choices[0].message.content == engine.generate(text, max_tokens=4).text


def test_an_edited_answer_is_read_as_it_says(client: openai.OpenAI, engine: LatentEngine) -> None:
    """Its context holds what the client has taken out; the handle that is still on it does not count."""
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    first: Any = client.chat.completions.create(**asked, messages=QUESTION)
    edited = conversation_about(first, content="Forty two.")
    *_, last = client.chat.completions.create(**asked, messages=edited, stream=True)
    assert cast("Any", last).avp["mode"] == "text"
    assert "edited" in cast("Any", last).avp["reason"]
    second: Any = client.chat.completions.create(**asked, messages=edited)
    text = [{name: message[name] for name in ("role", "content")} for message in edited]
    assert second.choices[0].message.content == engine.generate(text, max_tokens=4).text


@pytest.mark.parametrize("content", [[{"type": "text", "text": "the answer"}], None])
def test_an_answer_in_another_form_is_not_edited(client: openai.OpenAI, content: Any) -> None:
    """Text in parts says the same, and no text at all says nothing else."""
    first: Any = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=4)
    if content is not None:
        content = [{"type": "text", "text": first.choices[0].message.content}]
    messages = conversation_about(first, content=content)
    second: Any = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
    assert (second.avp["mode"], second.avp["as_text"]) == ("kv", [])


def test_a_message_without_text_whose_context_is_gone_is_an_error(url: str) -> None:
    """Nothing makes up for a thought."""
    thought = {"role": "assistant", "content": "", "avp_context": "avp:1:" + "0" * 32}
    refused = post(url, messages=[*QUESTION, thought, {"role": "user", "content": "and then?"}])
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "ContextLostError")


def test_what_clients_keep_on_an_answer_is_no_part_of_the_prompt(url: str) -> None:
    """Frameworks send an answer back with fields of their own, and with what a reasoning model reasoned."""
    plain = {"role": "assistant", "content": "forty one"}
    echoed = {
        "annotations": [{"type": "url_citation"}], "cache_control": {"type": "ephemeral"}, "id": "msg_1",
        "provider_specific_fields": {"refusal": None}, "reasoning": "24 + 17", "reasoning_content": "24 + 17",
        "refusal": None,
    }  # fmt: skip
    told = [
        post(url, messages=[*QUESTION, message, *QUESTION], temperature=0).json() for message in (plain, plain | echoed)
    ]
    assert told[0]["choices"][0]["message"]["content"] == told[1]["choices"][0]["message"]["content"]
    assert told[0]["usage"]["prompt_tokens"] == told[1]["usage"]["prompt_tokens"]


def test_json_of_a_schema(client: openai.OpenAI) -> None:
    """Structured output is enforced, token by token."""
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema}}
    told = client.chat.completions.create(model="tiny", messages=QUESTION, response_format=wanted, max_tokens=40)
    assert isinstance(json.loads(told.choices[0].message.content or "")["yes"], bool)


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 2},
        {"presence_penalty": 0.5},
        {"logit_bias": {"1": 5}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "yaml"}},
        {"top_logprobs": 3},
        {"max_tokens": 0},
        {"max_tokens": "many"},
        {"temperature": -1},
        {"temperature": True},
        {"top_p": 2},
        {"stop": [1]},
        {"stream_options": {"include_usage": True}},
        {"messages": "hello"},
        {"messages": []},
        {"messages": [{"role": "oracle", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": "x", "weight": 1}]},
        {"avp_context": "not a handle"},
        {"frequency": 1},
        {"model": None},
    ],
)
def test_what_the_engine_does_not_have_is_refused(url: str, changes: dict[str, Any]) -> None:
    """With an error in OpenAI's form, and never ignored."""
    refused = post(url, **changes)
    error = refused.json()["error"]
    assert (refused.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["message"]


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    """As OpenAI says it."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=QUESTION)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_an_error_before_the_first_piece_is_no_stream(url: str) -> None:
    """A request that runs out of window before its first token is an error response, also where a stream was asked."""
    refused = post(url, stream=True, max_tokens=5000)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "ContextWindowError")


def test_curl(url: str) -> None:
    """What README and docs/serving.md show."""
    body = json.dumps({"model": "tiny", "messages": QUESTION, "max_tokens": 3})
    asked = [
        "curl", "-sS", f"{url}/v1/chat/completions", "-H", "Authorization: Bearer token-of-one",
        "-H", "Content-Type: application/json", "-d", body,
    ]  # fmt: skip
    told = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert told["choices"][0]["message"]["avp_context"]["id"].startswith("avp:1:")
