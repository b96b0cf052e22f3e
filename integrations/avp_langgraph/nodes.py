"""Graph nodes that hand contexts on through the `contexts` channel of the state.

    graph.add_node("researcher", ThinkNode(model, steps=20))
    graph.add_node("solver", GenerateNode(model, context="researcher", prompt="Solve it step by step."))

A node calls the chat model with messages from the state, so tracing, streaming, callbacks and metadata are the model's.
What it makes is put into `contexts` under its key: by default the node's name in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, SystemMessage
from langchain_core.runnables import RunnableConfig, RunnableLambda

from avp_agents.engine.protocol import Engine
from avp_agents.errors import ConfigurationError
from avp_langgraph.chat_model import AvpChatModel
from avp_langgraph.messages import HANDLE_KEY
from avp_langgraph.state import Key, field_of, handle_in, key_in, own_key

Prompt = str | Callable[[Any], LanguageModelInput] | None
"""A system message before the state's messages; a function that makes the prompt from the state; or those messages."""


class _ContextNode(RunnableLambda[Any, dict[str, Any]]):
    """What both nodes share: prompt and context from the state, one call of the model, the handle into the state."""

    def __init__(self, model: AvpChatModel | Engine, *, key: Key, prompt: Prompt, context: Key, **options: Any) -> None:
        chat_model = model if isinstance(model, AvpChatModel) else AvpChatModel(engine=model)
        self._model = chat_model.with_options(**options)
        self._key, self._prompt, self._context = key, prompt, context
        super().__init__(self._run, afunc=self._arun, name=type(self).__name__)

    def _run(self, state: Any, config: RunnableConfig) -> dict[str, Any]:
        answer = self._model.invoke(self._prompt_from(state), config, **self._context_from(state))
        return self._update(state, config, answer)

    async def _arun(self, state: Any, config: RunnableConfig) -> dict[str, Any]:
        answer = await self._model.ainvoke(self._prompt_from(state), config, **self._context_from(state))
        return self._update(state, config, answer)

    def _update(self, state: Any, config: RunnableConfig, answer: AIMessage) -> dict[str, Any]:
        key = own_key(state, self._key, config, type(self).__name__)
        return {"contexts": {key: answer.response_metadata[HANDLE_KEY]}}

    def _prompt_from(self, state: Any) -> LanguageModelInput:
        if callable(self._prompt):
            return self._prompt(state)
        messages = field_of(state, "messages")
        if not messages:
            raise ConfigurationError(
                f"The state has no messages for this {type(self).__name__}; give it a function that makes them: prompt="
            )
        return [SystemMessage(self._prompt), *messages] if self._prompt else messages

    def _context_from(self, state: Any) -> dict[str, Any]:
        """The call's handle; none where the node wants none, or where it was taken back."""
        key = key_in(state, self._context)
        handle = None if key is None else handle_in(state, key)
        return {} if handle is None else {"avp_context": handle}


class ThinkNode(_ContextNode):
    """Thinks on the state's messages; decodes nothing and adds no message.

    Args:
        model: The chat model, or an engine.
        key: Where the handle goes in `contexts`.
        prompt: What to think about.
        context: The key of a context to think on.
        steps: Latent steps.

    Returns (when it runs):
        ``{"contexts": {key: handle}}``

    Raises (when it runs):
        ConfigurationError: The state has no such context, or no messages.
        AvpError: As the chat model.

    Example:
        >>> graph.add_node("researcher", ThinkNode(AvpChatModel(), steps=20))
        >>> graph.add_node("branch", ThinkNode(model, key=lambda state: state["topic"], prompt=ask_about_topic))
    """

    def __init__(
        self,
        model: AvpChatModel | Engine,
        *,
        key: Key = None,
        prompt: Prompt = None,
        context: Key = None,
        steps: int = 20,
    ) -> None:
        super().__init__(model, key=key, prompt=prompt, context=context, mode="latent", latent_steps=steps)


class GenerateNode(_ContextNode):
    """Answers the state's messages, on top of a context from the state.

    Args:
        model: The chat model, or an engine.
        key: Where the handle of the answer's own context goes in `contexts`.
        prompt: What to answer.
        context: The key of the context to answer on.

    Returns (when it runs):
        ``{"messages": [answer], "contexts": {key: handle}}``

    Raises (when it runs):
        As `ThinkNode`.

    Example:
        >>> graph.add_node("solver", GenerateNode(AvpChatModel(), context="researcher"))
    """

    def __init__(
        self, model: AvpChatModel | Engine, *, key: Key = None, prompt: Prompt = None, context: Key = None
    ) -> None:
        super().__init__(model, key=key, prompt=prompt, context=context, mode="text")

    def _update(self, state: Any, config: RunnableConfig, answer: AIMessage) -> dict[str, Any]:
        return {"messages": [answer], **super()._update(state, config, answer)}
