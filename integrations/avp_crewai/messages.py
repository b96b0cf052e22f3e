"""CrewAI's messages as the engine's chat messages, and what of them an earlier call of the same agent holds already.

An agent calls its LLM several times for one task: after each tool result, and again when a guardrail refuses its
answer. CrewAI then sends everything from the start, its answers as text. `what_follows` and `what_was_put_in` find the
part that the context of an earlier call does not hold yet, so that the context is continued instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from avp_agents.errors import PromptError
from avp_agents.prompt.chat_messages import Message


@dataclass(frozen=True)
class Answer:
    """What the LLM answered, as CrewAI quotes it to the LLM in later messages.

    Attributes:
        text: The text; empty beside tool calls.
        tool_calls: The calls, with their arguments as data.
    """

    text: str
    tool_calls: tuple[tuple[str, Any], ...] = ()


def read_messages(messages: object) -> list[Message]:
    """CrewAI's messages as the engine takes them: their roles, text, tool calls and tool results.

    Raises:
        PromptError: They are not a string or a list of messages.
    """
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence):
        raise PromptError(f"Pass a string or a list of messages, not {type(messages).__name__}.")
    return [_read(index, message) for index, message in enumerate(messages)]


def _read(index: int, message: object) -> Message:
    if not isinstance(message, Mapping) or "role" not in message:
        raise PromptError(f"Message {index} is not a message; pass a dict with 'role' and 'content'.")
    read: dict[str, Any] = {"role": message["role"], "content": message.get("content")}
    read |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
    if calls := message.get("tool_calls"):
        read["tool_calls"] = [_read_call(call) for call in calls]
    return read


def _read_call(call: Any) -> dict[str, Any]:
    """A tool call with its arguments as data: chat templates write them as JSON themselves."""
    function = call["function"]
    arguments = {"name": function["name"], "arguments": _as_data(function.get("arguments"))}
    return {"type": "function", "id": call.get("id"), "function": arguments}


def _as_data(arguments: object) -> Any:
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def what_follows(earlier: Sequence[Message], answer: Answer, messages: Sequence[Message]) -> list[Message] | None:
    """The messages behind an earlier call's messages and its answer; None if these do not go on from that call.

    What CrewAI wrote into the answer's message behind the answer (``Observation: ...``) follows as a user message.
    """
    if len(messages) <= len(earlier) or list(messages[: len(earlier)]) != list(earlier):
        return None
    quoted, *rest = messages[len(earlier) :]
    if quoted["role"] != "assistant":
        return [quoted, *rest]
    added = _added_to(answer, quoted)
    if added is None:
        return None
    following = [{"role": "user", "content": added}, *rest] if added else rest
    return following or None


def _added_to(answer: Answer, quoted: Message) -> str | None:
    """What a quoting message says behind the answer; None if it quotes something else."""
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in quoted.get("tool_calls", ())]
    if calls or answer.tool_calls:
        return "" if calls == list(answer.tool_calls) else None
    content, text = quoted["content"], answer.text.strip()
    if not isinstance(content, str) or not content.lstrip().startswith(text):
        return None
    return content.lstrip()[len(text) :].strip()


def what_was_put_in(earlier: Sequence[Message], put_in: str, messages: Sequence[Message]) -> list[Message] | None:
    """What a repeated prompt says that the earlier one did not, as a user message; None if it is another prompt.

    When a guardrail refuses an answer, CrewAI sends the task again with the reason put in, in place of the text that
    the predecessors handed over.

    Args:
        earlier: The messages of the earlier call.
        put_in: The text that CrewAI had put into them before; empty where there was none.
        messages: The messages of this call.
    """
    if len(messages) != len(earlier) or list(messages[:-1]) != list(earlier[:-1]):
        return None
    old, new = earlier[-1]["content"], messages[-1]["content"]
    if messages[-1]["role"] != "user" or not isinstance(old, str) or not isinstance(new, str):
        return None
    start = _agreement(old, new)
    end = _agreement(old[start:][::-1], new[start:][::-1])
    removed, added = old[start : len(old) - end], new[start : len(new) - end]
    if not added.strip() or removed not in put_in:
        return None
    whole_lines = new[new.rfind("\n", 0, start) + 1 : len(new) - end]
    return [{"role": "user", "content": whole_lines.strip()}]


def _agreement(one: str, other: str) -> int:
    """How many leading characters are the same."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(one), len(other)))
