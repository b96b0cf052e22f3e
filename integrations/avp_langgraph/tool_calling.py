"""Tools and response formats of one call, and the answer to them as LangChain's message chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from avp_agents.answer import ToolCalling, ToolSpec, json_grammar, json_instruction
from avp_agents.answer.options import GenerateOptions
from avp_agents.answer.tool_calls import ToolCallParser
from avp_agents.engine.protocol import Engine
from avp_agents.errors import ConfigurationError
from avp_agents.prompt.chat_messages import Message

Tool = dict[str, Any] | type | Callable[..., Any] | BaseTool

_ANY_OBJECT: dict[str, Any] = {"type": "object"}


def tool_definitions(tools: Sequence[Tool], *, strict: bool | None = None) -> list[dict[str, Any]]:
    """Tools of any kind that LangChain knows, as JSON data.

    Raises:
        ConfigurationError: One is malformed, or has no schema of its own (a hosted provider's built-in tool).
    """
    definitions = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
    for definition in definitions:
        ToolSpec.from_definition(definition)
    return definitions


class Constraints:
    """What an answer may be: text, calls of tools, JSON of a schema.

    Args:
        tools: Definitions of the tools that the model is shown, as `tool_definitions` makes them.
        tool_choice: Whether it calls them; see `ToolCalling.chosen`.
        parallel: Whether it may call several at once.
        response_format: ``{"type": "json_schema", "json_schema": {"schema": ..., "strict": ...}}``, or
            ``{"type": "json_object", "schema": ...}``, whose schema is not shown to the model; None is text.

    Raises:
        ConfigurationError: A tool, the choice, or the format is malformed.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: object,
        parallel: bool | None,
        response_format: Mapping[str, Any] | None,
    ) -> None:
        self._schema, self._strict, self._is_shown = _read_format(response_format)
        self.calling: ToolCalling | None = None
        if tools or tool_choice not in (None, False, "auto", "none"):
            specs = [ToolSpec.from_definition(tool) for tool in tools or ()]
            self.calling = ToolCalling.chosen(specs, tool_choice, parallel=parallel, answer=self._schema)

    @property
    def definitions(self) -> list[Mapping[str, Any]]:
        """The tools, as the engine shows them."""
        return [tool.definition() for tool in self.calling.tools] if self.calling is not None else []

    @property
    def instruction(self) -> list[Message]:
        """What is said behind the messages about the format of the answer."""
        if self._schema is None or not self._is_shown:
            return []
        return [{"role": "system", "content": json_instruction(self._schema)}]

    def options(self, engine: Engine) -> GenerateOptions:
        """The engine's options for it."""
        if self.calling is not None:
            return self.calling.options(engine.tool_format)
        if self._schema is not None:
            return GenerateOptions(grammar=json_grammar(self._schema, strict=self._strict))
        return GenerateOptions()

    def parser(self, engine: Engine) -> ToolCallParser | None:
        """Tells calls from text; None where there are none."""
        return None if self.calling is None else self.calling.parser(engine.tool_format)


def _read_format(response_format: Mapping[str, Any] | None) -> tuple[Mapping[str, Any] | None, bool, bool]:
    """The schema of the answer (None for text), whether it is strict, and whether the model is shown it."""
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if response_format is None or kind == "text":
        return None, False, False
    if kind == "json_object":
        return response_format.get("schema") or _ANY_OBJECT, False, False
    given = response_format.get("json_schema") if kind == "json_schema" else None
    if not isinstance(given, Mapping) or not isinstance(given.get("schema"), Mapping):
        raise ConfigurationError(
            f"response_format cannot be {response_format!r}: use {{'type': 'json_schema', 'json_schema': {{'schema': "
            "...}}, or {'type': 'json_object'}."
        )
    return given["schema"], bool(given.get("strict", False)), True
