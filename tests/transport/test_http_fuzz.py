"""Whatever comes as a body, a header or a path: an answer in the 200s or 400s, or an error that the engine knows.

``AVP_FUZZ_EXAMPLES`` sets how many examples each test tries.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import KnownTokens, engine_for, token

from avp_agents import LatentEngine
from avp_agents.transport.server import Access, ServerLimits, create_app
from avp_agents.transport.wire import frame_key

API = "/avp/v1"
FUZZ = settings(
    max_examples=int(os.environ.get("AVP_FUZZ_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
HANDLE = "avp:1:" + "0" * 32

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
anything = st.recursive(
    scalars | st.just(HANDLE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def objects(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Objects with some of these fields, each as it should be or anything."""
    return st.fixed_dictionaries({}, optional={name: good | anything for name, good in fields.items()})


messages = st.lists(
    objects(
        role=st.sampled_from(["user", "assistant", "system", "tool"]), content=st.text(max_size=12),
        tool_calls=anything,
        context=st.just(HANDLE), avp_context=st.just(HANDLE), name=st.text(max_size=4),
    ),
    max_size=3,
)  # fmt: skip
options = objects(
    max_tokens=st.integers(1, 3), temperature=st.floats(0, 2), top_p=st.floats(0.1, 1), seed=st.integers(),
    stop=st.lists(st.text(min_size=1, max_size=3), max_size=2), logprobs=st.integers(0, 3), grammar=anything,
    chat_template_kwargs=anything, tools=anything, timeout=st.floats(0.1, 5),
    stop_token_ids=st.lists(st.integers(0, 9)),
)  # fmt: skip
BODIES: dict[str, st.SearchStrategy[Any]] = {
    f"{API}/think": objects(prompt=st.text(max_size=9) | messages, steps=st.integers(1, 3), context=st.just(HANDLE),
                            options=objects(k=st.integers(1, 9), method=st.just("soft"), stop_cosine=st.floats(0, 1))),
    f"{API}/generate": objects(prompt=st.text(max_size=9) | messages, context=st.just(HANDLE), options=options),
    f"{API}/replay": objects(context=st.just(HANDLE)),
    f"{API}/join": objects(contexts=st.lists(st.just(HANDLE), max_size=3), strategy=st.text(max_size=6)),
    f"{API}/count": objects(prompt=messages, chat_template_kwargs=anything, tools=anything),
    f"{API}/encode": objects(text=st.text(max_size=20)),
    f"{API}/handshake": objects(hello=objects(
        v=st.just(1), fingerprint=st.just("0" * 64), dtype=st.just("float32"), modes=st.just(["kv"]),
        vocabulary=objects(digest=st.just("0" * 32), size=st.integers(0, 9), lowest=st.text(max_size=12)))),
    f"{API}/uploads": objects(bytes=st.integers(-5, 2000)),
    f"{API}/contexts/{HANDLE}/handles": objects(scope=st.text(max_size=4), seconds=st.floats(0, 9)),
    f"{API}/contexts/discard": objects(handles=st.lists(st.just(HANDLE) | anything, max_size=3), idle=st.floats(0, 9)),
    "/v1/chat/completions": objects(
        model=st.just("tiny"), messages=messages, max_tokens=st.integers(1, 3), stream=st.booleans(), stop=anything,
        logprobs=st.booleans(), top_logprobs=st.integers(0, 3), response_format=anything, user=st.text(max_size=4),
        avp_context=st.just(HANDLE), n=st.just(1), chat_template_kwargs=anything),
}  # fmt: skip


class InProcess:
    """The application without a network."""

    def __init__(self, engine: LatentEngine) -> None:
        limits = ServerLimits(contexts=10**9, uploads=10**9, read_seconds=5)
        app = create_app(engine_for(engine), model="tiny", access=Access(KnownTokens(), loopback=True), limits=limits)
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        self._loop = asyncio.new_event_loop()
        self._client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=token("one"))
        self._service = app.state.service

    def ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        return self._loop.run_until_complete(self._client.request(method, path, **request))

    def close(self) -> None:
        self._loop.run_until_complete(self._client.aclose())
        self._loop.close()
        self._service.uploads.close()


@pytest.fixture(scope="module")
def server(engine: LatentEngine) -> Iterator[InProcess]:
    """The application."""
    server = InProcess(engine)
    yield server
    server.close()


def is_sound(response: httpx.Response) -> bool:
    """Whether it is an answer, or an error of the engine's that is not our own fault."""
    if response.status_code < 300:
        return True
    error = response.json()["error"]
    assert "Traceback" not in response.text
    assert error["message"], error
    return response.status_code < 500 or error["code"] in ("RequestTimeoutError", "EngineBusyError")


@FUZZ
@given(st.data())
def test_bodies(server: InProcess, data: st.DataObject) -> None:
    """JSON that is nearly right, for every endpoint that takes some."""
    path = data.draw(st.sampled_from(sorted(BODIES)))
    body = data.draw(BODIES[path] | anything)
    response = server.ask("POST", path, content=json.dumps(body).encode())
    assert is_sound(response), (path, body, response.text)


@FUZZ
@given(
    path=st.sampled_from(sorted(BODIES)), body=st.binary(max_size=60) | st.sampled_from([b"[" * 99_999, b'{"a":1e999}'])
)
def test_bytes_that_are_no_json(server: InProcess, path: str, body: bytes) -> None:
    """Anything at all."""
    assert is_sound(server.ask("POST", path, content=body))


@FUZZ
@given(
    reference=st.text(st.characters(exclude_characters="/?#%", exclude_categories=["C"]), min_size=1, max_size=12)
    | st.just(HANDLE),
    end=st.sampled_from(["", "/frame", "/held", "/thought", "/kv"]),
    query=st.dictionaries(st.sampled_from(["kv", "scope", "reread"]), st.text(max_size=5), max_size=2),
    headers=st.dictionaries(
        st.sampled_from(["range", "if-range", "x-avp-request", "content-length"]),
        st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=12),
        max_size=2,
    ),
)
def test_paths_queries_and_headers(server: InProcess, reference: str, end: str, query: Any, headers: Any) -> None:
    """Untrusted, too."""
    for method in ("GET", "DELETE"):
        url = f"{API}/contexts/{reference}{end}"
        assert is_sound(server.ask(method, url, params=query, headers=headers))


@FUZZ
@given(data=st.binary(min_size=1, max_size=300), key=st.just(frame_key("token-of-one")))
def test_uploads_of_noise(server: InProcess, data: bytes, key: bytes) -> None:
    """What is no frame is refused."""
    upload = server.ask("POST", f"{API}/uploads", json={"bytes": len(data)}).json()["upload"]
    response = server.ask("PATCH", f"{API}/uploads/{upload}", content=data, headers={"upload-offset": "0"})
    assert 400 <= response.status_code < 500, (key, response.text)
