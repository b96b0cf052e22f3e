"""Which tools a model may or must call, as options for one request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from avp_agents.answer.grammar import Grammar, lark_json
from avp_agents.answer.json_bounds import bounded_schema
from avp_agents.answer.options import GenerateOptions
from avp_agents.answer.tool_calls import ToolCallParser
from avp_agents.answer.tool_format import ToolFormat
from avp_agents.answer.tool_specification import ToolSpec
from avp_agents.errors import ConfigurationError

Choice = Literal["auto", "any", "none"]
"""The model chooses between text and calls; it must call; it must not."""

MAX_CALLS = 16
"""Calls in one answer."""


class ToolCalling:
    """The tools of one request.

    Args:
        tools: What the model is shown, under names of their own; a tool that is given twice is shown once.
        choice: Whether it may call them.
        only: With ``"any"``, the name of the one tool that it must call.
        parallel: Whether an answer may hold several calls. By default it may where the model chooses freely, and holds
            one where a call is forced.
        answer: The JSON schema of answers without calls; None for text.

    Raises:
        ConfigurationError: There are no tools, two of one name, or none called `only`.

    Example:
        >>> calling = ToolCalling([ToolSpec("add", "Adds.", {"type": "object", "properties": {...}})], choice="any")
        >>> engine.generate("3 + 4?", **calling.options(engine.tool_format)).text
        '<tool_call>\\n{"name": "add", "arguments": {"a": 3, "b": 4}}\\n</tool_call>'
    """

    def __init__(
        self,
        tools: Sequence[ToolSpec],
        *,
        choice: Choice = "auto",
        only: str | None = None,
        parallel: bool | None = None,
        answer: Mapping[str, Any] | None = None,
    ) -> None:
        different = [tool for i, tool in enumerate(tools) if tool not in tools[:i]]
        names = [tool.name for tool in different]
        if not names:
            raise ConfigurationError("There are no tools to call; pass at least one.")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigurationError(f"Two tools are called {twice[0]!r}; give them different names.")
        if only is not None and only not in names:
            raise ConfigurationError(f"There is no tool {only!r} to call; the tools are {', '.join(names)}.")
        self.tools, self.choice, self.only = tuple(different), choice, only
        self.parallel = choice == "auto" if parallel is None else parallel
        self.answer = answer

    @classmethod
    def chosen(cls, tools: Sequence[ToolSpec], tool_choice: object = None, **options: Any) -> ToolCalling:
        """The tools with a choice as the frameworks and OpenAI's API spell it.

        Args:
            tools: What the model is shown.
            tool_choice: None, False or ``"auto"``; ``"any"``, ``"required"`` or True; ``"none"``; a tool's name; or
                ``{"type": "function", "function": {"name": ...}}``, or ``{"name": ...}``.
            **options: ``parallel`` and ``answer`` as in the constructor.

        Raises:
            ConfigurationError: As the constructor, and where the choice is malformed.
        """
        names = [tool.name for tool in tools]
        if isinstance(tool_choice, Mapping):
            return cls(tools, choice="any", only=_named(tool_choice), **options)
        if isinstance(tool_choice, str) and tool_choice in names:
            return cls(tools, choice="any", only=tool_choice, **options)
        if tool_choice in (None, False, "auto"):
            return cls(tools, **options)
        if tool_choice in (True, "any", "required"):
            return cls(tools, choice="any", **options)
        if tool_choice == "none":
            return cls(tools, choice="none", **options)
        raise ConfigurationError(
            f"tool_choice cannot be {tool_choice!r}: use 'auto', 'any', 'none', a bool, or one of {', '.join(names)}."
        )

    def options(self, tool_format: ToolFormat) -> GenerateOptions:
        """The options that show the tools to the model and keep its answer to text and valid calls."""
        return GenerateOptions(
            tools=[tool.definition() for tool in self.tools],
            grammar=self.grammar(tool_format),
            skip_special_tokens=False,
        )

    def grammar(self, tool_format: ToolFormat) -> Grammar:
        """What an answer may be."""
        rules = ["%llguidance {}", *self._start(tool_format)]
        if self.choice != "none":
            called = [tool for tool in self.tools if self.only in (None, tool.name)]
            rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(called))))
            rules += [f"call_{i}: {_call(tool, tool_format)}" for i, tool in enumerate(called)]
        return Grammar.lark("\n".join(rules) + "\n")

    def parser(self, tool_format: ToolFormat) -> ToolCallParser:
        """Reads the answer."""
        is_free = self.choice == "auto" and self.answer is None
        return ToolCallParser(tool_format, [tool.name for tool in self.tools] if is_free else ())

    def _start(self, tool_format: ToolFormat) -> list[str]:
        more = tool_format.between
        others = f"({more.lark} call){{0,{MAX_CALLS - 1}}}" if self.parallel and more is not None else ""
        calls = f"call {others} {tool_format.end.lark}"
        alone = f"{tool_format.begin.lark} {calls}"
        if self.choice == "any":
            return [f"start: {alone}"]
        answer = lark_json(bounded_schema(self.answer)) if self.answer is not None else None
        rules = [f"answer: {answer or 'TEXT'}"] + ([] if answer else [f"TEXT: {tool_format.text}"])
        if self.choice == "none":
            return ["start: answer", *rules]
        if tool_format.joint is None or answer:
            return [f"start: answer | {alone}", *rules]
        return [f"start: answer | head {tool_format.rest} {calls}", *rules, tool_format.head]


def _call(tool: ToolSpec, tool_format: ToolFormat) -> str:
    arguments = lark_json(bounded_schema(tool.parameters), strict=tool.strict)
    return f"{json.dumps(tool.name)} {tool_format.middle.lark} {arguments}"


def _named(tool_choice: Mapping[str, Any]) -> str:
    function = tool_choice.get("function", tool_choice)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise ConfigurationError(
            f"tool_choice cannot be {dict(tool_choice)!r}: use {{'type': 'function', 'function': {{'name': ...}}}}."
        )
    return name
