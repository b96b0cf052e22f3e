"""Chat messages: what is accepted, and how they are rearranged for templates that refuse or drop some.

`read_messages` checks a prompt's messages. `arrangements` yields them as given, then in forms that ask less and less of
a template: consecutive turns of one role merged, system text in the user turn, assistant turns that open or end the
conversation told in the user turn, and all of these with tool calls and tool results as plain text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from avp_agents.answer.tool_format import GENERIC
from avp_agents.context import Context
from avp_agents.errors import PromptError

Message = Mapping[str, Any]
"""A chat message: ``role``, ``content`` and optionally ``context`` (a `Context` that the message stands for)."""

Prompt = str | Sequence[Message]
"""A string (one user message, or raw text where the tokenizer has no chat template) or chat messages."""

ROLES = ("system", "user", "assistant", "tool")

ChatDict = dict[str, Any]
"""What a template gets: ``role``, ``content`` (text; None only beside ``tool_calls``), and other keys as given."""

Arrangement = tuple[list[ChatDict], tuple[str, ...]]
"""Messages, and one note per change that was made to them."""


@dataclass(frozen=True)
class Turn:
    """A checked message: its position in the prompt, what the template gets, and the context it stands for."""

    index: int
    message: ChatDict
    context: Context | None

    @property
    def is_bare_thought(self) -> bool:
        """It stands for latent steps and says nothing beside; there is nothing to render in their place."""
        if self.context is None or self.context.is_text:
            return False
        return not self.message["content"] and "tool_calls" not in self.message


def read_messages(messages: Sequence[Message]) -> list[Turn]:
    """Check messages and split their contexts off.

    Raises:
        PromptError: A message is not a mapping, its role is unknown, its content is not text, its tool calls are not
            JSON data, or its context is not a `Context`.
    """
    if isinstance(messages, Mapping) or not isinstance(messages, Sequence):
        raise PromptError(f"A prompt is a string or a list of chat messages, not {type(messages).__name__}.")
    return [_read_message(index, message) for index, message in enumerate(messages)]


def _read_message(index: int, message: Message) -> Turn:
    if not isinstance(message, Mapping):
        raise PromptError(f"Message {index} is a {type(message).__name__}; pass a dict with 'role' and 'content'.")
    role, context, calls = message.get("role"), message.get("context"), message.get("tool_calls")
    if role not in ROLES:
        raise PromptError(f"Message {index} has the role {role!r}; use one of {', '.join(ROLES)}.")
    if context is not None and not isinstance(context, Context):
        raise PromptError(
            f"Message {index} carries a {type(context).__name__} as its context; pass a Context, "
            "which engine.resolve(handle) returns for a handle."
        )
    rest = {key: value for key, value in message.items() if key not in ("role", "content", "context", "tool_calls")}
    content = None if message.get("content") is None and calls else _text_of(index, message.get("content"))
    read = {"role": role, "content": content, **rest}
    if calls:
        read["tool_calls"] = _read_calls(index, calls)
    return Turn(index, read, context)


def _text_of(index: int, content: object) -> str:
    """A content as one text; a list of text blocks is joined."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise PromptError(f"Message {index} has a {type(content).__name__} as its content; pass text.")
    texts = []
    for block in content:
        text = block.get("text") if isinstance(block, Mapping) and block.get("type") == "text" else block
        if not isinstance(text, str):
            kind = block.get("type") if isinstance(block, Mapping) else type(block).__name__
            raise PromptError(f"Message {index} holds a content block of type {kind!r}; this engine reads text only.")
        texts.append(text)
    return "".join(texts)


def _read_calls(index: int, calls: object) -> list[dict[str, Any]]:
    try:
        read = json.loads(json.dumps(calls))
    except (TypeError, ValueError) as error:
        raise PromptError(f"The tool calls of message {index} are not JSON data: {error}.") from error
    if not isinstance(read, list) or not all(isinstance(call, dict) and _function(call).get("name") for call in read):
        raise PromptError(
            f"The tool calls of message {index} are malformed; pass a list of "
            "{'type': 'function', 'id': ..., 'function': {'name': ..., 'arguments': {...}}}."
        )
    return read


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function", call)
    return function if isinstance(function, Mapping) else {}


