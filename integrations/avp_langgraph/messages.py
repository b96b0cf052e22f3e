"""LangChain messages as the engine's chat messages, and the handles that ride on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from avp_agents.context import ContextHandle, LatentRecipe
from avp_agents.errors import InvalidHandleError, PromptError

HANDLE_KEY = "avp_context"
"""Where a handle rides on a message: ``message.response_metadata["avp_context"]``."""

METADATA_KEY = "avp"
"""Where a message says how it was made: ``message.response_metadata["avp"]``."""

_ROLES: dict[type[BaseMessage], str] = {
    SystemMessage: "system",
    HumanMessage: "user",
    AIMessage: "assistant",
    ToolMessage: "tool",
}


@dataclass(frozen=True)
class Turn:
    """One message, read.

    Attributes:
        role, content: As the chat template takes them.
        handle: The context that the message stands for, if it claims one. Untrusted: state can be edited.
        recipe: How the latent steps were made that `content` describes; None where `content` is an answer.
    """

    role: str
    content: str
    handle: ContextHandle | None = None
    recipe: LatentRecipe | None = None

    def as_message(self) -> dict[str, Any]:
        """What the engine renders when no context stands for this turn."""
        return {"role": self.role, "content": self.content}


def read_messages(messages: Sequence[BaseMessage]) -> list[Turn]:
    """All messages as turns, in order.

    Raises:
        PromptError: There is none, one has media or tool calls as content, or a kind that no chat template knows.
    """
    if not messages:
        raise PromptError("There are no messages to answer. Pass at least one.")
    return [_read(message) for message in messages]


def _read(message: BaseMessage) -> Turn:
    role = _role(message)
    if isinstance(message, AIMessage) and (message.tool_calls or message.invalid_tool_calls):
        raise PromptError("A message holds tool calls, which this model cannot read. Send their results as text.")
    turn = Turn(role, _text(message))
    if role != "assistant" or HANDLE_KEY not in message.response_metadata:
        return turn
    recipe = _recipe(message.response_metadata.get(METADATA_KEY))
    return Turn(role, turn.content, _handle(message.response_metadata[HANDLE_KEY]), recipe)


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in _ROLES.items():
        if isinstance(message, kind):
            return role
    raise PromptError(f"A {type(message).__name__} is not a message that a chat template can render.")


def _text(message: BaseMessage) -> str:
    """The message's text; blocks of other kinds are refused rather than dropped."""
    if isinstance(message.content, str):
        return message.content
    return "".join(_block_text(block) for block in message.content)


def _block_text(block: str | Mapping[str, Any]) -> str:
    if isinstance(block, str):
        return block
    if block.get("type") == "text" and isinstance(block.get("text"), str):
        return block["text"]
    raise PromptError(
        f"Content of type {block.get('type')!r} cannot be given to this model: it reads text only. "
        "Remove the block, or describe it in text."
    )
