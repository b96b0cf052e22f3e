"""One call of a chat model: what it asks for, on whose behalf, and what comes back, in LangChain's messages.

The scope comes from the config of the running graph alone. Messages and state cannot choose it: they can be edited.

``response_metadata["avp"]`` is the turn's metadata (`avp_agents.agent.exchange`), and beside it

    content     a digest of the message's content, so that an edit is noticed
    think       only on messages that stand for latent steps: how those were made
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, get_args

from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.runnables.config import ensure_config

from avp_agents.agent.exchange import (
    AnswerReader,
    AnswerRequest,
    Made,
    ThinkRequest,
    describe,
    generate_options,
    make,
    one_line,
    put,
    settle,
    think_options,
)
from avp_agents.agent.ladder import OnMissing, Prepared
from avp_agents.agent.settings import AgentSettings, Mode
from avp_agents.agent.steps import Telling, in_thread
from avp_agents.agent.turns import Scope, content_digest, source_note
from avp_agents.answer import TextDelta
from avp_agents.answer.generation import Chunk, TokenLogprob
from avp_agents.answer.options import GenerateOptions, ThinkOptions
from avp_agents.engine.protocol import Engine
from avp_agents.errors import ConfigurationError
from avp_agents.handle import ContextHandle
from avp_agents.usage import Usage
from avp_langgraph.events import stream_handoff
from avp_langgraph.messages import DIGEST_KEY, HANDLE_KEY, METADATA_KEY, REASONING_KEY, THINK_KEY, read_messages
from avp_langgraph.tool_calling import Constraints

ScopePolicy = Literal["thread", "user", "open"]

PROVIDER = "avp"
THOUGHT_LINE = "{agent} thought for {steps} latent steps ({positions} positions)"
"""The line for people that stands for latent steps."""
_USER_KEYS = ("user_id", "langgraph_auth_user_id")

# What LangChain passes along that asks nothing of a local model: `stream` chose the method that was called.
_IGNORED = frozenset({"stream"})


class Call(AgentSettings):
    """One call's options.

    Attributes:
        model: Name or folder of the model; None is the default model.
        max_tokens, logprobs, stop, chat_template_kwargs: The engine's options of the same names.
        avp_context: The handle of a context to answer on.
        tools, tool_choice, parallel_tool_calls, response_format: See `Constraints`.
    """

    model: str | None
    max_tokens: int | None
    logprobs: int | None
    stop: Sequence[str] | None
    chat_template_kwargs: Mapping[str, Any] | None
    avp_context: object = None
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: object = None
    parallel_tool_calls: bool | None = None
    response_format: Mapping[str, Any] | None = None

    def overridden(self, stop: Sequence[str] | None, options: Mapping[str, Any]) -> Call:
        """The call with the options that it was made with.

        Raises:
            ConfigurationError: An option is unknown, or out of range.
        """
        given = {name: value for name, value in options.items() if name not in _IGNORED}
        known = Call.model_fields.keys() - {"engine", "engine_options"}
        if unknown := sorted(given.keys() - known):
            raise ConfigurationError(f"Unknown option {unknown[0]!r}; a call knows {', '.join(sorted(known))}.")
        call = self.model_copy(update=given | ({} if stop is None else {"stop": stop}))
        if call.mode not in get_args(Mode):
            raise ConfigurationError(f"mode must be 'text' or 'latent', not {call.mode!r}.")
        if call.on_missing not in get_args(OnMissing):
            raise ConfigurationError(f"on_missing must be 'text' or 'error', not {call.on_missing!r}.")
        if call.latent_steps < 1:
            raise ConfigurationError(f"latent_steps must be at least 1, not {call.latent_steps}.")
        return call

    @property
    def constraints(self) -> Constraints | None:
        """What the answer may be; None where that is any text.

        Raises:
            ConfigurationError: The tools, the choice or the format are malformed.
        """
        if not self.tools and self.tool_choice is None and self.response_format is None:
            return None
        return Constraints(self.tools, self.tool_choice, self.parallel_tool_calls, self.response_format)

    def generate_options(self, source: str) -> GenerateOptions:
        """For `Engine.generate` and `Engine.stream`; without what `constraints` adds."""
        return generate_options(vars(self), source)

    def think_options(self, source: str) -> ThinkOptions:
        """For `Engine.think`."""
        constraints = self.constraints
        return think_options(vars(self), source, () if constraints is None else constraints.definitions)


def current_scope(policy: ScopePolicy) -> Scope:
    """The scope of the run that is going on.

    Args:
        policy: ``"thread"`` is the config's ``thread_id``; a run without one (no checkpointer, or no graph at all)
            shares its scope with other such runs. ``"user"`` is the config's ``user_id``, or the user that the
            LangGraph server authenticated. ``"open"`` honours every handle of the namespace.

    Raises:
        ConfigurationError: The policy is ``"user"`` and the config names no user.
    """
    config = ensure_config()
    configurable = config.get("configurable", {})
    agent = str(config.get("metadata", {}).get("langgraph_node", ""))
    if policy == "open":
        return Scope(minted="", honoured=None, agent=agent)
    name = _thread(configurable) if policy == "thread" else _user(configurable)
    return Scope(minted=name, honoured=name, agent=agent)


def thread_scope(thread_id: object) -> str:
    """The scope of a thread."""
    return f"thread:{thread_id}"


def _thread(configurable: Mapping[str, Any]) -> str:
    thread = configurable.get("thread_id")
    return "" if thread is None else thread_scope(thread)


def _user(configurable: Mapping[str, Any]) -> str:
    for key in _USER_KEYS:
        if user := configurable.get(key):
            return f"user:{user}"
    raise ConfigurationError(
        "scope='user' needs to know the user: pass config={'configurable': {'user_id': ...}} when you run the graph."
    )


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
    prepared = yield from settle(
        engine,
        read_messages(messages),
        call.avp_context,
        scope=scope,
        on_missing=call.on_missing,
        template=call.chat_template_kwargs,
    )
    constraints = call.constraints
    reader = AnswerReader(None if constraints is None else constraints.parser(engine))
    thinking = answering = None
    prompt, options = prepared.prompt, call.generate_options(scope.minted)
    if call.mode == "latent":
        thinking = ThinkRequest(call.latent_steps, call.think_options(scope.minted))
    elif constraints is None:
        answering = AnswerRequest(options)
    else:
        answering = AnswerRequest({**options, **constraints.options(engine)})
        prompt = [*prompt, *constraints.instruction]
    read = partial(message_chunks, reader)
    made = yield from make(engine, prompt, prepared.context, thinking, answering, read)
    line = made.thought_line(THOUGHT_LINE, scope.agent) if made.said is None else one_line(made.text)
    handle = yield from put(engine, made.context, scope, line)
    last = last_chunk(made, prepared, handle, scope, reader, line, model=call.model or engine.model_path)
    stream_handoff(last.response_metadata[METADATA_KEY], scope.agent)
    yield last


def message_chunks(reader: AnswerReader, piece: Chunk) -> Iterator[AIMessageChunk]:
    """The message chunks that have become certain with a piece of an answer."""
    if piece.reasoning:
        yield AIMessageChunk(content="", additional_kwargs={REASONING_KEY: piece.reasoning})
    for delta in reader.deltas(piece):
        if isinstance(delta, TextDelta):
            yield AIMessageChunk(content=delta.text)
        else:
            part = tool_call_chunk(name=delta.name, args=delta.arguments, id=delta.id, index=delta.index)
            yield AIMessageChunk(content="", tool_call_chunks=[part])


def last_chunk(
    made: Made,
    prepared: Prepared,
    handle: ContextHandle,
    scope: Scope,
    reader: AnswerReader,
    line: str,
    *,
    model: str,
) -> AIMessageChunk:
    """The chunk that ends a message: of an answer no text, all the rest; of a thought its line for people, too."""
    steps = made.steps if made.said is None else None
    told = describe(made, prepared)
    finish_reason, source = made.finish_reason, ""
    if steps is not None:
        told |= {DIGEST_KEY: content_digest(line), THINK_KEY: asdict(steps.recipe)}
        source = source_note(prepared.prompt, steps.recipe) if prepared.context is None else ""
    else:
        told[DIGEST_KEY] = content_digest(reader.text, reader.calls)
        finish_reason = "tool_calls" if reader.calls and finish_reason == "stop" else finish_reason
    metadata = {
        "model_name": shown_name(model),
        "model_provider": PROVIDER,
        "finish_reason": finish_reason,
        HANDLE_KEY: handle.labelled(agent=scope.agent, text=line, source=source).to_state(),
        METADATA_KEY: told,
    }
    if made.said is not None and made.said.logprobs is not None:
        metadata["logprobs"] = {"content": [_logprob(token) for token in made.said.logprobs]}
    return AIMessageChunk(
        content=line if steps is not None else "",
        usage_metadata=_usage(made.usage, prepared),
        response_metadata=metadata,
        chunk_position="last",
    )


def shown_name(model: str) -> str:
    """A model's name for metadata: of a folder its last part, since paths do not belong into graph state."""
    return os.path.basename(os.path.normpath(model)) if os.path.isabs(model) else model


def _usage(usage: Usage, prepared: Prepared) -> UsageMetadata:
    """LangChain's counts. As everywhere in LangChain, the output includes the reasoning: latent steps, and thoughts."""
    latent_steps = usage.latent_steps + prepared.latent_steps
    output = usage.completion_tokens + latent_steps
    return {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": output,
        "total_tokens": usage.prompt_tokens + output,
        "input_token_details": {"cache_read": usage.positions_reused},
        "output_token_details": {"reasoning": latent_steps + usage.reasoning_tokens},
    }


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.text,
        "token_id": token.token_id,
        "logprob": token.logprob,
        "top_logprobs": [{"token_id": token_id, "logprob": logprob} for token_id, logprob in token.top],
    }
