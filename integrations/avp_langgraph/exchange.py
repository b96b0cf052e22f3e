"""One exchange with an engine: settle the handles, think or generate, store the context, and say how it went.

`chunks` and `achunks` are the same exchange for threads and for event loops; leaving either one early ends the request
in the engine.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import aclosing, closing, contextmanager
from typing import Any, cast

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessageChunk, BaseMessage

from avp_agents.engine.base import Chunk, Engine
from avp_agents.errors import ContextWindowError
from avp_langgraph.answers import answer_chunk, answer_line, thought_chunk, thought_line
from avp_langgraph.calls import Call
from avp_langgraph.handoffs import Preparation, arun, prepare, run
from avp_langgraph.messages import read_messages
from avp_langgraph.scope import Scope


class AvpContextOverflowError(ContextWindowError, ContextOverflowError):
    """A `ContextWindowError` that LangChain's middleware knows as its `ContextOverflowError`."""


def chunks(engine: Engine, messages: Sequence[BaseMessage], call: Call, scope: Scope) -> Generator[AIMessageChunk]:
    """The answer to `messages`, piece by piece; the last piece has usage and metadata.

    Raises:
        AvpContextOverflowError: It does not fit the model's window.
        AvpError: As the engine and its store.
    """
    with _known_to_langchain():
        prepared = run(_preparation(engine, messages, call, scope), engine)
        prompt, context = prepared.prompt, prepared.context
        if call.mode == "latent":
            options = call.think_options(scope.minted)
            thought = engine.think(prompt, steps=call.latent_steps, context=context, **options)
            handle = engine.store.put(thought, **_label(scope, thought_line(thought, scope)))
            yield thought_chunk(thought, handle, prepared, scope, model=call.model or engine.model_path)
            return
        generation = None
        stream = engine.stream(prompt, context=context, **call.generate_options(scope.minted))
        with closing(cast("Generator[Chunk]", stream)) as pieces:
            for piece in pieces:
                generation = piece.generation
                if piece.text:
                    yield AIMessageChunk(content=piece.text)
        assert generation is not None, "an engine's stream ends with its generation"
        handle = engine.store.put(generation.context, **_label(scope, answer_line(generation)))
        yield answer_chunk(generation, handle, prepared, scope, model=call.model or engine.model_path)


async def achunks(
    engine: Engine, messages: Sequence[BaseMessage], call: Call, scope: Scope
) -> AsyncGenerator[AIMessageChunk]:
    """`chunks` on an event loop, which it does not block.

    Raises:
        As `chunks`.
    """
    with _known_to_langchain():
        prepared = await arun(_preparation(engine, messages, call, scope), engine)
        prompt, context = prepared.prompt, prepared.context
        if call.mode == "latent":
            options = call.think_options(scope.minted)
            thought = await engine.athink(prompt, steps=call.latent_steps, context=context, **options)
            handle = await engine.store.aput(thought, **_label(scope, thought_line(thought, scope)))
            yield thought_chunk(thought, handle, prepared, scope, model=call.model or engine.model_path)
            return
        generation = None
        stream = engine.astream(prompt, context=context, **call.generate_options(scope.minted))
        async with aclosing(cast("AsyncGenerator[Chunk]", stream)) as pieces:
            async for piece in pieces:
                generation = piece.generation
                if piece.text:
                    yield AIMessageChunk(content=piece.text)
        assert generation is not None, "an engine's stream ends with its generation"
        handle = await engine.store.aput(generation.context, **_label(scope, answer_line(generation)))
        yield answer_chunk(generation, handle, prepared, scope, model=call.model or engine.model_path)


def _preparation(engine: Engine, messages: Sequence[BaseMessage], call: Call, scope: Scope) -> Preparation:
    turns = read_messages(messages)
    return prepare(turns, call.avp_context, store=engine.store, scope=scope, on_missing=call.on_missing)


def _label(scope: Scope, line: str) -> dict[str, Any]:
    """Where a context is put, and what people read beside its handle."""
    return {"scope": scope.minted, "agent": scope.agent, "text": line}


@contextmanager
def _known_to_langchain() -> Iterator[None]:
    try:
        yield
    except ContextWindowError as error:
        raise AvpContextOverflowError(
            window=error.window, context=error.context, prompt=error.prompt, requested=error.requested
        ) from error
