"""A running OpenAI-compatible vLLM server, over HTTP.

Prompts without latent steps go to ``/v1/completions`` as token ids; others to ``/v1/chat/completions``, as content
parts under a template that adds nothing. For those the server needs ``--enable-prompt-embeds`` and
``--trust-request-chat-template``. Nothing is retried.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import torch

from avp_agents.engine.core.sampling import Sampled
from avp_agents.errors import (
    AuthenticationError,
    AvpError,
    ConfigurationError,
    EngineBusyError,
    EngineError,
    LimitExceededError,
    ModelNotFoundError,
    RequestTimeoutError,
    TransportError,
)
from avp_agents.vllm.backend import DecodingOptions, Facts, Step
from avp_agents.vllm.content_parts import TEMPLATE, Content, ContentWriter
from avp_agents.vllm.lineage_prompt import LineagePrompt
from avp_agents.vllm.served_model import ServedModel

CONNECT_SECONDS = 10.0
_REFUSALS: dict[int, type[AvpError]] = {
    400: ConfigurationError,
    401: AuthenticationError,
    403: AuthenticationError,
    404: ModelNotFoundError,
    413: LimitExceededError,
    422: ConfigurationError,
    429: EngineBusyError,
    503: EngineBusyError,
}
_TOKEN = "token_id:"
"""How the server spells tokens in log-probabilities."""

Json = dict[str, Any]


class Address:
    """Where a server is, and how to speak with it.

    Args:
        url: ``http://`` or ``https://``, host and port.
        api_key: The server's ``--api-key``.
        seconds: How long an answer, or the next piece of one, may take.

    Raises:
        TransportError: That is not a URL.
    """

    def __init__(self, url: str, *, api_key: str | None, seconds: float) -> None:
        try:
            self.url = httpx.URL(url)
        except (httpx.InvalidURL, TypeError) as error:
            raise TransportError(f"{url!r} is not a URL: {error}") from error
        if self.url.scheme not in ("http", "https") or not self.url.host or self.url.userinfo:
            raise TransportError("A server's URL is http:// or https:// with host and port; a key goes into api_key=.")
        if self.url.path.rstrip("/").endswith("/v1"):
            self.url = self.url.copy_with(path=self.url.path.rstrip("/").removesuffix("/v1") or "/")
        self.options: Json = {
            "base_url": self.url,
            "headers": {"authorization": f"Bearer {api_key}"} if api_key is not None else {},
            "timeout": httpx.Timeout(seconds, connect=CONNECT_SECONDS),
            "limits": httpx.Limits(max_connections=None),
            "trust_env": False,
        }

    def served(self, name: str | None) -> Json:
        """What the server says of a model it serves; of its first one where no name is given.

        Raises:
            ModelNotFoundError: It does not serve that.
            TransportError: It cannot be reached.
        """
        with _translated(self.url), httpx.Client(**self.options) as client:
            response = client.get("v1/models")
        _check(response.status_code, response.text)
        try:
            models = {model["id"]: model for model in response.json()["data"] if model["root"]}
        except (ValueError, KeyError, TypeError) as error:
            raise TransportError(
                f"{self.url} does not say what it serves as vLLM does; is it a vLLM server?"
            ) from error
        found = models.get(name) if name is not None else next(iter(models.values()), None)
        if found is None:
            raise ModelNotFoundError(f"{self.url} does not serve {name or 'a model'!r}; it serves {', '.join(models)}.")
        return found


class Server:
    """Implements `Backend` with a server.

    Args:
        address: Where it is.
        model: What it runs.
        served_name: What it calls that; None is its first model.
        dtype: What it holds the model in.
    """

    def __init__(self, address: Address, model: ServedModel, *, served_name: str | None, dtype: str | None) -> None:
        self._address, self._model = address, model
        self._name, self._dtype = served_name, dtype
        self._client: httpx.AsyncClient | None = None
        self._writer: ContentWriter | None = None

    async def start(self) -> Facts:
        """Ask the server what it runs.

        Raises:
            ConfigurationError: It cannot be told which dtype that is in.
            TransportError: The server cannot be reached.
        """
        served = await asyncio.to_thread(self._address.served, self._name)
        self._name = served["id"]
        dtype = self._dtype or str(getattr(self._model.config, "dtype", None)).removeprefix("torch.")
        if self._dtype is None and dtype not in ("bfloat16", "float16"):
            # vLLM narrows other checkpoints unless it is told not to
            raise ConfigurationError(
                f"The checkpoint is in {dtype}, so it is not clear what the server runs it in. Say dtype=, as the "
                "server was started with --dtype."
            )
        self._writer = ContentWriter(self._model, getattr(torch, dtype))
        self._client = httpx.AsyncClient(**self._address.options)
        return Facts(int(served.get("max_model_len") or self._model.window), dtype, thinks=True)

    async def decode(self, prompt: LineagePrompt, decoding: DecodingOptions) -> AsyncGenerator[Step, None]:
        """See `Backend.decode`."""
        body: Json = {
            "model": self._name,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "skip_special_tokens": False,
            **decoding.sampling,
        }
        if decoding.structured is not None:
            body["structured_outputs"] = decoding.structured
        if decoding.transfer is not None:
            body["kv_transfer_params"] = decoding.transfer
        if decoding.wants_transfer:
            body |= {"stream": False, "stream_options": None}
        if decoding.salt is not None:
            body["cache_salt"] = decoding.salt
        content: Content | None = None
        if prompt.is_text:
            path = "v1/completions"
            body |= {"prompt": prompt.token_ids()} | _completion_logprobs(decoding.logprobs)
        else:
            assert self._writer is not None
            path = "v1/chat/completions"
            content = await asyncio.to_thread(self._writer.content, prompt)
            body |= _chat(content) | _chat_logprobs(decoding.logprobs)
        async with self._posted(path, body) as response:
            async for data in _pieces(response, stream=body["stream"]):
                if "error" in data:
                    raise EngineError(f"vLLM failed: {_message(data)}")
                if content is not None and data.get("prompt_token_ids") is not None:
                    _check_read(content, data["prompt_token_ids"])
                yield _step(data, decoding.logprobs)

    async def close(self) -> None:
        """Close the connections; the server stays."""
        if self._client is not None:
            await self._client.aclose()

    @asynccontextmanager
    async def _posted(self, path: str, body: Json) -> AsyncIterator[httpx.Response]:
        assert self._client is not None
        with _translated(self._address.url):
            async with self._client.stream("POST", path, json=body) as response:
                if response.is_error:
                    await response.aread()
                    _check(response.status_code, response.text)
                yield response


def _chat(content: Content) -> Json:
    return {
        "messages": [{"role": "user", "content": content.parts}],
        "chat_template": TEMPLATE,
        "add_generation_prompt": False,
        "add_special_tokens": False,
    }


def _chat_logprobs(count: int | None) -> Json:
    if count is None:
        return {}
    return {"logprobs": True, "top_logprobs": count, "return_tokens_as_token_ids": True}


def _completion_logprobs(count: int | None) -> Json:
    return {} if count is None else {"logprobs": count, "return_tokens_as_token_ids": True}


def _check_read(content: Content, token_ids: list[int]) -> None:
    if not content.is_what_was_read(token_ids):
        raise EngineError(
            "The server read other token ids than it was sent. Its tokenizer or version differs: give VllmEngine the "
            "checkpoint that the server runs (model=), and run vLLM 0.32 or later there."
        )


def _step(data: Json, logprobs: int | None) -> Step:
    usage = data.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    choice = next(iter(data.get("choices") or []), {})
    ids: list[int] = choice.get("token_ids") or []
    tokens = tuple(Sampled(id_) for id_ in ids)
    if logprobs is not None and choice.get("logprobs"):
        tokens = tuple(_token_logprobs(choice["logprobs"], ids, logprobs))
    ended = choice.get("finish_reason") is not None
    return Step(tokens, details.get("cached_tokens"), ended, data.get("kv_transfer_params"))


def _token_logprobs(logprobs: Json, ids: list[int], count: int) -> Iterator[Sampled]:
    """Tokens with log-probabilities, in the chat interface's form or in that of completions."""
    if "content" in logprobs:
        for id_, entry in zip(ids, logprobs["content"], strict=True):
            pairs = [(_id(top["token"]), top["logprob"]) for top in entry["top_logprobs"]]
            yield Sampled(id_, entry["logprob"], _best(pairs, count))
    else:
        for id_, logprob, tops in zip(ids, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
            yield Sampled(id_, logprob, _best([(_id(name), value) for name, value in (tops or {}).items()], count))


def _best(pairs: list[tuple[int, float]], count: int) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(pairs, key=lambda pair: -pair[1])[:count])


