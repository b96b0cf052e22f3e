"""One call of an LLM: find what it builds on, think and decode, keep the context, and say how it went.

`Exchange.run` and `Exchange.arun` are the same exchange for threads and for event loops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Literal, TypedDict

from crewai.utilities.exceptions.context_window_exceeding_exception import LLMContextLengthExceededError

from avp_agents.answer.generation import Chunk, Generation
from avp_agents.answer.options import GenerateOptions, ThinkOptions
from avp_agents.answer.tool_format import ToolDefinition
from avp_agents.context import Context
from avp_agents.crossing.thought import TELL
from avp_agents.engine.protocol import Engine, JoinStrategy
from avp_agents.errors import ContextWindowError
from avp_agents.prompt.chat_messages import Message
from avp_agents.usage import Handoff, Usage
from avp_crewai.handoffs import Caller, OnMissing, Prepared, prepare
from avp_crewai.reply import ReplyForm, ReplyReader

Mode = Literal["text", "latent"]


class AvpContextOverflowError(ContextWindowError, LLMContextLengthExceededError):
    """A `ContextWindowError` that CrewAI knows as its `LLMContextLengthExceededError`, and answers by summarising."""

    def __init__(self, error: ContextWindowError) -> None:
        super().__init__(window=error.window, context=error.context, prompt=error.prompt, requested=error.requested)
        self.original_error_message = str(error)
        # CrewAI recognises the error by these words
        self.args = (f"Context length exceeded: {error}",)


class _JoinOptions(TypedDict):
    strategy: JoinStrategy
    timeout: float | None
    source: str


@dataclass(frozen=True)
class Call:
    """What one call asks for.

    Attributes:
        mode: Whether to run latent steps before, and decode only what has to be read.
        latent_steps: How many.
        summary_tokens: Tokens to decode for people behind latent steps; 0 decodes none.
        think, generate: Options for the engine.
        on_missing: What to do about a context that is lost.
        join: How the contexts of several predecessors become one.
    """

    mode: Mode
    latent_steps: int
    summary_tokens: int
    think: ThinkOptions
    generate: GenerateOptions
    on_missing: OnMissing
    join: JoinStrategy


@dataclass(frozen=True)
class Outcome:
    """What came out of the engine.

    Attributes:
        prepared: What it was asked.
        context: What is handed on. Behind a thought, text that was decoded for people is not in it.
        text: What was decoded; empty where nothing was.
        usage: What it cost, all steps of the call together.
        handoff: How the contexts it built on were used.
        finish_reason: Why it ended.
        base: What it was answered on; of several contexts, all of them joined.
    """

    prepared: Prepared
    context: Context
    text: str
    usage: Usage
    handoff: Handoff
    finish_reason: str
    base: Context | None

    @property
    def is_joined(self) -> bool:
        """Whether several contexts were joined for it."""
        return len(self.prepared.contexts) > 1


@dataclass(frozen=True)
class Exchange:
    """One call.

    Attributes:
        engine: Who answers.
        call: What is asked for.
        caller: On whose behalf.
        messages: The conversation.
        form: What the answer may be.
        reader: Reads it.
        on_chunk: Called with each piece of the answer.
    """

    engine: Engine
    call: Call
    caller: Caller
    messages: list[Message]
    form: ReplyForm
    reader: ReplyReader
    on_chunk: Callable[[Chunk], None]

    @property
    def is_thought(self) -> bool:
        """Whether the answer is latent steps, with text only for people. Tool calls and structured output are text."""
        return self.call.mode == "latent" and self.form.is_text

    def run(self) -> Outcome:
        """Answer.

        Raises:
            AvpContextOverflowError: It does not fit the model's window.
            AvpError: As the engine and its store.
        """
        prepared = self._prepare()
        try:
            return self._answer(prepared)
        except ContextWindowError as error:
            if prepared.as_text is None:
                raise AvpContextOverflowError(error) from error
        try:
            return self._answer(prepared.as_text)
        except ContextWindowError as error:
            raise AvpContextOverflowError(error) from error

    async def arun(self) -> Outcome:
        """`run` on an event loop, which it does not block; cancelling the task ends the request in the engine."""
        prepared = await asyncio.to_thread(self._prepare)
        try:
            return await self._aanswer(prepared)
        except ContextWindowError as error:
            if prepared.as_text is None:
                raise AvpContextOverflowError(error) from error
        try:
            return await self._aanswer(prepared.as_text)
        except ContextWindowError as error:
            raise AvpContextOverflowError(error) from error

    def _prepare(self) -> Prepared:
        return prepare(self.caller, self.caller.run(), self.messages, self.engine, self.call.on_missing)

    def _answer(self, prepared: Prepared) -> Outcome:
        call, prompt, base = self.call, prepared.prompt, next(iter(prepared.contexts), None)
        if len(prepared.contexts) > 1:
            base = self.engine.join(prepared.contexts, **self._join_options)
        if call.mode == "text":
            return self._answered(prepared, base, None, self._generate(prompt, base, self._shown_tools(prepared)))
        options = {**call.think, "tools": self._shown_tools(prepared)}
        thought = self.engine.think(prompt, steps=call.latent_steps, context=base, **options)
        said = self._generate(self._asked_behind, thought) if self._decodes_behind_thought else None
        return self._answered(prepared, base, thought, said)

    async def _aanswer(self, prepared: Prepared) -> Outcome:
        call, prompt, base = self.call, prepared.prompt, next(iter(prepared.contexts), None)
        if len(prepared.contexts) > 1:
            base = await self.engine.ajoin(prepared.contexts, **self._join_options)
        if call.mode == "text":
            said = await self._agenerate(prompt, base, self._shown_tools(prepared))
            return self._answered(prepared, base, None, said)
        options = {**call.think, "tools": self._shown_tools(prepared)}
        thought = await self.engine.athink(prompt, steps=call.latent_steps, context=base, **options)
        said = await self._agenerate(self._asked_behind, thought) if self._decodes_behind_thought else None
        return self._answered(prepared, base, thought, said)

    @property
    def _decodes_behind_thought(self) -> bool:
        return not self.is_thought or self.call.summary_tokens > 0

    @property
    def _asked_behind(self) -> list[Message]:
        """What is said behind a thought: its summary is asked for, an answer just goes on."""
        return [{"role": "user", "content": TELL}] if self.is_thought else []

    def _shown_tools(self, prepared: Prepared) -> list[ToolDefinition]:
        """The tools that the model is to be shown: none where the context that goes on has shown them."""
        continued = prepared.continued
        return [] if continued is not None and continued.tools == self.form.tools else self.form.definitions

    def _options(self, tools: Sequence[ToolDefinition]) -> GenerateOptions:
        options: GenerateOptions = {**self.form.constrain(self.call.generate, self.engine), "tools": tools}
        return {**options, "max_tokens": self.call.summary_tokens} if self.is_thought else options

    @property
    def _join_options(self) -> _JoinOptions:
        generate = self.call.generate
        return {"strategy": self.call.join, "timeout": generate.get("timeout"), "source": generate.get("source") or ""}

    def _generate(
        self, prompt: list[Message], context: Context | None, tools: Sequence[ToolDefinition] = ()
    ) -> Generation:
        generation = None
        with closing(self.engine.stream(prompt, context=context, **self._options(tools))) as chunks:
            for chunk in chunks:
                generation = chunk.generation
                self.on_chunk(chunk)
        assert generation is not None, "an engine's stream ends with its generation"
        return generation

    async def _agenerate(
        self, prompt: list[Message], context: Context | None, tools: Sequence[ToolDefinition] = ()
    ) -> Generation:
        generation = None
        async with aclosing(self.engine.astream(prompt, context=context, **self._options(tools))) as chunks:
            async for chunk in chunks:
                generation = chunk.generation
                self.on_chunk(chunk)
        assert generation is not None, "an engine's stream ends with its generation"
        return generation

    def _answered(
        self, prepared: Prepared, base: Context | None, thought: Context | None, said: Generation | None
    ) -> Outcome:
        if thought is None:
            assert said is not None
            usage, handoff = said.usage, said.handoff
        else:
            usage, handoff = thought.usage or Usage(), thought.handoff or Handoff()
            if said is not None:
                usage = _together(usage, said.usage)
        handed_on = thought if said is None or self.is_thought else said.context
        assert handed_on is not None
        return Outcome(
            prepared=prepared,
            context=handed_on,
            text=said.text if said is not None else "",
            usage=usage,
            handoff=handoff,
            finish_reason="stop" if said is None or self.is_thought else said.finish_reason,
            base=base,
        )


def _together(thinking: Usage, decoding: Usage) -> Usage:
    """The cost of latent steps and of what was decoded behind them: one prompt, read once."""
    return Usage(
        prompt_tokens=thinking.prompt_tokens,
        positions_reused=thinking.positions_reused,
        latent_steps=thinking.latent_steps,
        completion_tokens=decoding.completion_tokens,
        queue_seconds=thinking.queue_seconds + decoding.queue_seconds,
        prefill_seconds=thinking.prefill_seconds + decoding.prefill_seconds,
        latent_seconds=thinking.latent_seconds,
        decode_seconds=decoding.decode_seconds,
    )
