"""The form that CrewAI wants an answer in: text, structured output, or text or tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from crewai.agents.parser import AgentFinish
from crewai.events.types.llm_events import LLMCallType
from crewai.utilities.agent_utils import format_answer
from pydantic import BaseModel, ValidationError

from avp_agents.agent.exchange import AnswerReader
from avp_agents.answer import (
    InvalidToolCall,
    TextDelta,
    ToolCall,
    ToolCalling,
    ToolCallParser,
    ToolSpec,
    json_grammar,
    json_instruction,
)
from avp_agents.answer.generation import Chunk
from avp_agents.answer.options import GenerateOptions
from avp_agents.answer.tool_format import ToolDefinition
from avp_agents.engine.protocol import Engine
from avp_agents.errors import ConfigurationError, EngineError
from avp_agents.prompt.chat_messages import Message
from avp_crewai.messages import Answer


class UnusableAnswerError(EngineError, ValueError):
    """The model's JSON is not what CrewAI asked for: the response model refuses it, or it was cut off."""


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        value: What CrewAI gets: text, an instance of the response model, or tool calls.
        answer: The same as CrewAI will quote it in later messages.
        outputs: The task outputs that CrewAI may make of it.
    """

    value: Any
    answer: Answer
    outputs: frozenset[str]

    @property
    def call_type(self) -> LLMCallType:
        """What CrewAI's events call it."""
        return LLMCallType.TOOL_CALL if self.answer.tool_calls else LLMCallType.LLM_CALL


@dataclass(frozen=True)
class ReplyForm:
    """What an answer may be.

    Args:
        tools: Tools in OpenAI's form that the model may call.
        response_model: The answer is an instance of this model.

    Raises:
        ConfigurationError: Both were given, or a tool is malformed.
    """

    tools: Sequence[dict[str, Any]] = ()
    response_model: type[BaseModel] | None = None

    def __post_init__(self) -> None:
        if self.tools and self.response_model is not None:
            raise ConfigurationError("A call can have tools or a response_model, not both; leave out one.")

    @property
    def is_text(self) -> bool:
        """Whether the answer is free text."""
        return not self.tools and self.response_model is None

    @property
    def definitions(self) -> list[ToolDefinition]:
        """The tools as the engine shows them to the model."""
        return [] if self._calling is None else [spec.definition() for spec in self._calling.tools]

    def instructed(self, messages: list[Message]) -> list[Message]:
        """The messages, with the response model's schema where CrewAI did not write it into them."""
        if self.response_model is None:
            return messages
        return [{"role": "system", "content": json_instruction(self.response_model.model_json_schema())}, *messages]

    def constrain(self, options: GenerateOptions, engine: Engine) -> GenerateOptions:
        """The options under which only such an answer is decoded; the tools are still to be shown (`definitions`)."""
        if self.response_model is not None:
            return {**options, "grammar": json_grammar(self.response_model.model_json_schema())}
        if self._calling is None:
            return options
        constrained = self._calling.options(engine.tool_format)
        constrained.pop("tools", None)
        return {**options, **constrained}

    def reader(self, engine: Engine) -> ReplyReader:
        """Reads such an answer, piece by piece."""
        return ReplyReader(self, None if self._calling is None else self._calling.parser(engine.tool_format))

    @cached_property
    def _calling(self) -> ToolCalling | None:
        if not self.tools:
            return None
        # CrewAI marks every tool as strict, those too whose schemas cannot be enforced as a whole
        return ToolCalling([replace(ToolSpec.from_definition(tool), strict=False) for tool in self.tools])


class ReplyReader(AnswerReader):
    """Reads one answer while it is decoded.

    Args:
        form: What it may be.
        parser: Splits text and tool calls, where there are tools.
    """

    def __init__(self, form: ReplyForm, parser: ToolCallParser | None) -> None:
        super().__init__(parser)
        self._form = form
        self._begun: dict[int, dict[str, Any]] = {}

    def told(self, piece: Chunk) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """What CrewAI's stream is told of the next piece: text, or the arguments so far of a tool call."""
        for delta in self.deltas(piece):
            if isinstance(delta, TextDelta):
                yield delta.text, None
                continue
            call = self._begun.setdefault(
                delta.index,
                {"id": delta.id, "type": "function", "index": delta.index,
                 "function": {"name": delta.name, "arguments": ""}},
            )  # fmt: skip
            call["function"]["arguments"] += delta.arguments
            yield delta.arguments, {**call, "function": dict(call["function"])}

    def reply(self, text: str) -> Reply:
        """What the whole answer says.

        Args:
            text: The answer, or the readable line of an agent that only thought.

        Raises:
            UnusableAnswerError: The response model refuses it, or `max_tokens` cut a tool call off.
        """
        if self._form.response_model is not None:
            return _structured(text, self._form.response_model)
        if self.parser is None:
            return _free_text(text)
        if self.parser.invalid_calls:
            raise _cut_off(self.parser.invalid_calls[0])
        return _called(self.parser.calls) if self.parser.calls else _free_text(self.text)


def _free_text(text: str) -> Reply:
    outputs = {text.strip()}
    parsed = format_answer(text)
    if isinstance(parsed, AgentFinish) and isinstance(parsed.output, str):
        outputs.add(parsed.output.strip())
    return Reply(text, Answer(text), frozenset(outputs))


def _structured(text: str, response_model: type[BaseModel]) -> Reply:
    try:
        value = response_model.model_validate_json(text)
    except ValidationError as error:
        raise UnusableAnswerError(
            f"The model's JSON is no {response_model.__name__}: {error}. Let the schema say what is allowed "
            "(patterns, ranges, enums), since validators of your own cannot be followed while decoding; and leave "
            "enough max_tokens."
        ) from error
    return Reply(value, Answer(text), frozenset({text.strip(), value.model_dump_json()}))


def _called(calls: Sequence[ToolCall]) -> Reply:
    value = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for call in calls
    ]
    answer = Answer("", tuple((call.name, call.arguments) for call in calls))
    return Reply(value, answer, frozenset())


def _cut_off(call: InvalidToolCall) -> UnusableAnswerError:
    return UnusableAnswerError(f"The call of tool {call.name!r} was cut off ({call.error}). Raise max_tokens.")
