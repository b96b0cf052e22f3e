"""The OpenAI-compatible endpoints, for clients that know nothing of contexts, and for those that do.

An answer's message carries the handle of its context in ``avp_context``. A client that sends the message back as it
got it has the context used in its place; a client that sends ``avp_context`` beside the messages has it handed over.
Where a message was edited, or its context is gone, the message's text is read, and ``avp`` says why.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Never, cast

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from avp_agents.agent.exchange import AnswerRequest, Made, describe, make, one_line
from avp_agents.agent.ladder import Ladder, Prepared, prepare
from avp_agents.agent.steps import arun
from avp_agents.agent.turns import Scope
from avp_agents.answer.generation import Chunk, Generation, TokenLogprob
from avp_agents.answer.options import GenerateOptions
from avp_agents.errors import AvpError, ModelNotFoundError
from avp_agents.handle import ContextHandle
from avp_agents.transport.problems import Refusal, error_json, status_of
from avp_agents.transport.server.bodies import read_fields
from avp_agents.transport.server.chat_request import ChatRequest, read_chat_request
from avp_agents.transport.server.chat_turns import HANDLE_FIELD, marked
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
        answer, request_id = _Answer(self._service.model), request.headers.get(REQUEST_ID_HEADER)
        if not asked.stream:
            completed = await while_connected(request.receive, self._complete(tenant, asked, request_id, _say_nothing))
            return JSONResponse(answer.whole(completed))

        async def produce(emit: Emit) -> None:
            opened = False

            def tell(chunk: Chunk) -> tuple[Never, ...]:
                nonlocal opened
                if not opened:
                    emit(_data(answer.piece({"role": "assistant", "content": ""})))
                    opened = True
                if chunk.text or chunk.reasoning or chunk.logprobs:
                    emit(_data(answer.chunk(chunk, asked.logprobs)))
                return ()

            completed = await self._complete(tenant, asked, request_id, tell)
            emit(_data(answer.last(completed)))
            if asked.include_usage:
                emit(_data(answer.usage(completed.generation)))
            emit(b"data: [DONE]\n\n")

        return EventStream(produce, _error_event)

    async def _complete(
        self,
        tenant: Tenant,
        asked: ChatRequest,
        request_id: str | None,
        tell: Callable[[Chunk], Iterable[Never]],
    ) -> _Completed:
        engine, scope = tenant.engine, Scope(asked.scope, asked.scope)
        options = asked.options | {
            "timeout": self._service.allowed_seconds(None),
            "source": tenant.source(asked.scope),
        }
        async with tenant.cancellable(request_id):
            context = None
            if asked.handle is not None:
                context = await engine.aresolve(ContextHandle.from_state(asked.handle), scope=asked.scope)
            prepared = await arun(prepare(Ladder(engine, scope, "error"), asked.messages))
            answering = AnswerRequest(cast("GenerateOptions", options))
            made = await arun(make(engine, prepared.prompt, context, None, answering, tell))
            self._service.note_usage(made.usage)
            seconds = self._service.limits.context_seconds
            handle = await tenant.keep(made.context, scope=asked.scope, text=one_line(made.text), seconds=seconds)
        return _Completed(made, prepared, marked(handle, made.text))

    def _model(self) -> Json:
        return {"id": self._service.model, "object": "model", "created": 0, "owned_by": "avp-agents"}


@dataclass(frozen=True)
class _Completed:
    """A completion: what was made, how its messages' handles were settled, and the handle that it goes out with."""

    made: Made
    prepared: Prepared
    handle: ContextHandle

    @property
    def generation(self) -> Generation:
        """What was decoded."""
        assert self.made.said is not None, "a completion is an answer"
        return self.made.said

    @property
    def metadata(self) -> Json:
        """How the contexts were used, and what was read as text instead, and why."""
        reasons = [fallback.reason for fallback in self.prepared.fallbacks]
        return describe(self.made, self.prepared) | {"as_text": reasons}


@dataclass(frozen=True)
class _Answer:
    """One answer in OpenAI's forms.

    Attributes:
        model: The model's name.
    """

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, completed: _Completed) -> Json:
        """An answer in one piece."""
        generation = completed.generation
        message: Json = {"role": "assistant", "content": generation.text, HANDLE_FIELD: completed.handle.to_state()}
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
            "avp": completed.metadata,
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

    def last(self, completed: _Completed) -> Json:
        """The piece that ends the answer: no text, the handle, and how the context was used."""
        ending = self.piece({HANDLE_FIELD: completed.handle.to_state()}, finish=completed.generation.finish_reason)
        return ending | {"avp": completed.metadata}

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


def _say_nothing(chunk: Chunk) -> tuple[Never, ...]:
    return ()


def _data(data: Json) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def _error_event(error: AvpError) -> bytes:
    return _data(error_json(error, status_of(error)))
