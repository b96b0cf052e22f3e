"""AvpChatModel: an open-weight model in this process that answers with text or thinks, and hands its context on.

    researcher = AvpChatModel(mode="latent")          # thinks; its message stands for a context
    solver = AvpChatModel()                           # answers on top of that context

Every message it makes carries a handle in ``response_metadata["avp_context"]``; the tensors stay in the context store.
A message with a handle stands for its context: it is not rendered, and what the context holds is not computed again.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.base import LangSmithParams, LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel, generate_from_stream
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import ensure_config
from langchain_core.tools import BaseTool
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from avp_agents.agent.settings import AgentSettings
from avp_agents.agent.steps import astream, stream
from avp_agents.engine.protocol import Engine
from avp_agents.engine.registry import shared_engine
from avp_agents.errors import AvpError, ConfigurationError
from avp_agents.models.embedded import ENVIRONMENT_VARIABLE, NAME
from avp_langgraph.calls import PROVIDER, Call, ScopePolicy, chunks, current_scope, shown_name
from avp_langgraph.errors import raise_known
from avp_langgraph.messages import read_messages
from avp_langgraph.profile import declared_window, model_profile
from avp_langgraph.structured_output import Method, Schema, structured
from avp_langgraph.tool_calling import Constraints, Tool, tool_definitions

# What people leave in when they swap a hosted model for this one; it has no meaning here.
_HOSTED_ONLY = frozenset({"api_key", "base_url", "max_retries"})


class AvpChatModel(BaseChatModel, AgentSettings):
    """A chat model that runs in this process and can hand over what it thought instead of what it wrote.

    No weights are loaded when it is made: the first call looks the engine up (`avp_agents.engine.registry`), which
    models of the same name and options share. How to think, to sample and to find the engine are the fields of
    `AgentSettings`; those that are None leave the engine's default. All fields but `engine`, `engine_options`,
    `namespace`, `scope` and `streaming` can be overridden by a call: ``model.invoke(messages, temperature=0.7)``,
    ``model.bind(...)``.

    Example:
        >>> researcher = AvpChatModel(mode="latent", latent_steps=20)
        >>> solver = AvpChatModel(max_tokens=128)
        >>> question = HumanMessage("24 * 17 + 3?")
        >>> solver.invoke([question, researcher.invoke([question])]).response_metadata["avp"]["mode"]
        'kv'

    What a reasoning model writes between ``<think>`` and ``</think>`` is in ``additional_kwargs["reasoning_content"]``
    (and so a reasoning block of ``message.content_blocks``), not in the text, and is left to the chat template where
    earlier turns are rendered.

    Raises:
        ConfigurationError: An option is unknown or contradicts another.
        AvpContextOverflowError: A prompt does not fit the window. It is LangChain's `ContextOverflowError`, too; so are
            the other classes of `avp_langgraph.errors` what LangChain calls them.
        AvpError: Whatever else the engine or its store raises.
    """

    model_config = ConfigDict(populate_by_name=True, arbitrary_types_allowed=True, protected_namespaces=())

    model_name: str | None = Field(default=None, alias="model")
    """Name or folder of a Hugging Face model; None is the embedded default model."""

    max_tokens: int | None = None
    """Most tokens to decode."""

    logprobs: int | None = None
    """Return each token's log-probability and those of so many most likely ones, in the response's metadata."""

    stop: list[str] | None = Field(default=None, validation_alias=AliasChoices("stop", "stop_sequences"))
    """Strings that end the answer and are cut from it; ``stop_sequences`` is another name for it."""

    chat_template_kwargs: dict[str, Any] | None = None
    """Options of the model's chat template, such as ``{"enable_thinking": False}``."""

    namespace: str | Callable[[RunnableConfig], str] | None = None
    """The tenant, or a function that names the tenant of a run by its config, so that one graph serves many.
    Namespaces share no context, no KV-cache and no cached answer. None is the default one."""

    scope: ScopePolicy = "thread"
    """Where a handle is honoured: in the ``"thread"`` it was minted in, for its ``"user"``, or everywhere in the
    namespace (``"open"``)."""

    streaming: bool = False
    """Whether `invoke` streams to callbacks as well."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        if isinstance(values, dict):
            cls._refuse_options(values, besides=("model", "stop_sequences", *_HOSTED_ONLY))
        return values

    @model_validator(mode="after")
    def _agree_with_engine(self) -> Self:
        """An engine that was passed has a model, a store and a namespace already."""
        if self.engine is None:
            return self
        if callable(self.namespace):
            raise ConfigurationError(
                f"namespace is a function, but the engine's namespace is {self.engine.store.namespace.name!r}. Leave "
                "the engine out: chat models of one model and options share its weights, whatever their namespaces."
            )
        self._agree_with(self.engine, model_field="model_name")
        return self

    @model_validator(mode="after")
    def _never_cache_thoughts(self) -> Self:
        """A cached line would stand for a context of another thread."""
        if self.mode == "latent" and self.cache is None:
            self.cache = False
        return self

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Its configuration is; weights and engine are not part of it."""
        return True

    @property
    def _llm_type(self) -> str:
        return "avp-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        own = [name for name in AvpChatModel.model_fields if name not in BaseChatModel.model_fields]
        params = {name: getattr(self, name) for name in own if name not in ("engine", "streaming")}
        return params | {"namespace": getattr(self.namespace, "__qualname__", self.namespace)}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The cache's key: of a namespace that depends on the run, what it is in this run."""
        key = super()._get_llm_string(stop=stop, **kwargs)
        return f"{key}---{self._tenant()}" if callable(self.namespace) else key

    def _resolve_model_profile(self) -> ModelProfile | None:
        model = self.engine.model_path if self.engine is not None else self.model_name
        window = declared_window(model, self.engine_options.get("revision"))
        if window is None and self.engine is not None:
            window = self.engine.context_window
        return model_profile(self._shown_name(model), window)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = PROVIDER
        params["ls_model_name"] = self._shown_name(kwargs.get("model"))
        return params

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        pieces = [piece async for piece in self._astream(messages, stop, run_manager, **kwargs)]
        return generate_from_stream(iter(pieces))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Generator[ChatGenerationChunk]:
        call = self._call().overridden(stop, kwargs)
        plan = chunks(self._engine_for, messages, call, current_scope(self.scope))
        try:
            with closing(stream(plan)) as pieces:
                for piece in pieces:
                    chunk = ChatGenerationChunk(message=piece)
                    if run_manager:
                        run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk
        except AvpError as error:
            raise_known(error)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[ChatGenerationChunk]:
        call = self._call().overridden(stop, kwargs)
        plan = chunks(self._engine_for, messages, call, current_scope(self.scope))
        try:
            async with aclosing(astream(plan)) as pieces:
                async for piece in pieces:
                    chunk = ChatGenerationChunk(message=piece)
                    if run_manager:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk
        except AvpError as error:
            raise_known(error)

    def bind_tools(
        self,
        tools: Sequence[Tool],
        *,
        tool_choice: str | bool | Mapping[str, Any] | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with tools that it is shown and can call; its calls are always valid under the tools' schemas.

        A thought (``mode="latent"``) is made with the tools in view, and calls none.

        Args:
            tools: Functions, LangChain tools, pydantic classes, or definitions as OpenAI's API takes them.
            tool_choice: None or ``"auto"`` leaves it to the model; ``"any"``, ``"required"`` or True makes it call;
                a tool's name (or ``{"type": "function", "function": {"name": ...}}``) makes it call that one;
                ``"none"`` keeps it from calling.
            strict: Refuse schemas with keywords that cannot be enforced, instead of leaving those out.
            parallel_tool_calls: Whether an answer may hold several calls. By default it may where the model chooses
                freely, and holds one where a call is forced.
            **kwargs: What else is bound, as by `bind`.

        Raises:
            ConfigurationError: A tool or the choice is malformed.
        """
        definitions = tool_definitions(tools, strict=strict)
        Constraints(definitions, tool_choice, parallel_tool_calls, None)
        choices = {"tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls}
        return self.bind(tools=definitions, **{k: v for k, v in choices.items() if v is not None}, **kwargs)

    def with_structured_output(
        self,
        schema: Schema | None = None,
        *,
        include_raw: bool = False,
        method: Method = "json_schema",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """The model with answers that are values of a schema. They are always valid JSON, also where `max_tokens` ends.

        Args:
            schema: A pydantic class (whose objects come out), a TypedDict or a JSON schema (dicts come out).
            include_raw: Return ``{"raw": message, "parsed": ..., "parsing_error": ...}`` and raise nothing.
            method: ``"json_schema"`` shows the model the schema and keeps its answer to it; ``"json_mode"`` keeps it to
                the schema (or, without one, to any JSON object), and says nothing; ``"function_calling"`` makes it
                call a tool of that schema.
            strict: Refuse schemas with keywords that cannot be enforced, instead of leaving those out.
            **kwargs: What else is bound, as by `bind`.

        Raises:
            ConfigurationError: The schema or the method is not one of these.
        """
        return structured(self, schema, method, strict=strict, include_raw=include_raw, bound=kwargs)

    def get_token_ids(self, text: str) -> list[int]:
        """The ids of `text` by the model's own tokenizer, control tokens in it as plain text."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self._counting_engine().encode(text)

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool] | None = None,
    ) -> int:
        """Positions of the messages by the model's own template and tokenizer, latent steps included.

        Tools count as they are shown to the model. No context is looked up; a message that stands for one counts as
        its text.
        """
        turns = read_messages(messages)
        steps = sum(turn.recipe.steps for turn in turns if turn.is_thought and turn.recipe)
        rendered = [turn.message for turn in turns if not turn.is_thought]
        if not rendered:
            return steps
        count = self._counting_engine().count_tokens
        definitions = tool_definitions(tools or [])
        return steps + count(rendered, chat_template_kwargs=self.chat_template_kwargs, tools=definitions)

    def with_options(self, **options: Any) -> Self:
        """The same model with other fields."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | options)

    def _call(self) -> Call:
        own = {name: getattr(self, name) for name in type(self).model_fields if name in Call.model_fields}
        return Call.model_construct(model=self.model_name, **own)

    def _engine_for(self, model: str | None) -> Engine:
        if self.engine is not None and model == self.model_name:
            return self.engine
        return shared_engine(model, self.engine_options, namespace=self._tenant())

    def _counting_engine(self) -> Engine:
        """An engine that knows the tokenizer; counting belongs to no tenant, and needs no run."""
        if callable(self.namespace):
            return shared_engine(self.model_name, self.engine_options)
        return self._engine_for(self.model_name)

    def _tenant(self) -> str | None:
        """The namespace of the run that is going on.

        Raises:
            ConfigurationError: The function that names it gives no name.
        """
        if not callable(self.namespace):
            return self.namespace
        name = self.namespace(ensure_config())
        if not isinstance(name, str) or not name:
            raise ConfigurationError(f"namespace= gave {name!r} for this run; it must name the tenant.")
        return name

    def _shown_name(self, model: str | None = None) -> str:
        return shown_name(model or self.model_name or os.environ.get(ENVIRONMENT_VARIABLE) or NAME)