def _id(name: str) -> int:
    return int(name.removeprefix(_TOKEN))


async def _pieces(response: httpx.Response, *, stream: bool) -> AsyncIterator[Json]:
    """The JSON of server-sent events, or of the one answer."""
    try:
        if not stream:
            yield json.loads(await response.aread())
            return
        async for line in response.aiter_lines():
            data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
            if data and data != "[DONE]":
                yield json.loads(data)
    except ValueError as error:
        raise TransportError("The server sent something that is no JSON; is it vLLM?") from error


def _check(status: int, text: str) -> None:
    """Raise what an HTTP status stands for."""
    if status < 400:
        return
    try:
        message = _message(json.loads(text))
    except ValueError:
        message = text.strip()[:200]
    raise _REFUSALS.get(status, EngineError)(f"vLLM answered with {status}: {message}")


def _message(data: Mapping[str, Any]) -> str:
    error = data.get("error", data)
    return str(error.get("message", error) if isinstance(error, Mapping) else error)


@contextmanager
def _translated(url: httpx.URL) -> Iterator[None]:
    """httpx's errors as ours."""
    try:
        yield
    except httpx.ConnectError as error:
        raise TransportError(f"Cannot connect to {url}: {error}. Is vLLM's server running there?") from error
    except httpx.TimeoutException as error:
        raise RequestTimeoutError(f"{url} did not answer in time; raise seconds= of VllmEngine.from_server.") from error
    except (httpx.HTTPError, httpx.StreamError) as error:
        raise TransportError(f"The exchange with {url} broke off: {type(error).__name__}: {error}") from error
