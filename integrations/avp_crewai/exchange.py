"""One call of an LLM: find what it builds on, think and decode, and say how it went."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Never

from crewai.utilities.exceptions.context_window_exceeding_exception import LLMContextLengthExceededError

from avp_agents.agent.exchange import AnswerRequest, Made, ThinkRequest, make
from avp_agents.agent.settings import AgentSettings
from avp_agents.agent.steps import Plan, Telling, ask
from avp_agents.answer.generation import Chunk
from avp_agents.answer.options import GenerateOptions, ThinkOptions
from avp_agents.context import Context
from avp_agents.crossing.thought import TELL
from avp_agents.engine.protocol import Engine, JoinStrategy
from avp_agents.errors import ContextWindowError
from avp_agents.prompt.chat_messages import Message
from avp_crewai.handoffs import Basis, Caller, find_basis
from avp_crewai.reply import ReplyForm, ReplyReader


class AvpContextOverflowError(ContextWindowError, LLMContextLengthExceededError):
    """A `ContextWindowError` that CrewAI knows as its `LLMContextLengthExceededError`, and answers by summarising."""

    def __init__(self, error: ContextWindowError) -> None:
        super().__init__(window=error.window, context=error.context, prompt=error.prompt, requested=error.requested)
        self.original_error_message = str(error)
        # CrewAI recognises the error by these words
        self.args = (f"Context length exceeded: {error}",)


@dataclass(frozen=True)
class Outcome:
    """What came out of the engine.

    Attributes:
        made: What it made; its handoff tells of joining, too.
        basis: What it was asked.
        base: What it was answered on; of several contexts, all of them joined.
    """

    made: Made
    basis: Basis
    base: Context | None

    @property
    def positions_joined(self) -> int:
        """Positions that joining contexts computed; the answer found them there, but they are this call's own work."""
        if len(self.basis.contexts) < 2 or self.base is None or self.base.usage is None:
            return 0
        return self.base.usage.prompt_tokens - self.base.usage.positions_reused


@dataclass(frozen=True)
class Exchange:
    """One call.

    Attributes:
        engine: Who answers.
        settings: The LLM's own: whether to think before, for how long, and what to do about a lost context.
        join: How the contexts of several predecessors become one.
        summary_tokens: Tokens to decode for people behind latent steps; 0 decodes none.
        think, generate: Options for the engine.
        caller: On whose behalf.
        messages: The conversation.
        form: What the answer may be.
        reader: Reads it.
        report: Called with each piece of the answer; gives nothing out.
    """

    engine: Engine
    settings: AgentSettings
    join: JoinStrategy
    summary_tokens: int
    think: ThinkOptions
    generate: GenerateOptions
    caller: Caller
    messages: list[Message]
    form: ReplyForm
    reader: ReplyReader
    report: Callable[[Chunk], Iterable[Never]]

    @property
    def is_thought(self) -> bool:
        """Whether the answer is latent steps, with text only for people. Tool calls and structured output are text."""
        return self.settings.mode == "latent" and self.form.is_text

    def answer(self) -> Telling[Never, Outcome]:
        """Answer.

        Raises:
            AvpContextOverflowError: It does not fit the model's window.
            AvpError: As the engine and its store.
        """
        basis = yield from find_basis(
            self.caller, self.caller.run(), self.messages, self.engine, self.settings.on_missing
        )
        try:
            try:
                return (yield from self._answer_on(basis))
            except ContextWindowError:
                if basis.as_text is None:
                    raise
            return (yield from self._answer_on(basis.as_text))
        except ContextWindowError as error:
            raise AvpContextOverflowError(error) from error

    def _answer_on(self, basis: Basis) -> Telling[Never, Outcome]:
        base = next(iter(basis.contexts), None)
        is_joined = len(basis.contexts) > 1
        if is_joined:
            base = yield from self._joined(basis)
        thinking, answering = self._asked(basis)
        made = yield from make(self.engine, basis.prompt, base, thinking, answering, self.report)
        if is_joined and base is not None and base.handoff is not None:
            notes = (*base.handoff.notes, *made.handoff.notes)
            made = replace(made, handoff=replace(base.handoff, notes=notes))
        return Outcome(made, basis, base)

    def _joined(self, basis: Basis) -> Plan[Context]:
        engine, generate, strategy = self.engine, self.generate, self.join
        timeout, source = generate.get("timeout"), generate.get("source") or ""
        return (
            yield from ask(engine.join, engine.ajoin, basis.contexts, strategy=strategy, timeout=timeout, source=source)
        )

    def _asked(self, basis: Basis) -> tuple[ThinkRequest | None, AnswerRequest | None]:
        """The requests to the engine. Tools are not shown to a context again that has shown them."""
        continued, asked = basis.continued, self.settings
        has_shown = continued is not None and continued.tools == self.form.tools
        tools = [] if has_shown else self.form.definitions
        generate: GenerateOptions = {**self.form.constrain(self.generate, self.engine), "tools": tools}
        if asked.mode == "text":
            return None, AnswerRequest(generate)
        thinking = ThinkRequest(asked.latent_steps, {**self.think, "tools": tools})
        if not self.is_thought:
            return thinking, AnswerRequest({**generate, "tools": ()})
        if not self.summary_tokens:
            return thinking, None
        summary: GenerateOptions = {**generate, "tools": (), "max_tokens": self.summary_tokens}
        return thinking, AnswerRequest(summary, behind=[{"role": "user", "content": TELL}], is_aside=True)
