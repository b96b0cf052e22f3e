"""AvpMiddleware: contexts in the state of an agent made by LangChain's `create_agent`.

agent = create_agent(model, tools, middleware=[AvpMiddleware(context="researcher")])
agent.invoke({"messages": [question], "contexts": {"researcher": handle}})["contexts"]["agent"]
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, NotRequired

from langchain_core.messages import AIMessage
from langgraph.types import Command

from avp_langgraph.chat_model import AvpChatModel
from avp_langgraph.messages import HANDLE_KEY
from avp_langgraph.state import Contexts, Key, field_of, handle_in, key_in, merge_contexts

try:
    from langchain.agents.middleware.types import (
        AgentMiddleware,
        AgentState,
        ExtendedModelResponse,
        ModelRequest,
        ModelResponse,
    )
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "AvpMiddleware needs LangChain's agents: pip install langchain", name="langchain"
    ) from error


class ContextAgentState(AgentState[Any]):
    """An agent's state with the `contexts` channel."""

    contexts: NotRequired[Annotated[Contexts, merge_contexts]]


class AvpMiddleware(AgentMiddleware[Any, Any, Any]):
    """Lets an agent answer on a context from its state, and puts the context of each of its answers there.

    Within one conversation the messages carry their contexts themselves; the channel is for contexts that come from
    elsewhere (another agent, a join), and for those that outlive the messages (a summary, a handoff that passes
    messages only). Models other than `AvpChatModel` are called as they are.

    Args:
        key: Where the handle of the agent's newest answer goes in `contexts`.
        context: The key of the context to answer on. The agent's own `key` continues its last answer, also where the
            messages of that are gone.

    Raises (when the agent runs):
        ConfigurationError: The state has no context of that key, and it is not the agent's own.

    Example:
        >>> create_agent(AvpChatModel(), tools, middleware=[AvpMiddleware(key="solver", context="researcher")])
    """

    state_schema = ContextAgentState

    def __init__(self, *, key: str = "agent", context: Key = None) -> None:
        super().__init__()
        self._key, self._context = key, context

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """Call the model on the context, and keep the answer's handle."""
        return self._kept(handler(self._on_context(request)))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """Asynchronous `wrap_model_call`."""
        return self._kept(await handler(self._on_context(request)))

    def _on_context(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        key = key_in(request.state, self._context)
        if key is None or not isinstance(request.model, AvpChatModel):
            return request
        if key == self._key and key not in (field_of(request.state, "contexts") or {}):
            return request
        handle = handle_in(request.state, key)
        if handle is None:
            return request
        return request.override(model_settings={**request.model_settings, "avp_context": handle})

    def _kept(self, response: ModelResponse[Any]) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        answers = [message for message in response.result if isinstance(message, AIMessage)]
        handle = answers[-1].response_metadata.get(HANDLE_KEY) if answers else None
        if handle is None:
            return response
        return ExtendedModelResponse(response, Command(update={"contexts": {self._key: handle}}))
