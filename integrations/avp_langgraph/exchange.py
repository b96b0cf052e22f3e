"""One exchange with an engine: settle the handles, think or generate, store the context, and say how it went.

`chunks` and `achunks` are the same exchange for threads and for event loops; leaving either one early ends the request
in the engine.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from typing import Any, cast

from langchain_core.messages import AIMessageChunk, BaseMessage

from avp_agents.answer.options import GenerateOptions
from avp_agents.engine.protocol import Engine
from avp_agents.prompt.chat_messages import Message
from avp_langgraph.answers import answer_chunk, answer_line, thought_chunk, thought_line
from avp_langgraph.calls import Call
from avp_langgraph.events import stream_handoff
from avp_langgraph.handoffs import Preparation, arun, prepare, run
from avp_langgraph.messages import METADATA_KEY, read_messages
from avp_langgraph.scope import Scope


def chunks(engine: Engine, messages: Sequence[BaseMessage], call: Call, scope: Scope) -> Generator[AIMessageChunk]:
    """The answer to `messages`, piece by piece; the last piece has usage and metadata.

    Raises:
        AvpError: As the engine and its store.
    """
    prepared = run(_preparation(engine, messages, call, scope), engine)
    prompt, context = prepared.prompt, prepared.context
    if call.mode == "latent":
        options = call.think_options(scope.minted)
        thought = engine.think(prompt, steps=call.latent_steps, context=context, **options)
        handle = engine.store.put(thought, **_label(scope, thought_line(thought, scope)))
        last = thought_chunk(thought, handle, prepared, scope, model=call.model or engine.model_path)
        yield _announced(last, scope)
        return
    generation = None
    reader = call.constraints.reader(engine)
    prompt, options = _constrained(prompt, call, engine, scope)
    with closing(engine.stream(prompt, context=context, **options)) as pieces:
        for piece in pieces:
            generation = piece.generation
            yield from reader.read(piece)
    assert generation is not None, "an engine's stream ends with its generation"
    handle = engine.store.put(generation.context, **_label(scope, answer_line(generation)))
    last = answer_chunk(generation, handle, prepared, scope, reader, model=call.model or engine.model_path)
    yield _announced(last, scope)


async def achunks(
    engine: Engine, messages: Sequence[BaseMessage], call: Call, scope: Scope
) -> AsyncGenerator[AIMessageChunk]:
    """`chunks` on an event loop, which it does not block.

    Raises:
        As `chunks`.
    """
    prepared = await arun(_preparation(engine, messages, call, scope), engine)
    prompt, context = prepared.prompt, prepared.context
    if call.mode == "latent":
        options = call.think_options(scope.minted)
        thought = await engine.athink(prompt, steps=call.latent_steps, context=context, **options)
        handle = await engine.store.aput(thought, **_label(scope, thought_line(thought, scope)))
        last = thought_chunk(thought, handle, prepared, scope, model=call.model or engine.model_path)
        yield _announced(last, scope)
        return
    generation = None
    reader = call.constraints.reader(engine)
    prompt, options = _constrained(prompt, call, engine, scope)
    async with aclosing(engine.astream(prompt, context=context, **options)) as pieces:
        async for piece in pieces:
            generation = piece.generation
            for chunk in reader.read(piece):
                yield chunk
    assert generation is not None, "an engine's stream ends with its generation"
    handle = await engine.store.aput(generation.context, **_label(scope, answer_line(generation)))
    last = answer_chunk(generation, handle, prepared, scope, reader, model=call.model or engine.model_path)
    yield _announced(last, scope)


def _announced(last: AIMessageChunk, scope: Scope) -> AIMessageChunk:
    """The chunk that ends a message, after the graph's stream was told how its context reached it."""
    stream_handoff(last.response_metadata[METADATA_KEY], scope.agent)
    return last


def _preparation(engine: Engine, messages: Sequence[BaseMessage], call: Call, scope: Scope) -> Preparation:
    turns = read_messages(messages)
    return prepare(
        turns,
        call.avp_context,
        store=engine.store,
        scope=scope,
        on_missing=call.on_missing,
        template=call.chat_template_kwargs,
    )


def _constrained(
    prompt: list[Message], call: Call, engine: Engine, scope: Scope
) -> tuple[list[Message], GenerateOptions]:
    """The prompt with what is said about the answer's form, and the engine's options."""
    constraints = call.constraints
    options = cast("GenerateOptions", {**call.generate_options(scope.minted), **constraints.options(engine)})
    return [*prompt, *constraints.instruction], options


def _label(scope: Scope, line: str) -> dict[str, Any]:
    """Where a context is put, and what people read beside its handle."""
    return {"scope": scope.minted, "agent": scope.agent, "text": line}
