"""LangChain messages as the engine's chat messages, and the handles that ride on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from avp_agents.context import LatentMethod, LatentRecipe
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


@dataclass(frozen=True)
class Turn:
    """One message, read.

    Attributes:
        message: What the engine renders when no context stands for this turn: ``role``, ``content``, and where the
            message has them ``name``, ``tool_calls``, ``tool_call_id`` and ``reasoning_content``.
        handle: The handle of the context that the message claims to stand for; None where it claims none. Untrusted,
            like the recipe: graph state can be edited.
        is_edited: The content is no longer what it was when the context was made; the content counts.
        is_thought: It stands for latent steps. Its content is a line for people, which is never rendered to a model and
            not in `message`.
        recipe: How those steps were made; None where that is not known.
    """

    message: Mapping[str, Any]
    handle: object = None
    is_edited: bool = False
    is_thought: bool = False
    recipe: LatentRecipe | None = field(default=None, compare=False)


def read_messages(messages: Sequence[BaseMessage]) -> list[Turn]:
    """All messages as turns, in order.

    Raises:
        PromptError: A message has content other than text, or is of a kind that no chat template knows.
    """
    return [_read(message) for message in messages]


def content_digest(text: str, calls: Iterable[tuple[str, Any]] = ()) -> str:
    """16 hex digits that tell whether a message's text, or the name or arguments of a tool call in it, were edited."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8)
    for call in calls:
        digest.update(json.dumps(call, sort_keys=True, default=str).encode(errors="surrogatepass"))
    return digest.hexdigest()


def _read(message: BaseMessage) -> Turn:
    is_answer = isinstance(message, AIMessage)
    chat_message: dict[str, Any] = {"role": _role(message), "content": _text(message, is_answer=is_answer)}
    if message.name:
        chat_message["name"] = message.name
    if isinstance(message, ToolMessage):
        chat_message["tool_call_id"] = message.tool_call_id
    if not is_answer:
        return Turn(chat_message)
    calls = _tool_calls(message)
    if calls:
        chat_message["tool_calls"] = calls
    if reasoning := _reasoning(message):
        chat_message[REASONING_KEY] = reasoning
    handle = message.response_metadata.get(HANDLE_KEY)
    made = message.response_metadata.get(METADATA_KEY)
    if not isinstance(made, Mapping):
        return Turn(chat_message, handle)
    named = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    if made.get(DIGEST_KEY, digest := content_digest(chat_message["content"], named)) != digest:
        return Turn(chat_message, handle, is_edited=True)
    if THINK_KEY in made:
        bare = {**chat_message, "content": ""}
        return Turn(bare, handle, is_thought=True, recipe=_read_recipe(made[THINK_KEY]))
    return Turn(chat_message, handle)


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


def _read_recipe(data: object) -> LatentRecipe | None:
    """A recipe out of a message's metadata, None if it is not well formed."""
    if not isinstance(data, Mapping):
        return None
    values = cast("Mapping[str, Any]", data)
    method, k, steps, renormalise = (values.get(name) for name in ("method", "k", "steps", "renormalise"))
    temperature, cosine, entropy = (values.get(name) for name in ("temperature", "stop_cosine", "stop_entropy"))
    well_formed = (
        method in get_args(LatentMethod)
        and type(steps) is int
        and steps >= 1
        and type(renormalise) is bool
        and (k is None or type(k) is int)
        and isinstance(temperature, int | float)
        and all(stop is None or isinstance(stop, int | float) for stop in (cosine, entropy))
    )
    if not well_formed:
        return None
    return LatentRecipe(
        method=cast("LatentMethod", method),
        k=k,
        temperature=float(cast("float", temperature)),
        renormalise=cast("bool", renormalise),
        steps=cast("int", steps),
        stop_cosine=cosine,
        stop_entropy=entropy,
    )
