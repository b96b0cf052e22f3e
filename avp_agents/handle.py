"""Handles: small references to stored contexts that graph state, checkpoints and messages can carry."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, NotRequired, TypedDict

from avp_agents.errors import InvalidHandleError

HANDLE_ID = re.compile(r"avp:1:[0-9a-f]{32}")
"""The form of a handle's id."""

_HANDLE_VERSION = 1


class ContextHandleState(TypedDict):
    """A handle as plain JSON data, for graph state. Under 300 bytes; no path, URL, device or secret."""

    v: int
    id: str
    agent: str
    model: str
    tokens: int
    bytes: int
    text: str
    created: str
    source: NotRequired[str]


@dataclass(frozen=True)
class ContextHandle:
    """A small, opaque reference to a stored context.

    Attributes:
        id: ``"avp:1:"`` and 32 hex digits, a digest keyed by the namespace.
        model: First 16 digits of the model's fingerprint.
        tokens: Positions of the lineage.
        bytes: Bytes of lineage and readout.
        agent: Who produced it (a node's name, a role), for people.
        text: One short line for people; never rendered to a model that resolves the handle.
        created: ISO 8601 time in UTC.
        source: An integration's note on how it could make a lost context again; most handles have none.
    """

    id: str
    model: str = ""
    tokens: int = 0
    bytes: int = 0
    agent: str = ""
    text: str = ""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    source: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not HANDLE_ID.fullmatch(self.id):
            raise InvalidHandleError(
                f"Not a context handle id: {str(self.id)[:60]!r} (expected 'avp:1:' + 32 hex digits)."
            )

    def to_state(self) -> ContextHandleState:
        """The handle as JSON data, texts cut so that it stays under 300 bytes."""
        state: ContextHandleState = {
            "v": _HANDLE_VERSION, "id": self.id, "agent": _cut(self.agent, 32), "model": self.model,
            "tokens": self.tokens, "bytes": self.bytes, "text": _cut(self.text, 80), "created": self.created,
        }  # fmt: skip
        if self.source:
            state["source"] = _cut(self.source, 40)
        return state

    @classmethod
    def from_state(cls, state: ContextHandle | ContextHandleState | dict[str, Any] | str) -> ContextHandle:
        """Read a handle from graph state, which is untrusted input.

        Raises:
            InvalidHandleError: It is not well formed, or of a version this release does not know.
        """
        if isinstance(state, ContextHandle):
            return state
        if isinstance(state, str):
            return cls(id=state)
        if not isinstance(state, dict):
            raise InvalidHandleError(f"A handle is a dict or a string, not {type(state).__name__}.")
        if state.get("v") != _HANDLE_VERSION:
            raise InvalidHandleError(
                f"Handle version {state.get('v')!r} is unknown; this release reads {_HANDLE_VERSION}."
            )
        given: dict[str, Any] = {"id": state.get("id", "")}
        given |= {name: str(state.get(name, "")) for name in ("model", "agent", "text", "created", "source")}
        try:
            given |= {name: int(state.get(name, 0)) for name in ("tokens", "bytes")}
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidHandleError("A handle's 'tokens' and 'bytes' must be integers.") from error
        return cls(**given)

    def labelled(self, *, agent: str, text: str, source: str = "") -> ContextHandle:
        """The same handle with another agent's name, line of text and note."""
        return replace(self, agent=agent, text=text, source=source)


def _cut(text: str, limit: int) -> str:
    """`text` in at most `limit` UTF-8 bytes."""
    raw = text.encode()
    if len(raw) <= limit:
        return text
    return raw[: limit - 3].decode(errors="ignore") + "…"
