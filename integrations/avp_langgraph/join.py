"""JoinNode: what parallel branches thought, as one context for the next agent.

graph.add_node("join", JoinNode(model, contexts=["trees", "water", "money"]))
graph.add_node("writer", GenerateNode(model, context="join"))
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from langchain_core.runnables import RunnableConfig, RunnableLambda

from avp_agents.context import Context
from avp_agents.engine.protocol import Engine, JoinStrategy
from avp_agents.errors import ConfigurationError, ContextLostError
from avp_agents.handle import ContextHandle
from avp_langgraph.chat_model import AvpChatModel
from avp_langgraph.events import stream_handoff
from avp_langgraph.handoffs import Preparation, Prepared, arun, prepare, run
from avp_langgraph.messages import read_messages
from avp_langgraph.scope import Scope, current_scope
from avp_langgraph.state import Key, field_of, handle_in, key_in

Keys = Sequence[str] | Callable[[Any], Sequence[str]] | None
"""Keys of `contexts` in the order in which the contexts are joined; a function that makes them from the state; or None
for all that are there, in the order of their names."""


class JoinNode(RunnableLambda[Any, dict[str, Any]]):
    """Joins contexts of the state; decodes nothing and adds no message.

    A joined context is one conversation of whole turns, in which what the contexts share (a system prompt, a question)
    stands once. The order in which branches finish does not matter. A context that is lost is left out, with a
    warning, unless the model has ``on_missing="error"``.

    Args:
        model: The chat model, or an engine.
        contexts: Which contexts, and in which order.
        strategy: ``"replay"`` prefills the contexts as one, so that later ones are read in the light of earlier ones;
            ``"splice"`` moves their KV-caches behind one another, which costs next to nothing; ``"text"`` keeps the
            texts of their answers only. See `avp_agents.engine.join`.
        key: Where the handle of the joined context goes in `contexts`; by default the node's name.

    Returns (when it runs):
        ``{"contexts": {key: handle}}``; the handle's line says what was joined and how.

    Raises (when it runs):
        ConfigurationError: The state has no such context, or none at all.
        ContextLostError: Every context is lost; or one is, and the model has ``on_missing="error"``.
        AvpError: As `LatentEngine.join`.

    Example:
        >>> graph.add_node("join", JoinNode(AvpChatModel(), strategy="splice"))
    """

    def __init__(
        self,
        model: AvpChatModel | Engine,
        *,
        contexts: Keys = None,
        strategy: JoinStrategy = "replay",
        key: Key = None,
    ) -> None:
        if strategy not in get_args(JoinStrategy):
            raise ConfigurationError(
                f"Unknown strategy {strategy!r}; choose one of {', '.join(get_args(JoinStrategy))}."
            )
        self._model = model if isinstance(model, AvpChatModel) else AvpChatModel(engine=model)
        self._strategy: JoinStrategy = strategy
        self._contexts, self._key = contexts, key
        super().__init__(self._run, afunc=self._arun, name=type(self).__name__)

    def _run(self, state: Any, config: RunnableConfig) -> dict[str, Any]:
        own, handles = self._own_key(state, config), self._handles(state, config)
        engine = self._model._engine_for(self._model.model_name)
        scope = current_scope(self._model.scope)
        found = [run(self._preparation(engine, handle, state, scope), engine) for handle in handles.values()]
        joined = engine.join(_contexts(found), strategy=self._strategy, source=scope.minted)
        line = self._line(joined, handles, found)
        handle = engine.store.put(joined, scope=scope.minted, agent=scope.agent, text=line)
        return _update(own, handle, joined, found, scope, line)

    async def _arun(self, state: Any, config: RunnableConfig) -> dict[str, Any]:
        own, handles = self._own_key(state, config), self._handles(state, config)
        engine = await asyncio.to_thread(self._model._engine_for, self._model.model_name)
        scope = current_scope(self._model.scope)
        found = [await arun(self._preparation(engine, handle, state, scope), engine) for handle in handles.values()]
        joined = await engine.ajoin(_contexts(found), strategy=self._strategy, source=scope.minted)
        line = self._line(joined, handles, found)
        handle = await engine.store.aput(joined, scope=scope.minted, agent=scope.agent, text=line)
        return _update(own, handle, joined, found, scope, line)

    def _own_key(self, state: Any, config: RunnableConfig) -> str:
        key = key_in(state, self._key) or config.get("metadata", {}).get("langgraph_node")
        if not key:
            raise ConfigurationError("Outside of a graph a JoinNode needs a key=.")
        return key

    def _handles(self, state: Any, config: RunnableConfig) -> dict[str, Any]:
        """The handles to join by key, in order; those that were taken back are left out."""
        keys = self._contexts(state) if callable(self._contexts) else self._contexts
        if keys is None:
            keys = sorted((field_of(state, "contexts") or {}).keys() - {self._own_key(state, config)})
        handles = {key: handle for key in keys if (handle := handle_in(state, key)) is not None}
        if not handles:
            raise ConfigurationError(
                "There is no context to join. Run ThinkNodes or GenerateNodes before the JoinNode, name their keys in "
                "contexts=, and let the state include ContextState."
            )
        return handles

    def _preparation(self, engine: Engine, handle: Any, state: Any, scope: Scope) -> Preparation:
        # the state's messages can make up for a lost thought; the contexts that they stand for themselves do not matter
        turns = [replace(turn, handle=None) for turn in read_messages(field_of(state, "messages") or [])]
        return prepare(turns, handle, store=engine.store, scope=scope, on_missing=self._model.on_missing)

    def _line(self, joined: Context, handles: Mapping[str, Any], found: Sequence[Prepared]) -> str:
        """The line for people beside the handle."""
        names = ", ".join(key for key, prepared in zip(handles, found, strict=True) if prepared.context is not None)
        return f"{names} joined by {self._strategy} ({len(joined)} positions)"


def _contexts(found: Sequence[Prepared]) -> list[Context]:
    contexts = [prepared.context for prepared in found if prepared.context is not None]
    if not contexts:
        raise ContextLostError("All contexts to join are lost. Run the nodes that made them again.")
    return contexts


def _update(
    key: str, handle: ContextHandle, joined: Context, found: Sequence[Prepared], scope: Scope, line: str
) -> dict[str, Any]:
    made = joined.handoff.to_metadata() if joined.handoff is not None else {}
    for fallback in (fallback for prepared in found for fallback in prepared.fallbacks):
        made |= {"mode": fallback.mode, "reason": fallback.reason}
    stream_handoff(made, scope.agent)
    return {"contexts": {key: handle.labelled(agent=scope.agent, text=line).to_state()}}
