"""What a tool is to a model: a name, what it is for, and the JSON schema of its arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from avp_agents.answer.tool_format import ToolDefinition
from avp_agents.errors import ConfigurationError

_NAME = re.compile(r"[\w.:-]{1,128}")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_VALUES = ("const", "enum", "default", "examples")


@dataclass(frozen=True)
class ToolSpec:
    """A tool that a model may call.

    Attributes:
        name: Letters, digits, ``_``, ``-``, ``.`` and ``:``.
        description: What it is for; the model reads it.
        parameters: The JSON schema of its arguments, which are a JSON object.
        strict: Refuse a schema that cannot be enforced as a whole, instead of leaving out what cannot.

    Raises:
        ConfigurationError: The name or the schema is malformed.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ConfigurationError(
                f"A tool cannot be called {self.name!r}: use up to 128 letters, digits, '_', '-', '.' and ':'."
            )
        if not isinstance(self.parameters, Mapping) or self.parameters.get("type", "object") != "object":
            raise ConfigurationError(f"The parameters of tool {self.name!r} must be the JSON schema of an object.")

    @classmethod
    def from_definition(cls, definition: ToolDefinition) -> ToolSpec:
        """The tool of a definition as OpenAI's API and chat templates take it; titles in its schema are left out.

        Args:
            definition: ``{"type": "function", "function": {...}}``, or the inner dict.

        Raises:
            ConfigurationError: It is malformed.
        """
        function = definition.get("function", definition) if isinstance(definition, Mapping) else None
        if not isinstance(function, Mapping) or "name" not in function:
            raise ConfigurationError(
                f"Not a tool: {definition!r}. Pass {{'type': 'function', 'function': {{'name': ..., 'parameters': "
                "{...}}}."
            )
        return cls(
            name=function["name"],
            description=function.get("description") or "",
            parameters=_untitled(function.get("parameters") or {"type": "object", "properties": {}}),
            strict=bool(function.get("strict", False)),
        )

    def definition(self) -> ToolDefinition:
        """As chat templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def _untitled(schema: Any, *, is_map: bool = False) -> Any:
    """A schema without the titles that pydantic writes: they repeat the names.

    Args:
        schema: A schema or a part of one.
        is_map: Its keys are names, not keywords.
    """
    if isinstance(schema, list):
        return [_untitled(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: value if key in _VALUES and not is_map else _untitled(value, is_map=key in _MAPS and not is_map)
        for key, value in schema.items()
        if is_map or key != "title" or not isinstance(value, str)
    }
