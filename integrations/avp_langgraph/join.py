"""JoinNode: what parallel branches thought, as one context for the next agent.

graph.add_node("join", JoinNode(model, contexts=["trees", "water", "money"]))
graph.add_node("writer", GenerateNode(model, context="join"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

from langchain_core.runnables import RunnableConfig, RunnableLambda

from avp_agents.agent.exchange import put
from avp_agents.agent.ladder import Ladder, Prepared, prepare
from avp_agents.agent.steps import Plan, arun, ask, in_thread, run
from avp_agents.engine.protocol import Engine, JoinStrategy
from avp_agents.errors import ConfigurationError, ContextLostError
from avp_langgraph.calls import current_scope
from avp_langgraph.chat_model import AvpChatModel
from avp_langgraph.events import stream_handoff
from avp_langgraph.messages import read_messages
from avp_langgraph.state import Key, field_of, handle_in, own_key

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
        return run(self._joined(state, config))

    async def _arun(self, state: Any, config: RunnableConfig) -> dict[str, Any]:
        return await arun(self._joined(state, config))

    def _joined(self, state: Any, config: RunnableConfig) -> Plan[dict[str, Any]]:
        own = own_key(state, self._key, config, type(self).__name__)
        handles = self._handles(state, own)
        engine = yield from in_thread(self._model._engine_for, self._model.model_name)
        scope = current_scope(self._model.scope)
        # the state's messages can make up for a lost thought; the contexts that they stand for themselves do not matter
        turns = [replace(turn, handle=None) for turn in read_messages(field_of(state, "messages") or [])]
        found: dict[str, Prepared] = {}
        for key, handle in handles.items():
            found[key] = yield from prepare(Ladder(engine, scope, self._model.on_missing), turns, handle)
        contexts = {key: prepared.context for key, prepared in found.items() if prepared.context is not None}
        if not contexts:
            raise ContextLostError("All contexts to join are lost. Run the nodes that made them again.")
        joined = yield from ask(
            engine.join, engine.ajoin, list(contexts.values()), strategy=self._strategy, source=scope.minted
        )
        line = f"{', '.join(contexts)} joined by {self._strategy} ({len(joined)} positions)"
        handle = yield from put(engine, joined, scope, line)
        made = joined.handoff.to_metadata() if joined.handoff is not None else {}
        for fallback in (fallback for prepared in found.values() for fallback in prepared.fallbacks):
            made |= {"mode": fallback.mode, "reason": fallback.reason}
        stream_handoff(made, scope.agent)
        return {"contexts": {own: handle.labelled(agent=scope.agent, text=line).to_state()}}

    def _handles(self, state: Any, own: str) -> dict[str, Any]:
        """The handles to join by key, in order; those that were taken back are left out."""
        keys = self._contexts(state) if callable(self._contexts) else self._contexts
        if keys is None:
            keys = sorted((field_of(state, "contexts") or {}).keys() - {own})
        handles = {key: handle for key in keys if (handle := handle_in(state, key)) is not None}
        if not handles:
            raise ConfigurationError(
                "There is no context to join. Run ThinkNodes or GenerateNodes before the JoinNode, name their keys in "
                "contexts=, and let the state include ContextState."
            )
        return handles
