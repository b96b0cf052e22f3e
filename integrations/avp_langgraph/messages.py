"""LangChain messages as the engine's chat messages, and the handles that ride on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from avp_agents.agent.turns import HandedMessage, content_digest, read_recipe
from avp_agents.errors import PromptError

HANDLE_KEY = "avp_context"
"""Where a handle rides on a message: ``message.response_metadata["avp_context"]``."""

METADATA_KEY = "avp"
"""Where a message says how it was made: ``message.response_metadata["avp"]``."""

THINK_KEY = "think"
"""Where that says, for a message that stands for latent steps, how those were made (a `LatentRecipe`'s fields)."""

DIGEST_KEY = "content"
"""Where that says what the message's content was, as a digest: edited messages no longer stand for their context."""

REASONING_KEY = "reasoning_content"
"""Where a message has what the model reasoned before its text: ``message.additional_kwargs["reasoning_content"]``. Chat
templates that render reasoning look for the same name."""

_ROLES: dict[type[BaseMessage], str] = {
    SystemMessage: "system",
    HumanMessage: "user",
    AIMessage: "assistant",
    ToolMessage: "tool",
}
_OTHER_NAMES = {"human": "user", "ai": "assistant", "developer": "system"}
_SAID_ELSEWHERE = frozenset(
    ("tool_call", "tool_call_chunk", "invalid_tool_call", "tool_use", "input_json_delta", "function_call")
)
"""Blocks of an AI message's content that `tool_calls` repeats."""
_REASONING = {"reasoning": "reasoning", "thinking": "thinking", "redacted_thinking": None}
"""Blocks of an AI message's content that tell what a model reasoned, and where they have its text."""


def read_messages(messages: Sequence[BaseMessage]) -> list[HandedMessage]:
    """All messages as turns, in order.

    Raises:
        PromptError: A message has content other than text, or is of a kind that no chat template knows.
    """
    return [_read(message) for message in messages]


def _read(message: BaseMessage) -> HandedMessage:
    is_answer = isinstance(message, AIMessage)
    chat_message: dict[str, Any] = {"role": _role(message), "content": _text(message, is_answer=is_answer)}
    if message.name:
        chat_message["name"] = message.name
    if isinstance(message, ToolMessage):
        chat_message["tool_call_id"] = message.tool_call_id
    if not is_answer:
        return HandedMessage(chat_message)
    calls = _tool_calls(message)
    if calls:
        chat_message["tool_calls"] = calls
    if reasoning := _reasoning(message):
        chat_message[REASONING_KEY] = reasoning
    handle = message.response_metadata.get(HANDLE_KEY)
    made = message.response_metadata.get(METADATA_KEY)
    if not isinstance(made, Mapping):
        return HandedMessage(chat_message, handle)
    named = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    if made.get(DIGEST_KEY, digest := content_digest(chat_message["content"], named)) != digest:
        return HandedMessage(chat_message, handle, is_edited=True)
    if THINK_KEY in made:
        bare = {**chat_message, "content": ""}
        return HandedMessage(bare, handle, is_thought=True, recipe=read_recipe(made[THINK_KEY]))
    return HandedMessage(chat_message, handle)


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return _OTHER_NAMES.get(message.role, message.role)
    for kind, role in _ROLES.items():
        if isinstance(message, kind):
            return role
    raise PromptError(
        f"A {type(message).__name__} cannot be rendered: no chat template knows its kind. Use system, human, AI and "
        "tool messages."
    )


def _text(message: BaseMessage, *, is_answer: bool) -> str:
    """The message's text; blocks of other kinds are refused rather than dropped."""
    if isinstance(message.content, str):
        return message.content
    elsewhere = _SAID_ELSEWHERE | _REASONING.keys() if is_answer else frozenset[str]()
    blocks = (block for block in message.content if isinstance(block, str) or block.get("type") not in elsewhere)
    return "".join(map(_block_text, blocks))


def _block_text(block: str | Mapping[str, Any]) -> str:
    if isinstance(block, str):
        return block
    if block.get("type") in ("text", "text-plain") and isinstance(block.get("text"), str):
        return block["text"]
    raise PromptError(
        f"Content of type {block.get('type')!r} cannot be given to this model: it reads text only. "
        "Remove the block, or describe it in text."
    )


def _reasoning(message: AIMessage) -> str:
    """What the model reasoned before the message's text; empty where the message does not tell."""
    given = message.additional_kwargs.get(REASONING_KEY)
    if isinstance(given, str):
        return given
    blocks = [block for block in message.content if isinstance(block, Mapping)]
    texts = (block.get(key) for block in blocks if (key := _REASONING.get(str(block.get("type")))))
    return "".join(text for text in texts if isinstance(text, str))


def _tool_calls(message: AIMessage) -> list[dict[str, Any]]:
    """The message's tool calls as chat templates take them."""
    return [
        {"type": "function", "id": call.get("id"), "function": {"name": call["name"], "arguments": call["args"]}}
        for call in (*message.tool_calls, *message.invalid_tool_calls)
    ]
