"""One answer, from token ids to text, reasoning and the whole `Generation`; every engine builds it here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from avp_agents.answer.detokenizer import TextStream
from avp_agents.answer.generation import Chunk, FinishReason, Generation, TokenLogprob
from avp_agents.answer.reasoning import ReasoningSplit
from avp_agents.context import Context
from avp_agents.usage import Handoff, Usage


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
