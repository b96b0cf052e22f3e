"""Chat messages through the tokenizer's own template to token ids: whole prompts, and turns behind an open turn.

An appended turn is rendered behind two sentinel turns (user, assistant) and cut behind the assistant's sentinel
content. What is left is the end of the assistant's turn, the new turns and the generation prompt: no default system
block and no second BOS, which templates put at the start only.

A template may refuse messages (raise), drop them, or move them to the front, out of an appended turn. Each arrangement
of the messages is therefore tried with one unique word per message first: all words must come out, behind the cut.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from avp_agents.answer.tool_format import ToolFormat
from avp_agents.errors import PromptError
from avp_agents.prompt.chat_messages import ChatDict, arrangements
from avp_agents.prompt.encoder import PromptEncoder
from avp_agents.prompt.tool_trial import Trial

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rendering:
    """Token ids that end in an open assistant turn, and what was changed to please the template."""

    token_ids: tuple[int, ...]
    notes: tuple[str, ...]


class _RefusedError(ValueError):
    """The template raised, dropped a message, or did not open an assistant turn."""


class TurnRenderer:
    """Renders chat messages with one tokenizer's template. Safe to use from many threads.

    Attributes:
        end_of_turn: The id with which the template ends an assistant's turn, if it has one.
        shown_tools: What shows the model its tools behind a context that did not; nothing where there are none.
        keeps_opening: An earlier answer stands behind the same tokens that opened its turn. Not so where the template
            opens a turn with reasoning (or an empty piece of it) that it leaves out later.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encoder: PromptEncoder,
        template_options: Mapping[str, Any],
        tools_text: str = "",
    ) -> None:
        self._tokenizer, self._encoder = tokenizer, encoder
        self.shown_tools: list[ChatDict] = [{"role": "system", "content": tools_text}] if tools_text else []
        self._options = {name: encoder.mark(value) for name, value in template_options.items()}
        self._nonce = f"{secrets.randbelow(10**18):018d}"
        self._cut_word = self._word("cut")
        self._sentinels = [
            {"role": "user", "content": self._word("before")},
            {"role": "assistant", "content": self._cut_word},
        ]
        self.end_of_turn = self._first_control_after_answer([])
        self._end_of_earlier_turn = (
            self._first_control_after_answer([{"role": "user", "content": self._word("after")}])
            if self.end_of_turn is not None
            else None
        )
        self.keeps_opening = self._opens_alike()
        self._drops_calls = self._ignores_calls()

    def whole(self, messages: Sequence[ChatDict]) -> Rendering:
        """A whole prompt: the messages and the generation prompt.

        Raises:
            PromptError: The template refuses the messages in every arrangement.
        """
        if self.shown_tools and "tools" not in self._options:
            messages = _behind_tools(self.shown_tools, messages)
        return self._render(messages, [])

    def tool_format(self) -> ToolFormat | None:
        """The template's own format of tool calls; None where it has none."""
        options = dict(self._options)

        def apply(conversation: list[ChatDict]) -> str:
            return self._apply(conversation, open_turn=False, options={**options, "tools": [trial.tool()]})

        trial = Trial(apply, self._encoder, lambda id_: id_ == self.end_of_turn, self._word)
        return trial.read()

    def appended(self, messages: Sequence[ChatDict], *, turn_ended: bool) -> Rendering:
        """What follows an open assistant turn: its end, the messages, and the generation prompt.

        Args:
            messages: The turns to append; none opens a new assistant turn at once.
            turn_ended: The open turn already ends in its end-of-turn id; only what follows that id is rendered.

        Raises:
            PromptError: The template refuses the messages in every arrangement.
        """
        rendering = self._render(messages, self._sentinels)
        if turn_ended and self._end_of_earlier_turn is not None:
            start = rendering.token_ids.index(self._end_of_earlier_turn) + 1
            return Rendering(rendering.token_ids[start:], rendering.notes)
        return rendering

    def around_user_content(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids between an answer and the content of the user's turn behind it, and those from there to the next
        answer.

        Raises:
            PromptError: The template does not render such a conversation.
        """
        word = self._word("content")
        try:
            text = self._behind_cut(self._apply([*self._sentinels, {"role": "user", "content": word}]))
        except _RefusedError as error:
            raise PromptError(f"The tokenizer's chat template cannot render a conversation: {error}") from error
        before, _, after = text.partition(word)
        return self._encoder.encode(before, continued=True), self._encoder.encode(after, continued=True)

    def _render(self, messages: Sequence[ChatDict], opening: list[ChatDict]) -> Rendering:
        refusal: _RefusedError | None = None
        for arranged, notes in arrangements(messages, drops_calls=self._drops_calls):
            try:
                text = self._text(arranged, opening)
            except _RefusedError as error:
                refusal = error
            else:
                return Rendering(self._encoder.encode(text, continued=bool(opening)), notes)
        raise PromptError(f"The tokenizer's chat template cannot render these messages: {refusal}") from refusal

    def _text(self, messages: list[ChatDict], opening: list[ChatDict]) -> str:
        self._try_words(messages, opening)
        conversation = [*opening, *self._encoder.mark(messages)]
        text = self._apply(conversation)
        if conversation[-1]["role"] == "assistant" and text == self._apply(conversation, open_turn=False):
            raise _RefusedError("it opens no assistant turn after an assistant message; add a user message")
        return self._behind_cut(text) if opening else text

    def _try_words(self, messages: list[ChatDict], opening: list[ChatDict]) -> None:
        """Render the messages' structure with a unique word in each; see the module's summary."""
        words = [self._word(str(i)) for i in range(len(messages))]
        text = self._apply([*opening, *map(_with_word, messages, words)])
        if opening:
            text = self._behind_cut(text)
        for word, message in zip(words, messages, strict=True):
            if word not in text:
                what = "tool calls" if "tool_calls" in message else f"{message['role']} message"
                raise _RefusedError(f"it drops or moves the {what}")

    def _apply(
        self, conversation: list[ChatDict], *, open_turn: bool = True, options: Mapping[str, Any] | None = None
    ) -> str:
        options = self._options if options is None else options
        try:
            text = self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=open_turn, **options
            )
        except Exception as error:  # a template is foreign code; whatever it raises is its refusal
            raise _RefusedError(str(error) or type(error).__name__) from error
        return str(text)

    def _behind_cut(self, text: str) -> str:
        _, found, rest = text.partition(self._cut_word)
        if not found or self._cut_word in rest:
            raise _RefusedError("it does not render an assistant message exactly once")
        return rest

    def _first_control_after_answer(self, following: list[ChatDict]) -> int | None:
        """The first control id between the sentinel answer and the content that follows it."""
        try:
            rest = self._behind_cut(self._apply([*self._sentinels, *following], open_turn=False))
        except _RefusedError:  # the template takes no such conversation; `appended` says so when it is asked for one
            return None
        closing = rest.partition(following[0]["content"])[0] if following else rest
        return next((id_ for id_ in self._encoder.encode(closing) if id_ in self._encoder.control_ids), None)

    def _opens_alike(self) -> bool:
        """Whether an answer with a message behind it begins with what opened its turn."""
        following = {"role": "user", "content": self._word("after")}
        try:
            return self._apply([*self._sentinels, following]).startswith(self._apply(self._sentinels[:1]))
        except _RefusedError:  # the template takes no such conversation; `whole` says so when it is asked for one
            return True

    def _ignores_calls(self) -> bool:
        """Whether the template renders a message with a tool call, but not the call."""
        word = self._word("call")
        call = {"type": "function", "id": "call00000", "function": {"name": word, "arguments": {"argument": word}}}
        try:
            text = self._apply([self._sentinels[0], {"role": "assistant", "content": "", "tool_calls": [call]}])
        except _RefusedError:  # it may take such calls as there are; `whole` and `appended` see
            return False
        return word not in text

    def _word(self, name: str) -> str:
        return f"w{self._nonce}{name}w"


def _behind_tools(shown_tools: list[ChatDict], messages: Sequence[ChatDict]) -> list[ChatDict]:
    """A whole prompt whose template cannot show tools: they stand in the system message."""
    if not messages or messages[0]["role"] != "system":
        return [*shown_tools, *messages]
    first = {**messages[0], "content": f"{messages[0]['content']}\n\n{shown_tools[0]['content']}"}
    return [first, *messages[1:]]


def _with_word(message: ChatDict, word: str) -> ChatDict:
    """The message with `word` as its content, or as an argument of each of its tool calls."""
    if "tool_calls" not in message:
        return {**message, "content": word}
    return {**message, "tool_calls": [_call_with_word(call, word) for call in message["tool_calls"]]}


def _call_with_word(call: dict[str, Any], word: str) -> dict[str, Any]:
    function = call.get("function", call)
    arguments: Any = {"argument": word}
    if isinstance(function.get("arguments"), str):
        arguments = json.dumps(arguments)
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function
