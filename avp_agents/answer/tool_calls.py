"""Reading tool calls out of an answer while it is decoded.

Small models also write a call without the marks of their format: the whole answer is a JSON object with ``name`` and
``arguments``, perhaps in a fence of backticks. Where the model was free to choose, that is read as the call it means.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from avp_agents.answer.tool_format import ToolFormat


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """A piece of a call: the first one has its id and name, the others pieces of its arguments' JSON.

    Attributes:
        index: Which of the answer's calls.
        id, name: Of the call; None behind its first piece.
        arguments: JSON text that follows the earlier pieces'.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


Delta = TextDelta | CallDelta


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class InvalidToolCall:
    """A call that was cut off, by `max_tokens` or a stop string: its arguments as far as they go, and why not."""

    id: str
    name: str
    arguments: str
    error: str


@dataclass
class _Begun:
    """A call whose name is known."""

    name: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")
    arguments: str = ""


_Place = Literal["start", "text", "name", "arguments", "behind", "end"]

_FENCES = ("", "```json", "```")
_ARGUMENTS = ("arguments", "parameters")


class ToolCallParser:
    """Splits one answer into its text and its calls, piece by piece. What was given out is never taken back.

    Args:
        tool_format: How the model writes calls.
        unmarked: Names of tools whose calls are recognised without the format's marks, at the answer's start.

    Attributes:
        text: The text given out so far.
    """

    def __init__(self, tool_format: ToolFormat, unmarked: Collection[str] = ()) -> None:
        self._format = tool_format
        self._begin = tool_format.begin.text
        self._lead = (tool_format.joint or "") + self._begin
        self._held = ""
        self._unmarked = {
            f'{fence}{{"name":"{name}","{key}":': name for fence in _FENCES for name in unmarked for key in _ARGUMENTS
        }
        self._place: _Place = "start" if unmarked else "text"
        self._value = _JsonEnd()
        self._begun: list[_Begun] = []
        self.text = ""

    @property
    def calls(self) -> list[ToolCall]:
        """The calls that are complete."""
        read = ((call, _read(call.arguments)) for call in self._begun)
        return [ToolCall(call.id, call.name, value) for call, value in read if isinstance(value, dict)]

    @property
    def invalid_calls(self) -> list[InvalidToolCall]:
        """The calls that were cut off."""
        read = ((call, _read(call.arguments)) for call in self._begun)
        return [
            InvalidToolCall(call.id, call.name, call.arguments, value) for call, value in read if isinstance(value, str)
        ]

    def feed(self, piece: str) -> list[Delta]:
        """Take the next piece of the answer; returns what has become certain."""
        self._held += piece
        return self._advance(last=False)

    def finish(self) -> list[Delta]:
        """No more will come; returns what was held back."""
        return self._advance(last=True)

    def _advance(self, *, last: bool) -> list[Delta]:
        deltas: list[Delta] = []
        while self._held and self._place != "end":
            before = (self._place, self._held)
            deltas += getattr(self, f"_take_{self._place}")(last)
            if (self._place, self._held) == before:
                break
        return [delta for delta in deltas if delta != TextDelta("")]

    def _take_start(self, last: bool) -> list[Delta]:
        written = "".join(self._held.split())
        beginning = next((beginning for beginning in self._unmarked if written.startswith(beginning)), None)
        if beginning is not None:
            self._held = _behind_visible(self._held, len(beginning))
            return self._begin_call(self._unmarked[beginning])
        if last or not any(beginning.startswith(written) for beginning in self._unmarked):
            self._place = "text"
        return []

    def _take_text(self, last: bool) -> list[Delta]:
        start = self._held.find(self._begin)
        if start >= 0:
            text = self._held[:start].removesuffix(self._format.joint or "")
            self._held, self._place = self._held[start + len(self._begin) :], "name"
            return [self._said(text)]
        certain = len(self._held) if last else len(self._held) - _begun(self._held, self._lead, self._begin)
        text, self._held = self._held[:certain], self._held[certain:]
        return [self._said(text)]

    def _take_name(self, last: bool) -> list[Delta]:
        name, found, rest = self._held.partition(self._format.middle.text)
        if not found:
            return []
        self._held = rest
        return self._begin_call(name)

    def _take_arguments(self, last: bool) -> list[Delta]:
        end = self._value.find(self._held)
        piece = self._held if end is None else self._held[:end]
        self._held = self._held[len(piece) :]
        if end is not None:
            self._place = "behind"
        self._begun[-1].arguments += piece
        return [CallDelta(len(self._begun) - 1, arguments=piece)] if piece else []

    def _take_behind(self, last: bool) -> list[Delta]:
        between = self._format.between
        if between is not None and self._held.startswith(between.text):
            self._held, self._place = self._held[len(between.text) :], "name"
        elif last or between is None or not between.text.startswith(self._held):
            self._held, self._place = "", "end"
        return []

    def _begin_call(self, name: str) -> list[Delta]:
        call = _Begun(name)
        self._begun.append(call)
        self._place, self._value = "arguments", _JsonEnd()
        return [CallDelta(len(self._begun) - 1, call.id, name)]

    def _said(self, text: str) -> TextDelta:
        self.text += text
        return TextDelta(text)


class _JsonEnd:
    """Finds where a JSON object ends, piece by piece."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def find(self, piece: str) -> int | None:
        """How much of the piece belongs to the object; None if it does not end in it."""
        for i, character in enumerate(piece):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return i + 1
        return None


def _behind_visible(text: str, count: int) -> str:
    """What follows the first `count` characters that are not white space, and the white space behind them."""
    visible = [i for i, character in enumerate(text) if not character.isspace()]
    return text[visible[count - 1] + 1 :].lstrip()


def _read(arguments: str) -> dict[str, Any] | str:
    """The arguments, or why they are none."""
    try:
        value = json.loads(arguments)
    except ValueError as error:
        return f"The call was cut off, its arguments are not valid JSON: {error}"
    return value if isinstance(value, dict) else "The arguments are not a JSON object."


def _begun(text: str, *markers: str) -> int:
    """Length of the longest end of `text` that begins one of the markers."""
    longest = min(len(text), max(map(len, markers)) - 1)
    return next((n for n in range(longest, 0, -1) if any(marker.startswith(text[-n:]) for marker in markers)), 0)
