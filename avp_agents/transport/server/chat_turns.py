"""A message of the OpenAI-compatible endpoint: what it says, and which context it claims to stand for.

Clients send an answer back with fields of their own beside ours. What says nothing to a model is left out; what would
be part of a prompt, and is not supported, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from avp_agents.agent.turns import HandedMessage, content_digest
from avp_agents.errors import PromptError
from avp_agents.handle import ContextHandle

HANDLE_FIELD = "avp_context"
"""Where a request names a context, a message says which one it stands for, and an answer tells its own."""

_READ = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"})
_ECHOED = frozenset(
    {"annotations", "cache_control", "id", "provider_specific_fields", "reasoning", "reasoning_details"}
)
"""What clients keep on an answer that they got; it is no part of a prompt."""
_EMPTY = frozenset({"audio", "function_call", "refusal"})
"""What OpenAI's own client sends back of every answer; here always empty."""

_DIGEST = "content:"


def read_message(index: int, data: object) -> HandedMessage:
    """Read one message of a request.

    Raises:
        PromptError: It is no object, or has a field that would be part of the prompt and is not supported.
    """
    if not isinstance(data, dict):
        raise PromptError(f"Message {index} must be an object with 'role' and 'content'.")
    for name, value in data.items():
        if name not in _READ | _ECHOED | {HANDLE_FIELD} and (value or name not in _EMPTY):
            raise PromptError(f"Message {index} has a field that is not supported here: {name[:60]!r}.")
    message = {name: value for name, value in data.items() if name in _READ and value is not None}
    message = {"content": None} | message
    if message.get("role") == "developer":
        message["role"] = "system"
    handle = data.get(HANDLE_FIELD)
    if handle is None:
        return HandedMessage(message)
    text = _text(message["content"])
    is_bare = not text and not message.get("tool_calls")
    return HandedMessage(message, handle, is_edited=not is_bare and _is_edited(handle, text), is_thought=is_bare)


def marked(handle: ContextHandle, text: str) -> ContextHandle:
    """The handle of an answer with a digest of its text, so that an edit of the message is noticed."""
    return handle.labelled(agent=handle.agent, text=handle.text, source=_DIGEST + content_digest(text))


def _is_edited(handle: object, text: str) -> bool:
    """Whether a message's text is not the one that its handle was given out with; a bare id does not tell."""
    source = handle.get("source") if isinstance(handle, Mapping) else None
    told = source.removeprefix(_DIGEST) if isinstance(source, str) and source.startswith(_DIGEST) else None
    return told is not None and told != content_digest(text)


def _text(content: Any) -> str:
    """The text of a message's content; of parts, theirs in order."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
