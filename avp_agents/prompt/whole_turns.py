"""What stands between two turns of a conversation, and turns that are not left open; joining contexts needs both."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from avp_agents.answer.builder import CLOSING
from avp_agents.context import Context, Segment, TokenSegment
from avp_agents.prompt.chat_template import TurnRenderer
from avp_agents.prompt.encoder import PromptEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PARAGRAPH = "\n\n"
_NOTHING: tuple[int, ...] = ()


class WholeTurns:
    """The boundaries of one model's turns. Without a chat template, paragraphs stand for turns.

    Attributes:
        bos: What a prompt starts with, before its first turn.
        end: Ids that end an open assistant turn; the last one marks the end of a turn.
        gap: Ids between that and the next turn, such as a newline.

    Args:
        tokenizer: The model's.
        encoder: Its encoder.
        renderer: Its template's renderer; None where it has no template.
        stop_ids: Ids that end an answer.

    Raises:
        PromptError: The template does not render a conversation.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encoder: PromptEncoder,
        renderer: TurnRenderer | None,
        stop_ids: Collection[int],
    ) -> None:
        self._tokenizer, self._encoder, self._renderer = tokenizer, encoder, renderer
        self._stop_ids = frozenset(stop_ids)
        self.bos = encoder.raw_prefix
        before, after = renderer.around_user_content() if renderer is not None else (_NOTHING, _NOTHING)
        controls = [i for i, id_ in enumerate(before) if id_ in encoder.control_ids]
        if controls:
            self.end = before[: controls[0] + 1]
            self.gap = before[controls[0] + 1 : controls[1]] if len(controls) > 1 else ()
        else:
            self.end, self.gap = encoder.encode(_PARAGRAPH, continued=True), _NOTHING
        self._header = before[len(self.end) + len(self.gap) :]
        ended = after.index(self.end[-1]) + 1 if self.end[-1] in after else len(after)
        self._opening = after[ended:]

    def user(self, text: str, *, first: bool) -> tuple[int, ...]:
        """A user's turn that is ended, if the template ends it before the assistant's turn opens.

        Args:
            text: Its content.
            first: Whether it starts the prompt; else it follows a whole turn.

        Raises:
            PromptError: The template refuses it.
        """
        if self._renderer is None:
            body = self._encoder.encode(self._encoder.mark(text), continued=not first)
            return self.bos + body if first else body
        messages = [{"role": "user", "content": text}]
        if first:
            ids = self._renderer.whole(messages).token_ids
        else:
            ids = self._renderer.appended(messages, turn_ended=True).token_ids[len(self.gap) :]
        return ids[: len(ids) - len(self._opening)]

    def is_ended(self, lineage: Sequence[Segment]) -> bool:
        """Whether a lineage ends in an id that ends a turn."""
        last = lineage[-1] if lineage else None
        return isinstance(last, TokenSegment) and not self._stop_ids.isdisjoint(last.token_ids[-1:])

    def answer(self, context: Context) -> str:
        """The text of the answer that a context ends in, without reasoning; empty where it ends in none."""
        last = context.lineage[-1]
        if not isinstance(last, TokenSegment) or len(context.lineage) == 1:
            return ""
        ids = last.token_ids
        if self._header and ids[: len(self._header)] == self._header:
            return ""
        opening = self._opening[len(self.gap) :]
        if opening:
            starts = range(len(ids) - len(opening), -1, -1)
            start = next((i for i in starts if ids[i : i + len(opening)] == opening), None)
            ids = ids if start is None else ids[start + len(opening) :]
        text = str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
        return text.rpartition(CLOSING)[2].strip()
