"""Contexts in graph state: a channel of handles that parallel branches can write.

    class State(MessagesState, ContextState): ...

State carries handles only: plain JSON, under 300 bytes each. Tensors stay in the context store.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from typing_extensions import TypedDict

from avp_agents.errors import InvalidHandleError
from avp_agents.handle import ContextHandle, ContextHandleState

Contexts = dict[str, ContextHandleState | None]
"""Handles by key (a node's or branch's name); None marks one that was taken back."""


def merge_contexts(left: Mapping[str, Any] | None, right: Mapping[str, Any] | None) -> Contexts:
    """The reducer of the `contexts` channel: the union of both, the right one's entry where both have the key.

    Pure, associative and idempotent; the order of updates matters within a key only. ``{key: None}`` takes a handle
    back and stays in the state as None, since a forgotten removal could not be told from no removal when updates are
    merged before they reach the state. A `ContextHandle` is turned into its JSON form.

    Raises:
        InvalidHandleError: An entry is not a handle, for instance a `Context` itself.
    """
    return {key: _as_state(key, value) for key, value in {**(left or {}), **(right or {})}.items()}


def _as_state(key: str, value: Any) -> Any:
    if isinstance(value, ContextHandle):
        return value.to_state()
    if value is None or isinstance(value, str | dict):
        return value
    raise InvalidHandleError(
        f"contexts[{key!r}] is a {type(value).__name__}, which graph state cannot carry. "
        "Put the handle there: store.put(context) returns it."
    )


class ContextState(TypedDict, total=False):
    """Graph state with a channel of context handles; subclass it, alone or beside `MessagesState`."""

    contexts: Annotated[Contexts, merge_contexts]
