"""One exchange with an engine: think, answer, or both; keep the context; and say how it went.

A turn's metadata, which every framework shows somewhere:

    mode, reason, notes                         the rung of the handoff ladder, why, and what else was decided
    bytes, milliseconds                         what the handoff moved and took
    positions_reused, positions_replayed        positions of the context that were there, and that were prefilled again
    latent_steps, tokens_decoded                what this turn itself did
    tokens_not_decoded                          latent positions that it was handed: work that nobody decoded to text
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from avp_agents.agent.ladder import Ladder, OnMissing, Prepared, prepare
from avp_agents.agent.steps import Flow, Plan, Telling, ask
from avp_agents.agent.turns import HandedMessage, Scope
from avp_agents.answer import Delta, TextDelta
from avp_agents.answer.generation import Chunk, Generation
from avp_agents.answer.options import GenerateOptions, ThinkOptions
from avp_agents.answer.tool_calls import ToolCallParser
from avp_agents.answer.tool_format import ToolDefinition
from avp_agents.context import Context, LatentSegment
from avp_agents.engine.protocol import Engine
from avp_agents.handle import ContextHandle
from avp_agents.prompt.chat_messages import Message
from avp_agents.usage import Handoff, Usage

Out = TypeVar("Out")

_THINK_NAMES = {
    "latent_method": "method", "latent_k": "k", "chat_template_kwargs": "chat_template_kwargs", "timeout": "timeout",
}  # fmt: skip
"""The fields that latent steps have options for, and what the engine calls those."""


@dataclass(frozen=True)
class ThinkRequest:
    """Latent steps that are asked for.

    Attributes:
        steps: How many.
        options: For `Engine.think`.
    """

    steps: int
    options: ThinkOptions


@dataclass(frozen=True)
class AnswerRequest:
    """An answer that is asked for.

    Attributes:
        options: For `Engine.stream`.
        behind: What is said behind a thought, where there is one, before it is answered.
        is_aside: Behind a thought, it is for people only: the thought without it is handed on.
    """

    options: GenerateOptions
    behind: Sequence[Message] = ()
    is_aside: bool = False


@dataclass(frozen=True)
class Made:
    """What a turn made; a thought, an answer, or both.

    Attributes:
        context: What is handed on.
        usage: What it cost, thinking and decoding together.
        handoff: How the contexts that it builds on were used.
        thought: The thought.
        said: What was decoded.
        finish_reason: Why it ended.
    """

    context: Context
    usage: Usage
    handoff: Handoff
    thought: Context | None
    said: Generation | None
    finish_reason: str

    @property
    def text(self) -> str:
        """What was decoded; empty where nothing was."""
        return "" if self.said is None else self.said.text

    @property
    def steps(self) -> LatentSegment | None:
        """The latent steps that the context which is handed on ends in."""
        last = self.context.lineage[-1]
        return last if isinstance(last, LatentSegment) else None

    def thought_line(self, template: str, agent: str) -> str:
        """A line for people that stands for latent steps.

        Args:
            template: May name ``{agent}``, ``{steps}`` and ``{positions}``.
            agent: Who thought; may be empty.
        """
        steps = 0 if self.steps is None else len(self.steps)
        return template.format(agent=agent or "The model", steps=steps, positions=len(self.context))


def generate_options(values: Mapping[str, Any], source: str) -> GenerateOptions:
    """The options of an answer out of a chat model's fields, by name; those that are None are left out.

    Args:
        values: The fields. Tools are not read: what shows them also says how they are called.
        source: Who asks.
    """
    names = GenerateOptions.__annotations__.keys() - {"tools"}
    return GenerateOptions(**{name: values[name] for name in names if values.get(name) is not None}, source=source)


def think_options(values: Mapping[str, Any], source: str, tools: Sequence[ToolDefinition] = ()) -> ThinkOptions:
    """The options of latent steps, likewise; `tools` are those that the model is shown."""
    read = ((name, values.get(field)) for field, name in _THINK_NAMES.items())
    options = ThinkOptions(**{name: value for name, value in read if value is not None}, source=source)
    return {**options, "tools": tools} if tools else options


def settle(
    engine: Engine,
    turns: Sequence[HandedMessage],
    given: object = None,
    *,
    scope: Scope,
    on_missing: OnMissing,
    template: Mapping[str, Any] | None = None,
) -> Plan[Prepared]:
    """The prompt with every handle settled; arguments and errors as in `prepare`, which has nothing to do mostly."""
    if given is None and all(turn.handle is None and not turn.is_thought for turn in turns):
        return Prepared([turn.message for turn in turns], None)
    return (yield from prepare(Ladder(engine, scope, on_missing, template), turns, given))


def make(
    engine: Engine,
    prompt: list[Message],
    context: Context | None,
    thinking: ThinkRequest | None,
    answering: AnswerRequest | None,
    read: Callable[[Chunk], Iterable[Out]],
) -> Telling[Out, Made]:
    """Think on a prompt, answer it, or both, one behind the other.

    Args:
        engine: Who does.
        prompt: What is new to the context.
        context: What it builds on.
        thinking, answering: What is asked for; one of them at least.
        read: Takes each piece of the answer; what it returns is given out.

    Raises:
        AvpError: As the engine.
    """
    thought = said = None
    if thinking is not None:
        steps, options = thinking.steps, thinking.options
        thought = yield from ask(engine.think, engine.athink, prompt, steps=steps, context=context, **options)
    if answering is not None:
        if thought is not None:
            prompt, context = list(answering.behind), thought
        begin = partial(engine.stream, prompt, context=context, **answering.options)
        abegin = partial(engine.astream, prompt, context=context, **answering.options)
        last = yield from Flow(begin, abegin, read)
        said = last.generation
        assert said is not None, "an engine's stream ends with its generation"
    if thought is None:
        assert said is not None, "a turn thinks or answers"
        return Made(said.context, said.usage, said.handoff, None, said, said.finish_reason)
    usage, handoff = thought.usage or Usage(), thought.handoff or Handoff()
    if said is None:
        return Made(thought, usage, handoff, thought, None, "stop")
    usage = _together(usage, said.usage)
    if answering is not None and answering.is_aside:
        return Made(thought, usage, handoff, thought, said, "stop")
    return Made(said.context, usage, handoff, thought, said, said.finish_reason)


def put(engine: Engine, context: Context, scope: Scope, line: str) -> Plan[ContextHandle]:
    """Keep a context, and label it for people."""
    store = engine.store
    return (yield from ask(store.put, store.aput, context, scope=scope.minted, agent=scope.agent, text=line))


def describe(made: Made, prepared: Prepared) -> dict[str, Any]:
    """How a turn came about, as JSON data; see the module's summary."""
    mode, reason = prepared.rung(made.handoff)
    return made.handoff.to_metadata() | {
        "mode": mode,
        "reason": reason,
        "latent_steps": made.usage.latent_steps + prepared.latent_steps,
        "tokens_decoded": made.usage.completion_tokens,
        "tokens_not_decoded": made.context.latent_steps - (0 if made.thought is None else made.usage.latent_steps),
    }