def arrangements(messages: Sequence[ChatDict], *, drops_calls: bool = False) -> Iterator[Arrangement]:
    """The messages as given, then in forms that ask less of a template. Only forms that differ are yielded.

    Args:
        messages: Checked messages.
        drops_calls: The template ignores tool calls. Then results are text, too, also where no call is among the
            messages: a turn has to read alike behind a context and within a whole prompt.
    """
    given = list(messages)
    plain, notes = _tools_as_text(given)
    if not (drops_calls and notes):
        yield from _turn_arrangements(given, ())
    if notes:
        yield from _turn_arrangements(plain, notes)


def _turn_arrangements(messages: list[ChatDict], notes: tuple[str, ...]) -> Iterator[Arrangement]:
    yielded = messages
    yield messages, notes
    for changes in _CHANGES:
        arranged, made = messages, notes
        for change in changes:
            arranged, note = change(arranged)
            made += note
        if arranged != yielded:
            yielded = arranged
            yield arranged, made


def _merge_roles(messages: list[ChatDict]) -> Arrangement:
    """Consecutive messages of one role as one; tool results and calls stay apart."""
    merged: list[ChatDict] = []
    roles: dict[str, None] = {}
    for message in messages:
        last = merged[-1] if merged else {}
        role = message["role"]
        if last.get("role") == role != "tool" and not ("tool_calls" in last or "tool_calls" in message):
            merged[-1] = {**last, "content": _paragraphs(last["content"], message["content"])}
            roles[role] = None
        else:
            merged.append(message)
    return merged, tuple(f"consecutive {role} messages merged" for role in roles)


def _late_system_to_user(messages: list[ChatDict]) -> Arrangement:
    leading = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    rest, notes = _system_to_user(messages[leading:])
    return messages[:leading] + rest, notes


def _system_to_user(messages: list[ChatDict]) -> Arrangement:
    """System text at the head of the next user message, or as a user message where none follows."""
    arranged: list[ChatDict] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message["content"])
        elif message["role"] == "user":
            arranged.append({**message, "content": _paragraphs(*waiting, message["content"])})
            waiting = []
        else:
            arranged.append(message)
    if waiting:
        arranged.append({"role": "user", "content": _paragraphs(*waiting)})
    changed = any(message["role"] == "system" for message in messages)
    return arranged, ("system message merged into the user turn",) if changed else ()


def _leading_assistant_to_user(messages: list[ChatDict]) -> Arrangement:
    count = next((i for i, message in enumerate(messages) if not _is_assistant_text(message)), len(messages))
    return _told_by_user(messages, range(count))


def _trailing_assistant_to_user(messages: list[ChatDict]) -> Arrangement:
    last = len(messages) - 1
    return _told_by_user(messages, [last] if messages and _is_assistant_text(messages[last]) else [])


def _is_assistant_text(message: ChatDict) -> bool:
    return message["role"] == "assistant" and "tool_calls" not in message


def _told_by_user(messages: list[ChatDict], which: Sequence[int]) -> Arrangement:
    arranged = list(messages)
    for i in which:
        speaker = messages[i].get("name") or "assistant"
        arranged[i] = {"role": "user", "content": f"{speaker}: {messages[i]['content']}"}
    return arranged, ("assistant message rendered in the user turn",) if which else ()


def _tools_as_text(messages: list[ChatDict]) -> Arrangement:
    """Tool calls in the generic format in the assistant's text, tool results as user messages."""
    arranged: list[ChatDict] = []
    notes: dict[str, None] = {}
    for message in messages:
        if message["role"] == "tool":
            source = message.get("name") or "the tool"
            arranged.append({"role": "user", "content": f"Result of {source}:\n{message['content']}"})
            notes["tool message rendered as user text"] = None
        elif "tool_calls" in message:
            told = {key: value for key, value in message.items() if key != "tool_calls"}
            functions = [_function(call) for call in message["tool_calls"]]
            calls = GENERIC.calls_text([(function["name"], function.get("arguments")) for function in functions])
            arranged.append({**told, "content": "\n".join(filter(None, (message["content"], calls)))})
            notes["tool calls rendered as assistant text"] = None
        else:
            arranged.append(message)
    return arranged, tuple(notes)


def _paragraphs(*texts: str) -> str:
    return "\n\n".join(filter(None, texts))


_Change = Callable[[list[ChatDict]], Arrangement]
_CHANGES: tuple[tuple[_Change, ...], ...] = (
    (_merge_roles,),
    (_late_system_to_user, _merge_roles),
    (_system_to_user, _merge_roles),
    (_system_to_user, _leading_assistant_to_user, _merge_roles),
    (_system_to_user, _leading_assistant_to_user, _trailing_assistant_to_user, _merge_roles),
)
