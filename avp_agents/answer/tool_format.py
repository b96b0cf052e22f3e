"""How a model writes tool calls, and how it is shown its tools.

A chat template that renders tools and calls has a format of its own, which is read off what it renders for a trial
conversation. So an answer that was decoded in that format is rendered again exactly as it was written. Models whose
template knows no tools (or writes calls otherwise than as name and JSON arguments) get the generic format:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>

with the tools in a system message, and each result in a user message (``Result of get_weather:``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from avp_agents.answer.grammar import lark_pattern

ToolDefinition = Mapping[str, Any]
"""As templates take it: ``{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}``."""

Pieces = Sequence[tuple[str, int | None]]
"""Text and, where a piece is a control token, its id."""


@dataclass(frozen=True)
class Markup:
    """A fixed piece of a format: as it stands in an answer, and as an expression of a lark grammar."""

    text: str
    lark: str


@dataclass(frozen=True)
class ToolFormat:
    """``begin name middle arguments (between name middle arguments)* end``, behind a text or alone.

    Attributes:
        begin, middle, end: What stands before the first name, between name and arguments, and behind the last.
        between: What stands between two calls; None where an answer holds one call at most.
        joint: What stands between a text and the calls behind it; None where an answer holds only one of both.
        head, rest: `begin` in two parts, behind any text: a lark rule ``head``, up to what betrays a call (the first
            control token or line), and an expression for what follows that.
        text: A lark terminal for text that holds no call.
        is_native: The model's own chat template shows tools and renders calls.
    """

    begin: Markup
    middle: Markup
    end: Markup
    between: Markup | None
    joint: str | None
    head: str
    rest: str
    text: str
    is_native: bool

    @classmethod
    def of(cls, begin: Pieces, middle: Pieces, end: Pieces, between: Pieces | None, joint: str | None) -> ToolFormat:
        """The format of a template that writes these pieces."""
        (first, control), *others = begin
        if control is not None:
            head, rest, text = f"head: /(?s:.*)/ <[{control}]>", others, "/(?s:.*)/"
        else:
            line, newline, remainder = first.partition("\n")
            head, rest = f"head[lazy]: /(?s:.*){lark_pattern(line)}/", [(newline + remainder, None), *others]
            text = f"/(?s:.*)/ & ~/(?s:.*){lark_pattern(line)}(?s:.*)/"
        return cls(
            begin=_markup(begin),
            middle=_markup(middle),
            end=_markup(end),
            between=_markup(between) if between is not None else None,
            joint=joint,
            head=head,
            rest=_lark(rest),
            text=text,
            is_native=True,
        )

    def calls_text(self, calls: Sequence[tuple[str, Any]]) -> str:
        """Calls, as names with their arguments, as the model writes them."""
        between = self.between or self.end
        written = [f"{name}{self.middle.text}{as_json(arguments)}" for name, arguments in calls]
        return f"{self.begin.text}{between.text.join(written)}{self.end.text}"

    def tools_text(self, tools: Sequence[ToolDefinition]) -> str:
        """What a system message says about the tools where no template does."""
        example = f"{self.begin.text}<function name>{self.middle.text}<arguments as a JSON object>{self.end.text}"
        definitions = "\n".join(map(as_json, tools))
        return (
            "# Tools\n\nYou may call functions to help with the user's request. Their signatures are:\n"
            f"<tools>\n{definitions}\n</tools>\n\nTo call a function, answer with:\n{example}"
        )


def _markup(pieces: Pieces) -> Markup:
    return Markup("".join(text for text, _ in pieces), _lark(pieces))


def _lark(pieces: Pieces) -> str:
    return " ".join(json.dumps(text) if control is None else f"<[{control}]>" for text, control in pieces if text)


def as_json(value: Any) -> str:
    """As templates write it."""
    return json.dumps(value, ensure_ascii=False)


_OPENING, _CLOSING = '<tool_call>\n{"name": "', "}\n</tool_call>"

GENERIC = replace(
    ToolFormat.of(
        begin=[(_OPENING, None)],
        middle=[('", "arguments": ', None)],
        end=[(_CLOSING, None)],
        between=[(f"{_CLOSING}\n{_OPENING}", None)],
        joint="\n",
    ),
    is_native=False,
)
"""The generic format, in plain text also where the tokenizer has such control tokens: message content is data."""