def one_line(text: str) -> str:
    """A text as the line for people beside a handle."""
    return " ".join(text.split())


class AnswerReader:
    """Reads one answer while it is decoded, tool calls told from text.

    Args:
        parser: Where the answer may hold tool calls.

    Attributes:
        text: The answer's text so far; calls are not part of it.
        parser: See above.
    """

    def __init__(self, parser: ToolCallParser | None) -> None:
        self.parser = parser
        self.text = ""

    @property
    def calls(self) -> list[tuple[str, Any]]:
        """Names and arguments of the calls, those last that were cut off, whose arguments are text."""
        if self.parser is None:
            return []
        return [(call.name, call.arguments) for call in (*self.parser.calls, *self.parser.invalid_calls)]

    def deltas(self, piece: Chunk) -> list[Delta]:
        """What has become certain with a piece."""
        if self.parser is None:
            deltas: list[Delta] = [TextDelta(piece.text)] if piece.text else []
        else:
            deltas = self.parser.feed(piece.text)
            if piece.generation is not None:
                deltas += self.parser.finish()
        self.text += "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
        return deltas


def _together(thinking: Usage, decoding: Usage) -> Usage:
    """The cost of latent steps and of what was decoded behind them: one prompt, read once."""
    return replace(
        thinking,
        completion_tokens=decoding.completion_tokens,
        reasoning_tokens=decoding.reasoning_tokens,
        queue_seconds=thinking.queue_seconds + decoding.queue_seconds,
        prefill_seconds=thinking.prefill_seconds + decoding.prefill_seconds,
        decode_seconds=decoding.decode_seconds,
    )
