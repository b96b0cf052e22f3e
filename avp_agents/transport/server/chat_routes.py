"""The OpenAI-compatible endpoints, for clients that know nothing of contexts, and for those that do.

An answer's message carries the handle of its context in ``avp_context``. A client that sends the message back as it
got it has the context used in its place; a client that sends ``avp_context`` beside the messages has it handed over.
"""

from __future__ import annotations

import json
import secrets
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from avp_agents.answer.generation import Chunk, Generation, TokenLogprob
from avp_agents.context import Context
from avp_agents.errors import AvpError, ModelNotFoundError
from avp_agents.handle import ContextHandle
from avp_agents.transport.problems import Refusal, error_json, status_of
from avp_agents.transport.server.bodies import read_fields
from avp_agents.transport.server.chat_request import HANDLE_FIELD, ChatRequest, read_chat_request
from avp_agents.transport.server.service import Service
from avp_agents.transport.server.streaming import Emit, EventStream, while_connected
from avp_agents.transport.server.tenants import Tenant
from avp_agents.transport.wire import REQUEST_ID_HEADER, Json
from avp_agents.usage import Usage


class ChatRoutes:
    """Handlers; each takes a request and returns a response.

    Args:
        service: What they work with.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def models(self, request: Request) -> ASGIApp:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> ASGIApp:
        """It."""
        asked = request.path_params["model"]
        if asked != self._service.model:
            error = ModelNotFoundError(f"This server has the model {self._service.model!r}, not {asked[:100]!r}.")
            raise Refusal(404, error, code="model_not_found")
        return JSONResponse(self._model())

    async def completions(self, request: Request) -> ASGIApp:
        """A chat completion, whole or as events."""
        tenant = await self._service.tenant(request)
        asked = read_chat_request(await read_fields(request, self._service.limits.body_bytes), self._service.model)
        answer = _Answer(self._service.model)
        request_id = request.headers.get(REQUEST_ID_HEADER)
        if not asked.stream:
            return JSONResponse(await while_connected(request.receive, self._whole(tenant, asked, answer, request_id)))

        async def produce(emit: Emit) -> None:
            await self._stream(tenant, asked, answer, request_id, emit)

        return EventStream(produce, _error_event)

    async def _whole(self, tenant: Tenant, asked: ChatRequest, answer: _Answer, request_id: str | None) -> Json:
        async with tenant.cancellable(request_id):
            prompt, context = await _resolved(tenant, asked)
            options = self._options(asked, tenant)
            generation = await tenant.engine.agenerate(prompt, context=context, **options)
            return answer.whole(generation, await self._kept(tenant, asked, generation))

    async def _stream(
        self, tenant: Tenant, asked: ChatRequest, answer: _Answer, request_id: str | None, emit: Emit
    ) -> None:
        async with tenant.cancellable(request_id):
            prompt, context = await _resolved(tenant, asked)
            options = self._options(asked, tenant)
            emit_first = True
            async with aclosing(tenant.engine.astream(prompt, context=context, **options)) as chunks:
                async for chunk in chunks:
                    if emit_first:
                        emit(_data(answer.piece({"role": "assistant", "content": ""})))
                        emit_first = False
                    if chunk.text or chunk.reasoning or chunk.logprobs:
                        emit(_data(answer.chunk(chunk, asked.logprobs)))
                    if (generation := chunk.generation) is not None:
                        handle = await self._kept(tenant, asked, generation)
                        emit(_data(answer.last(generation, handle)))
                        if asked.include_usage:
                            emit(_data(answer.usage(generation)))
        emit(b"data: [DONE]\n\n")

    async def _kept(self, tenant: Tenant, asked: ChatRequest, generation: Generation) -> ContextHandle:
        self._service.note_usage(generation.usage)
        line = " ".join(generation.text.split())
        seconds = self._service.limits.context_seconds
        return await tenant.keep(generation.context, scope=asked.scope, text=line, seconds=seconds)

    def _options(self, asked: ChatRequest, tenant: Tenant) -> Any:
        return asked.options | {"timeout": self._service.allowed_seconds(None), "source": tenant.source(asked.scope)}

    def _model(self) -> Json:
        return {"id": self._service.model, "object": "model", "created": 0, "owned_by": "avp-agents"}


async def _resolved(tenant: Tenant, asked: ChatRequest) -> tuple[list[dict[str, Any]], Context | None]:
    """The messages with the contexts that they stand for, and the context that was handed over."""

    async def context_of(handle: Any) -> Context:
        return await tenant.engine.aresolve(ContextHandle.from_state(handle), scope=asked.scope)

    messages = []
    for message in asked.messages:
        rest = {name: value for name, value in message.items() if name != HANDLE_FIELD}
        handle = message.get(HANDLE_FIELD)
        messages.append(rest if handle is None else rest | {"context": await context_of(handle)})
    return messages, None if asked.handle is None else await context_of(asked.handle)


@dataclass(frozen=True)
class _Answer:
    """One answer in OpenAI's forms.

    Attributes:
        model: The model's name.
    """

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, generation: Generation, handle: ContextHandle) -> Json:
        """An answer in one piece."""
        message: Json = {"role": "assistant", "content": generation.text, HANDLE_FIELD: handle.to_state()}
        if generation.reasoning:
            message["reasoning_content"] = generation.reasoning
        told = None if generation.logprobs is None else [_logprob(logprob) for logprob in generation.logprobs]
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": generation.finish_reason,
            "logprobs": None if told is None else {"content": told, "refusal": None},
        }
        return self._form("chat.completion", [choice]) | {
            "usage": _usage(generation.usage),
            "avp": generation.handoff.to_metadata(),
        }

    def piece(self, delta: Json, finish: str | None = None, logprobs: Json | None = None) -> Json:
        """A piece of an answer."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return self._form("chat.completion.chunk", [choice])

    def chunk(self, chunk: Chunk, with_logprobs: bool) -> Json:
        """A piece with text."""
        delta = {"content": chunk.text} | ({"reasoning_content": chunk.reasoning} if chunk.reasoning else {})
        told = {"content": [_logprob(logprob) for logprob in chunk.logprobs], "refusal": None}
        return self.piece(delta, logprobs=told if with_logprobs else None)

    def last(self, generation: Generation, handle: ContextHandle) -> Json:
        """The piece that ends the answer: no text, the handle, and how the context was used."""
        ending = self.piece({HANDLE_FIELD: handle.to_state()}, finish=generation.finish_reason)
        return ending | {"avp": generation.handoff.to_metadata()}

    def usage(self, generation: Generation) -> Json:
        """The piece that tells the usage."""
        return self._form("chat.completion.chunk", []) | {"usage": _usage(generation.usage)}

    def _form(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def _usage(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.positions_reused},
    }


def _logprob(token: TokenLogprob) -> Json:
    """OpenAI tells texts of the alternatives, too; the engine knows their ids, which stand beside."""
    return {
        "token": token.text,
        "token_id": token.token_id,
        "bytes": list(token.text.encode(errors="surrogatepass")),
        "logprob": token.logprob,
        "top_logprobs": [
            {"token": f"token_id:{token_id}", "token_id": token_id, "bytes": None, "logprob": logprob}
            for token_id, logprob in token.top
        ],
    }


def _data(data: Json) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def _error_event(error: AvpError) -> bytes:
    return _data(error_json(error, status_of(error)))
