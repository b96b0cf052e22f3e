"""One call of a chat model, as LangChain's message chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from langchain_core.messages import AIMessageChunk, BaseMessage

from avp_agents.agent.exchange import AnswerRequest, ThinkRequest, make, one_line, put
from avp_agents.agent.ladder import Ladder, prepare
from avp_agents.agent.steps import Telling, in_thread
from avp_agents.agent.turns import Scope
from avp_agents.engine.protocol import Engine
from avp_langgraph.answers import THOUGHT_LINE, last_chunk
from avp_langgraph.calls import Call
from avp_langgraph.events import stream_handoff
from avp_langgraph.messages import METADATA_KEY, read_messages
from avp_langgraph.tool_calling import message_chunks


def chunks(
    engine_for: Callable[[str | None], Engine], messages: Sequence[BaseMessage], call: Call, scope: Scope
) -> Telling[AIMessageChunk, None]:
    """The answer to `messages`, piece by piece; the last piece has usage and metadata.

    Args:
        engine_for: Looks up the engine of a model; may take long.
        messages: The conversation.
        call: What is asked for.
        scope: Where handles are minted and honoured.

    Raises:
        AvpError: As the engine and its store.
    """
    engine = yield from in_thread(engine_for, call.model)
    ladder = Ladder(engine, scope, call.on_missing, call.chat_template_kwargs)
    prepared = yield from prepare(ladder, read_messages(messages), call.avp_context)
    constraints = call.constraints
    reader = constraints.reader(engine)
    thinking = answering = None
    prompt = prepared.prompt
    if call.mode == "latent":
        thinking = ThinkRequest(call.latent_steps, call.think_options(scope.minted))
    else:
        answering = AnswerRequest({**call.generate_options(scope.minted), **constraints.options(engine)})
        prompt = [*prompt, *constraints.instruction]
    read = partial(message_chunks, reader)
    made = yield from make(engine, prompt, prepared.context, thinking, answering, read)
    line = made.thought_line(THOUGHT_LINE, scope.agent) if made.said is None else one_line(made.text)
    handle = yield from put(engine, made.context, scope, line)
    last = last_chunk(made, prepared, handle, scope, reader, line, model=call.model or engine.model_path)
    stream_handoff(last.response_metadata[METADATA_KEY], scope.agent)
    yield last
