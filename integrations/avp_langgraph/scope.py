"""Whom a context belongs to: the thread or user that a run's config names.

The scope comes from the config of the running graph alone. Messages and state cannot choose it: they can be edited.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from langchain_core.runnables.config import ensure_config

from avp_agents.agent.turns import Scope
from avp_agents.errors import ConfigurationError

ScopePolicy = Literal["thread", "user", "open"]
_USER_KEYS = ("user_id", "langgraph_auth_user_id")


def current_scope(policy: ScopePolicy) -> Scope:
    """The scope of the run that is going on.

    Args:
        policy: ``"thread"`` is the config's ``thread_id``; a run without one (no checkpointer, or no graph at all)
            shares its scope with other such runs. ``"user"`` is the config's ``user_id``, or the user that the
            LangGraph server authenticated. ``"open"`` honours every handle of the namespace.

    Raises:
        ConfigurationError: The policy is ``"user"`` and the config names no user.
    """
    config = ensure_config()
    configurable = config.get("configurable", {})
    agent = str(config.get("metadata", {}).get("langgraph_node", ""))
    if policy == "open":
        return Scope(minted="", honoured=None, agent=agent)
    name = _thread(configurable) if policy == "thread" else _user(configurable)
    return Scope(minted=name, honoured=name, agent=agent)


def thread_scope(thread_id: object) -> str:
    """The scope of a thread."""
    return f"thread:{thread_id}"


def _thread(configurable: Mapping[str, Any]) -> str:
    thread = configurable.get("thread_id")
    return "" if thread is None else thread_scope(thread)


def _user(configurable: Mapping[str, Any]) -> str:
    for key in _USER_KEYS:
        if user := configurable.get(key):
            return f"user:{user}"
    raise ConfigurationError(
        "scope='user' needs to know the user: pass config={'configurable': {'user_id': ...}} when you run the graph."
    )
