"""AvpLLM: an open-weight model in this process for CrewAI's agents, which hands its context on instead of text.

    researcher = Agent(role="Researcher", ..., llm=AvpLLM(mode="latent"))     # thinks; decodes nothing
    solver = Agent(role="Solver", ..., llm=AvpLLM())                          # answers on top of that

A crew stays as it is: which context a task builds on follows from the crew itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Never, Self

from crewai.events.types.llm_events import LLMCallType
from crewai.hooks.dispatch import HookAborted
from crewai.llms.base_llm import BaseLLM, LLMCallBlockedError, llm_call_context
from crewai.llms.context_window import CONTEXT_WINDOW_USAGE_RATIO
from pydantic import BaseModel, Field, model_validator

from avp_agents.agent.exchange import generate_options, one_line, think_options
from avp_agents.agent.settings import AgentSettings
from avp_agents.agent.steps import Telling, arun, in_thread, run
from avp_agents.answer.generation import Chunk
from avp_agents.answer.options import GenerateOptions
from avp_agents.engine.protocol import Engine, JoinStrategy
from avp_agents.engine.registry import shared_engine
from avp_agents.errors import ConfigurationError
from avp_agents.handle import ContextHandle
from avp_agents.models.embedded import ENVIRONMENT_VARIABLE, NAME
from avp_crewai.answers import THOUGHT_LINE, thought_line, usage_of
from avp_crewai.exchange import Exchange, Outcome
from avp_crewai.handoffs import Caller
from avp_crewai.messages import read_messages
from avp_crewai.registration import LLM_TYPE
from avp_crewai.reply import Reply, ReplyForm
from avp_crewai.runs import PastCall

if TYPE_CHECKING:
    from crewai.agents.agent_builder.base_agent import BaseAgent
    from crewai.task import Task
    from crewai.utilities.types import LLMMessage

_counting = threading.Lock()
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "timeout")


class AvpLLM(BaseLLM, AgentSettings):
    """An LLM for CrewAI that runs in this process and can hand over what it thought instead of what it wrote.

    No weights are loaded when it is made: the first call looks the engine up, which LLMs of the same model and options
    share. How to think, to sample and to find the engine are the fields of `AgentSettings`; those that are None leave
    the engine's default. Structured output and tool calls are decoded in latent mode, too, behind the thought.

    Inside of a crew, a task's answer leaves a context, and the next task's prompt is answered on top of it: the text
    that CrewAI puts into the prompt for it is left out. Tool results and retries continue the task's own context. When
    the kickoff ends, its contexts are deleted; see `handover` for keeping them.

    Example:
        >>> researcher = Agent(role="Researcher", goal=..., backstory=..., llm=AvpLLM(mode="latent", latent_steps=20))
        >>> solver = Agent(role="Solver", goal=..., backstory=..., llm=AvpLLM(max_tokens=256))

    Raises:
        ConfigurationError: An option is unknown or contradicts another. Pydantic wraps it into its `ValidationError`.
        AvpContextOverflowError: A prompt does not fit the window. It is CrewAI's `LLMContextLengthExceededError`, too.
        AvpError: Whatever else the engine or its store raises.
    """

    llm_type: str = LLM_TYPE
    provider: str = "avp"

    model: str = ""
    """Name or folder of a Hugging Face model; by default the embedded default model."""

    latent_steps: int = Field(default=20, ge=1)
    """Latent steps in latent mode; 10 to 20 are usual, more than 40 degrade."""

    latent_line: str = THOUGHT_LINE
    """What people and CrewAI read of an agent that only thought; ``{agent}``, ``{steps}``, ``{positions}`` are filled
    in."""

    summary_tokens: int = Field(default=0, ge=0)
    """Decode so many tokens of what was thought, to be read instead of the line. They are not handed over."""

    native_tools: bool = True
    """Whether agents call tools by constrained decoding, which always gives a well-formed call. Otherwise CrewAI asks
    for calls in its text format (Thought, Action, Action Input)."""

    join_strategy: JoinStrategy = "replay"
    """How the contexts of several predecessors become one; see `avp_agents.engine.join`."""

    namespace: str | None = None
    """The tenant. Namespaces share no context and no KV-cache. None is the default one."""

    @model_validator(mode="before")
    @classmethod
    def _read_options(cls, options: Any) -> Any:
        """A misspelt option would otherwise be ignored; a model that is not named is the default one."""
        if not isinstance(options, dict):
            return options
        cls._refuse_options([*options, *(options.get("additional_params") or {})], besides=["stop_sequences"])
        engine = options.get("engine")
        model = options.get("model") or (_default_name() if engine is None else engine.model_path)
        return {**options, "model": str(model), "provider": options.get("provider") or "avp"}

    @model_validator(mode="after")
    def _check(self) -> Self:
        """What other LLMs can do and this one cannot; and an engine has a model, a store and a namespace already."""
        if self.frequency_penalty or self.presence_penalty:
            raise ConfigurationError(
                "frequency_penalty and presence_penalty do not exist here; use repetition_penalty."
            )
        if self.n not in (None, 1):
            raise ConfigurationError("n must be 1: a call has one answer.")
        if self.engine is not None:
            self._agree_with(self.engine, model_field="model")
        return self

    def call(
        self,
        messages: str | list[LLMMessage],
        tools: list[dict[str, Any]] | None = None,
        callbacks: list[Any] | None = None,
        available_functions: dict[str, Any] | None = None,
        from_task: Task | None = None,
        from_agent: BaseAgent | None = None,
        response_model: type[BaseModel] | None = None,
    ) -> str | Any:
        """Answer.

        Args:
            messages: A string or messages, with their roles.
            tools: Tools in OpenAI's form that the model may call.
            callbacks: Only reported; CrewAI counts tokens by `get_token_usage_summary`.
            available_functions: What to run when the model calls a tool. Without it the calls are the answer.
            from_task: The task, which decides what the answer builds on.
            from_agent: The agent.
            response_model: The answer is an instance of this model.

        Returns:
            Text; an instance of `response_model`; or tool calls, as dicts in OpenAI's form (with
            `available_functions`: what the first one returned).

        Raises:
            As the class says.
        """
        caller = Caller(from_task, from_agent)
        return run(self._answered(caller, messages, tools, callbacks, available_functions, response_model))

    async def acall(
        self,
        messages: str | list[LLMMessage],
        tools: list[dict[str, Any]] | None = None,
        callbacks: list[Any] | None = None,
        available_functions: dict[str, Any] | None = None,
        from_task: Task | None = None,
        from_agent: BaseAgent | None = None,
        response_model: type[BaseModel] | None = None,
    ) -> str | Any:
        """`call` on an event loop, which it does not block; cancelling the task ends the request in the engine."""
        caller = Caller(from_task, from_agent)
        return await arun(self._answered(caller, messages, tools, callbacks, available_functions, response_model))

    def supports_function_calling(self) -> bool:
        """Whether CrewAI may pass tools; see `native_tools`."""
        return self.native_tools

    def supports_stop_words(self) -> bool:
        """Yes: the engine stops at them, across token boundaries."""
        return True

    def get_context_window_size(self) -> int:
        """Positions that CrewAI may use: those of the model's window, less the share that CrewAI keeps in reserve."""
        return int(self._engine().context_window * CONTEXT_WINDOW_USAGE_RATIO)

    def get_input_tokens_count(
        self,
        messages: str | list[LLMMessage],
        tools: list[dict[str, Any]] | None = None,
        response_model: type[BaseModel] | None = None,
    ) -> int:
        """Positions of the prompt by the model's own template and tokenizer, contexts of other tasks not counted."""
        form = ReplyForm(tools or (), response_model)
        prompt = form.instructed(read_messages(self._format_messages(messages)))
        return self._engine().count_tokens(prompt, tools=form.definitions)

    def to_config_dict(self) -> dict[str, Any]:
        """The options that make such an LLM again: ``AvpLLM(**llm.to_config_dict())``. No engine, no weights."""
        return self.model_dump(exclude_defaults=True, exclude={"engine"})

    def __copy__(self) -> Self:
        """A copy with the same engine and a count of its own: each crew that `kickoff_for_each` makes counts alone."""
        copied = super().__copy__()
        copied._token_usage = dict.fromkeys(self._token_usage, 0)
        return copied

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A deep copy with the same engine: weights are never copied."""
        copied = super().__deepcopy__({**(memo or {}), id(self.engine): self.engine})
        copied._token_usage = dict.fromkeys(self._token_usage, 0)
        return copied

    def _engine(self) -> Engine:
        """The engine that was passed, or the process's own for this model. Weights are loaded at the first use."""
        if self.engine is not None:
            return self.engine
        model = None if self.model == _default_name() else self.model
        return shared_engine(model, self.engine_options, namespace=self.namespace)

    def _answered(
        self,
        caller: Caller,
        messages: Any,
        tools: list[dict[str, Any]] | None,
        callbacks: Any,
        available_functions: dict[str, Any] | None,
        response_model: type[BaseModel] | None,
    ) -> Telling[Never, Any]:
        with self._reported(caller, messages, tools, callbacks, available_functions) as formatted:
            form = ReplyForm(tools or (), response_model)
            engine = yield from in_thread(self._engine)
            exchange = self._exchange(engine, caller, formatted, form)
            outcome = yield from exchange.answer()
            return (yield from in_thread(self._reply, exchange, outcome, formatted, available_functions))

    def _exchange(self, engine: Engine, caller: Caller, formatted: list[LLMMessage], form: ReplyForm) -> Exchange:
        reader = form.reader(engine)

        def report(chunk: Chunk) -> tuple[Never, ...]:
            if chunk.reasoning and is_streaming:
                self._emit_thinking_chunk_event(chunk.reasoning, caller.task, caller.agent)
            for piece, tool_call in reader.told(chunk):
                if is_streaming and (piece or tool_call):
                    kind = LLMCallType.TOOL_CALL if tool_call else LLMCallType.LLM_CALL
                    self._emit_stream_chunk_event(piece, caller.task, caller.agent, tool_call, kind)
            return ()

        is_streaming = bool(self._effective_stream()) and not (self.mode == "latent" and form.is_text)
        messages = read_messages(formatted)
        if caller.task is None:  # CrewAI writes the schema into the prompts of tasks
            messages = form.instructed(messages)
        kickoff = caller.run()
        source = "" if kickoff is None else kickoff.scope
        return Exchange(
            engine=engine,
            settings=self,
            join=self.join_strategy,
            summary_tokens=self.summary_tokens,
            think=think_options(vars(self), source),
            generate=self._generate_options(form, source),
            caller=caller,
            messages=messages,
            form=form,
            reader=reader,
            report=report,
        )

    def _generate_options(self, form: ReplyForm, source: str) -> GenerateOptions:
        """The options of one answer, with those that CrewAI set for this call alone."""
        generate = generate_options({name: getattr(self, name) for name in _SAMPLING}, source)
        if self.max_tokens is not None:
            generate["max_tokens"] = int(self.max_tokens)
        if form.is_text:
            # CrewAI refuses an empty answer, so a turn is not ended, or stopped, before its first token
            generate |= {"stop": self.stop_sequences, "min_tokens": 1}
        return generate

    @contextmanager
    def _reported(
        self, caller: Caller, messages: Any, tools: Any, callbacks: Any, available_functions: Any
    ) -> Generator[list[LLMMessage]]:
        """Tell CrewAI that a call begins, and if it fails; yields the messages after CrewAI's hooks."""
        task, agent = caller.task, caller.agent
        with llm_call_context():
            try:
                self._emit_call_started_event(messages, tools, callbacks, available_functions, task, agent)
                formatted = self._format_messages(messages)
                self._invoke_before_llm_call_hooks(formatted, agent)
                yield formatted
            except (HookAborted, LLMCallBlockedError) as denial:
                self._emit_call_denied_event(denial, task, agent)
                raise
            except Exception as error:
                self._emit_call_failed_event(f"{type(error).__name__}: {error}", task, agent)
                raise

    def _reply(
        self,
        exchange: Exchange,
        outcome: Outcome,
        formatted: list[LLMMessage],
        available_functions: dict[str, Any] | None,
    ) -> Any:
        """Keep the context, count, tell CrewAI that the call is complete, and give the answer in CrewAI's form."""
        caller, usage = exchange.caller, usage_of(outcome)
        with _counting:
            self._track_token_usage_internal(usage)
        reply = exchange.reader.reply(self._text(exchange, outcome))
        self._keep(exchange, outcome, reply, usage["avp"])
        self._emit_call_completed_event(
            reply.value, reply.call_type, caller.task, caller.agent, formatted, usage, outcome.made.finish_reason
        )
        if reply.answer.tool_calls and available_functions:
            name, arguments = reply.answer.tool_calls[0]
            return self._handle_tool_execution(name, arguments, available_functions, caller.task, caller.agent)
        if isinstance(reply.value, str):
            return self._invoke_after_llm_call_hooks(formatted, reply.value, caller.agent)
        return reply.value

    def _text(self, exchange: Exchange, outcome: Outcome) -> str:
        """What is read of an outcome: what was decoded, or the line of an agent that only thought."""
        if not exchange.is_thought or outcome.made.text.strip():
            return outcome.made.text
        return thought_line(self.latent_line, outcome, exchange.caller.role)

    def _keep(self, exchange: Exchange, outcome: Outcome, reply: Reply, metadata: dict[str, Any]) -> None:
        """Store the context, where the call belongs to a kickoff or a `handover` block."""
        caller, basis = exchange.caller, outcome.basis
        kickoff = caller.run()
        if kickoff is None:
            return
        store = exchange.engine.store

        def note(handle: ContextHandle) -> PastCall:
            metadata["handle"] = handle.id
            return PastCall(
                key=caller.key,
                messages=exchange.messages,
                put_in=basis.put_in,
                tools=exchange.form.tools,
                answer=reply.answer,
                outputs=reply.outputs,
                handle=handle,
                store=store,
                metadata=metadata,
            )

        line = one_line(reply.answer.text)
        kickoff.keep(outcome.made.context, store, note, basis.continued, agent=caller.role, text=line)


def _default_name() -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE) or NAME
