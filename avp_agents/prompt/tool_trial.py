"""Reads a chat template's own format of tool calls off what it renders for trial conversations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from avp_agents.answer.tool_format import Pieces, ToolDefinition, ToolFormat, as_json
from avp_agents.prompt.encoder import PromptEncoder

Apply = Callable[[list[dict[str, Any]]], str]
"""Renders a conversation, with the trial tool, without opening a turn; raises `ValueError` where that is refused."""


@dataclass(frozen=True)
class Trial:
    """Reads a template's format off trial conversations.

    Args:
        apply: The template.
        encoder: The model's control tokens.
        is_end: Whether an id ends an assistant's turn.
        word: A word that no template holds, for a name.
    """

    apply: Apply
    encoder: PromptEncoder
    is_end: Callable[[int], bool]
    word: Callable[[str], str]

    def tool(self) -> ToolDefinition:
        """The trial tool."""
        arguments = {self.word("key"): {"type": "string", "description": self.word("meaning")}}
        parameters = {"type": "object", "properties": arguments, "required": [self.word("key")]}
        function = {"name": self.word("tool"), "description": self.word("purpose"), "parameters": parameters}
        return {"type": "function", "function": function}

    def read(self) -> ToolFormat | None:
        """The template's own format; None where it has none that can be read."""
        try:
            return self._read()
        except ValueError:
            return None

    def _read(self) -> ToolFormat | None:
        question = {"role": "user", "content": self.word("question")}
        shown = self.apply([question])
        if any(self.word(name) not in shown for name in ("tool", "purpose", "key")):
            return None
        words = self.word("said")
        header = self._answer(question, {"role": "assistant", "content": words}).partition(words)[0]
        one = self._answer(question, self._calls(1))
        parts = self._split(one, 1)
        if parts is None:
            return None
        lead, middle, end = parts
        begin = lead[_common(lead, header) :]
        if not begin or not middle or not end:
            return None
        between = self._between(question, lead, middle, end)
        begin_pieces, middle_pieces, end_pieces = map(self.encoder.pieces, (begin, middle, end))
        return ToolFormat.of(begin_pieces, middle_pieces, end_pieces, between, self._joint(question, begin))

    def _between(self, question: dict[str, Any], lead: str, middle: str, end: str) -> Pieces | None:
        try:
            parts = self._split(self._answer(question, self._calls(2)), 2)
        except ValueError:
            return None
        if parts is None or (parts[0], parts[1], parts[3], parts[4]) != (lead, middle, middle, end) or not parts[2]:
            return None
        return self.encoder.pieces(parts[2])

    def _joint(self, question: dict[str, Any], begin: str) -> str | None:
        words = self.word("said")
        try:
            answer = self._answer(question, {**self._calls(1), "content": words})
        except ValueError:
            return None
        lead, called, _ = answer.partition(self.word("call0"))
        _, said, joint = lead.partition(words)
        return joint.removesuffix(begin) if called and said and joint.endswith(begin) else None

    def _calls(self, count: int) -> dict[str, Any]:
        functions = [{"name": self.word(f"call{i}"), "arguments": self._arguments(i)} for i in range(count)]
        calls = [{"type": "function", "id": self.word(f"id{i}"), "function": f} for i, f in enumerate(functions)]
        return {"role": "assistant", "content": "", "tool_calls": calls}

    def _arguments(self, index: int) -> dict[str, str]:
        return {self.word("key"): self.word(f"value{index}")}

    def _answer(self, question: dict[str, Any], answer: dict[str, Any]) -> str:
        """The assistant's turn up to its end, in a conversation that goes on behind it."""
        calls = answer.get("tool_calls", [])
        names = [(call["id"], call["function"]["name"]) for call in calls]
        results = [
            {"role": "tool", "tool_call_id": id_, "name": name, "content": self.word("result")} for id_, name in names
        ]
        thanks = {"role": "assistant", "content": self.word("thanks")}
        before = self.apply([question])
        whole = self.apply([question, answer, *results, thanks] if results else [question, answer])
        if not whole.startswith(before) or (results and self.word("result") not in whole):
            raise ValueError("the template does not keep the order of the conversation")
        written: list[str] = []
        for text, control in self.encoder.pieces(whole[len(before) :]):
            if control is not None and self.is_end(control):
                return "".join(written)
            written.append(text)
        raise ValueError("the template does not end the assistant's turn")

    def _split(self, answer: str, count: int) -> list[str] | None:
        """What stands around the names and arguments of `count` calls."""
        parts: list[str] = []
        for i in range(count):
            for found in (self.word(f"call{i}"), as_json(self._arguments(i))):
                part, there, answer = answer.partition(found)
                if not there:
                    return None
                parts.append(part)
        # arguments that were rendered twice, or an id that the model would have to make up
        around = answer + "".join(parts)
        if any(self.word(f"{kind}{i}") in around for kind in ("call", "id", "value") for i in range(count)):
            return None
        return [*parts, answer]


def _common(left: str, right: str) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
