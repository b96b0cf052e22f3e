"""Contexts in graph state: a channel of handles that parallel branches can write.

    class State(MessagesState, ContextState): ...

State carries handles only: plain JSON, under 300 bytes each. Tensors stay in the context store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from langchain_core.runnables import RunnableConfig
from typing_extensions import TypedDict

from avp_agents.errors import ConfigurationError, InvalidHandleError
from avp_agents.handle import ContextHandle, ContextHandleState

Contexts = dict[str, ContextHandleState | None]
"""Handles by key (a node's or branch's name); None marks one that was taken back."""


Key = str | Callable[[Any], str | None] | None
"""A key of `contexts`, or a function that makes it from the state: branches that `Send` starts need one each."""


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


def key_in(state: Any, key: Key) -> str | None:
    """A key that may be made from the state."""
    return key(state) if callable(key) else key


def own_key(state: Any, key: Key, config: RunnableConfig, node: str) -> str:
    """Where a node's handle goes in `contexts`: under its key, or its name in the graph.

    Raises:
        ConfigurationError: It has neither.
    """
    own = key_in(state, key) or config.get("metadata", {}).get("langgraph_node")
    if not own:
        raise ConfigurationError(f"Outside of a graph a {node} needs a key=.")
    return own


def field_of(state: Any, name: str) -> Any:
    """A field of the state, which is a dict, a dataclass or a pydantic model; None where it has none."""
    return state.get(name) if isinstance(state, Mapping) else getattr(state, name, None)


def handle_in(state: Any, key: str) -> ContextHandleState | None:
    """The handle under a key of `contexts`; None where it was taken back.

    Raises:
        ConfigurationError: There never was one.
    """
    contexts = field_of(state, "contexts") or {}
    if key not in contexts:
        there = ", ".join(map(repr, contexts)) or "none"
        raise ConfigurationError(
            f"The state has no context {key!r} (there: {there}). Run a node that makes it before, such as "
            f"ThinkNode(..., key={key!r}), and let the state include ContextState."
        )
    return contexts[key]
