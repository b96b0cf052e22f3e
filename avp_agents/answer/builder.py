"""One answer, from token ids to text, reasoning and the whole `Generation`; every engine builds it here.

A reasoning model's answer is split while it is decoded: what is between ``<think>`` and ``</think>``, and the text. A
model reasons first, or not at all: markers further on in an answer are text. Line breaks around the markers belong to
neither part; templates write them back when they render the reasoning of an earlier turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from avp_agents.answer.detokenizer import TextStream
from avp_agents.answer.generation import Chunk, FinishReason, Generation, TokenLogprob
from avp_agents.context import Context
from avp_agents.usage import Handoff, Usage

OPENING, CLOSING = "<think>", "</think>"

Place = Literal["start", "reasoning", "gap", "text"]
"""Before anything but white space; between the markers; in the line breaks behind them; in the text."""


class AnswerBuilder:
    """Takes an answer's tokens one by one, and sees where it ends.

    Args:
        max_tokens: Most tokens of the answer.
        stop_ids: Ids that end it.
        text: Ids to text; it looks for stop strings.
        split: Tells reasoning from text.
        token_text: A token's text.
        logprobs: Whether log-probabilities are asked for.

    Attributes:
        ids: The tokens so far.
        finish_reason: None while more tokens are wanted.
    """

    def __init__(
        self,
        max_tokens: int,
        stop_ids: frozenset[int],
        text: TextStream,
        split: ReasoningSplit,
        token_text: Callable[[int], str],
        *,
        logprobs: bool,
    ) -> None:
        self._max_tokens, self._stop_ids = max_tokens, stop_ids
        self._text, self._split, self.token_text = text, split, token_text
        self._logprobs: list[TokenLogprob] | None = [] if logprobs else None
        self._last = Chunk("")
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None

    def take(
        self,
        token_id: int,
        logprob: float | None = None,
        top: tuple[tuple[int, float], ...] = (),
        *,
        cut: bool = False,
    ) -> Chunk:
        """Take a token; returns what of reasoning and text has become final with it.

        Args:
            token_id: The token.
            logprob: Its log-probability, where asked for.
            top: The most likely ids with theirs.
            cut: A grammar brings the answer to its end because `max_tokens` would not suffice.
        """
        self.ids.append(token_id)
        if token_id in self._stop_ids:
            self.finish_reason = "length" if cut else "stop"
            delta = self._text.finish()
        else:
            delta = self._text.feed(token_id)
            if len(self.ids) >= self._max_tokens:
                self.finish_reason = "length"
                delta += self._text.finish()
            if self._text.stopped:
                self.finish_reason = "stop"
        reasoning, text = self._split.feed(delta, last=self.finish_reason is not None)
        self._last = Chunk(text, (token_id,), logprobs=self._noted(token_id, logprob, top), reasoning=reasoning)
        return self._last

    def close(self) -> None:
        """End the answer as it is."""
        self.finish_reason = "stop"
        reasoning, text = self._split.feed(self._text.finish(), last=True)
        self._last = Chunk(text, reasoning=reasoning)

    @property
    def lineage_ids(self) -> tuple[int, ...]:
        """What stays of the tokens: everything, or, after a stop string, what lies before it."""
        return self._text.lineage_ids() if self._text.stopped else tuple(self.ids)

    @property
    def reasoning_tokens(self) -> int:
        """Tokens before the text."""
        return self._split.pieces

    def finish(self, context: Context, usage: Usage, handoff: Handoff) -> Chunk:
        """The last chunk, with the whole answer."""
        assert self.finish_reason is not None
        ids = self.lineage_ids
        generation = Generation(
            text=self._split.text,
            token_ids=ids,
            context=context,
            usage=usage,
            handoff=handoff,
            finish_reason=self.finish_reason,
            logprobs=tuple(self._logprobs) if self._logprobs is not None else None,
            reasoning=self._split.reasoning,
        )
        token_ids = self._last.token_ids if ids == tuple(self.ids) else ()
        return replace(self._last, token_ids=token_ids, generation=generation)

    def _noted(
        self, token_id: int, logprob: float | None, top: tuple[tuple[int, float], ...]
    ) -> tuple[TokenLogprob, ...]:
        if logprob is None or self._logprobs is None:
            return ()
        entry = TokenLogprob(token_id, self.token_text(token_id), logprob, top)
        self._logprobs.append(entry)
        return (entry,)


class ReasoningSplit:
    """Splits one answer, piece by piece. What was given out is never taken back.

    Attributes:
        reasoning, text: Everything given out so far.
        pieces: How many of the pieces fed so far came before the text; 0 where the model does not reason.

    Args:
        begins: Where the answer begins: ``"reasoning"`` where the prompt ends in the opening marker, ``"start"`` where
            the model may write that, ``"text"`` where it has no such marker.

    Example:
        >>> split = ReasoningSplit("start")
        >>> split.feed("<think>\\n24 * 17 = 408\\n</thi"), split.feed("nk>\\n\\n411", last=True)
        (('24 * 17 = 408', ''), ('', '411'))
    """

    def __init__(self, begins: Literal["start", "reasoning", "text"]) -> None:
        self.reasoning = self.text = ""
        self.pieces = 0
        self._place: Place = begins
        self._held = ""

    def feed(self, piece: str, *, last: bool = False) -> tuple[str, str]:
        """Take the next piece; returns the reasoning and the text, each perhaps empty, that have become certain."""
        self._held += piece
        if self._place == "start":
            self._look_for_opening(last)
        reasoning = self._take_reasoning(last) if self._place == "reasoning" else ""
        if self._place == "gap":
            self._held = self._held.lstrip("\n")
            self._place = "text" if self._held else "gap"
        text = self._take_all() if self._place == "text" else ""
        self.reasoning += reasoning
        self.text += text
        self.pieces += self._place != "text"
        return reasoning, text

    def _look_for_opening(self, last: bool) -> None:
        begun = self._held.lstrip()
        if begun.startswith(OPENING):
            self._place, self._held = "reasoning", begun[len(OPENING) :]
        elif last or not OPENING.startswith(begun):
            self._place, self.pieces = "text", 0

    def _take_reasoning(self, last: bool) -> str:
        if not self.reasoning:
            self._held = self._held.lstrip("\n")
        reasoning, closed, rest = self._held.partition(CLOSING)
        if closed:
            self._place, self._held = "gap", rest
            return reasoning.rstrip("\n")
        if last:
            return self._take_all().rstrip("\n")
        certain = self._held[: len(self._held) - _begun(self._held, CLOSING)].rstrip("\n")
        self._held = self._held[len(certain) :]
        return certain

    def _take_all(self) -> str:
        taken, self._held = self._held, ""
        return taken


def _begun(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker`."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-n:])), 0)
