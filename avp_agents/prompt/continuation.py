"""Which context a conversation continues, and which of its messages are rendered behind it.

The messages are walked left to right with a `Line`: a *base* (the context that new tokens are appended to; none at
first) and the *pending* turns, which are rendered behind it. A message that carries a context C is decided by what
would have been prefilled for the messages before it: the base's lineage, and the pending turns as one token segment.

    C                                         then
    ---------------------------------------   ---------------------------------------------------------------------
    begins with exactly that                  C is the base and nothing is pending: a continuation
    .. and the template rewrites its answer   the message is pending, as text: it is rendered again
    is held by the base (which extends it)    the message is in the base; it is not rendered
    is text only, and begins otherwise        the message is pending, as text
    has latent steps, and begins otherwise    C is the base: a handoff; pending are the earlier messages that C does
                                              not hold, those with other contexts as text

C holds the messages before an earlier one with a context if it begins with what had been planned there: so does a
descendant of that context, and a sibling branch of the same fork. It also holds each message whose context it extends.

An answer is rewritten if it has reasoning (``reasoning_content``), which templates leave out of earlier turns, or if
the template opens turns with something that it leaves out later. Answers in a thought's own turn stay.

A context that is given explicitly is the base of a second line over the same messages. It drops what it holds by the
same rules: also messages without contexts that it begins with, and then it is a continuation of them. It gives way only
to a context that continues from it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from avp_agents.context import Context, LatentSegment, TokenSegment
from avp_agents.errors import PromptError
from avp_agents.prompt.chat_messages import ChatDict, Turn


@dataclass(frozen=True)
class Line:
    """A base, the turns to render behind it, and whether the base was made from the messages before it.

    `rewritten` are the indexes of pending turns whose contexts were made from the messages before them, and whose
    answers the template rewrites.
    """

    base: Context | None = None
    pending: tuple[Turn, ...] = ()
    continues: bool = False
    rewritten: tuple[int, ...] = ()

    @property
    def messages(self) -> list[ChatDict]:
        """What of the pending turns is rendered: all but thoughts, which have no text."""
        return [turn.message for turn in self.pending if not turn.is_bare_thought]

    def then(self, turn: Turn, *, rewritten: bool = False) -> Line:
        """The line with one more pending turn."""
        marked = (*self.rewritten, turn.index) if rewritten else self.rewritten
        return replace(self, pending=(*self.pending, turn), rewritten=marked)


class LineageWalk:
    """The walk over one prompt's turns.

    Args:
        turns: The prompt's messages.
        token_ids_of: What a line would append to its base, as token ids; raises `PromptError` if it cannot be rendered.
        keeps_opening: The template renders an earlier answer behind the tokens that opened its turn.
    """

    def __init__(
        self, turns: Sequence[Turn], token_ids_of: Callable[[Line], tuple[int, ...]], *, keeps_opening: bool = True
    ) -> None:
        self._turns, self._token_ids_of, self._keeps_opening = turns, token_ids_of, keeps_opening
        self._planned: list[tuple[int, Line]] = []
        self._refuted: set[str] = set()

    def follow(self, given: Context | None) -> Line:
        """The line at the end of the prompt; `given` is the context handed over explicitly."""
        own, handed = Line(), Line(given)
        for turn in self._turns:
            if turn.context is None:
                own, handed = own.then(turn), handed.then(turn)
                continue
            if given is not None:
                handed = self._without_beginning(given, own, handed)
            self._planned.append((turn.index, own))
            own = self._advance(own, turn, turn.context)
            if given is not None:
                handed = self._advance_given(handed, turn, turn.context, own)
        if given is None:
            return own
        last = self._without_beginning(given, own, handed)
        # asked again on an answer's context, a question is not held but asked again
        return last if last.pending or last.base is None or isinstance(last.base.lineage[-1], LatentSegment) else handed

    def _without_beginning(self, given: Context, own: Line, handed: Line) -> Line:
        """The line of a given context, without the messages that the context begins with."""
        if handed.base is not given or not own.pending or _opening(own, given) is None:
            return handed
        following = given.lineage[_base_segments(own)]
        # the more messages the more tokens, so the number of messages is found by the number of tokens
        counts = range(1, len(own.pending) + 1)
        held = bisect_left(counts, len(following), key=lambda count: self._length_of(own, count)) + 1
        if held in counts and self._continues(replace(own, pending=own.pending[:held]), given):
            return Line(given, own.pending[held:], continues=True)
        return handed

    def _length_of(self, line: Line, count: int) -> int:
        """Ids of the first `count` pending turns; of fewer, if the template ends no prompt with them."""
        try:
            return len(self._token_ids_of(replace(line, pending=line.pending[:count]))) if count else 0
        except PromptError:
            return self._length_of(line, count - 1)

    def _advance(self, line: Line, turn: Turn, context: Context) -> Line:
        rewritten = self._is_rewritten(line, turn, context)
        if rewritten and context.is_text and not (line.base is not None and line.base.extends(context)):
            return line.then(turn, rewritten=True)
        # What one context began with was there before its message, so it cannot be what a later one begins with.
        opening = _opening(line, context)
        if opening is not None and opening not in self._refuted:
            if self._continues(line, context):
                return line.then(turn, rewritten=True) if rewritten else Line(context, continues=True)
            self._refuted.add(opening)
        if line.base is not None and line.base.extends(context):
            return line
        if context.is_text:
            return line.then(turn)
        return Line(context, self._not_held(context, turn.index))

    def _advance_given(self, line: Line, turn: Turn, context: Context, own: Line) -> Line:
        if self._continues(line, context):
            rewritten = self._is_rewritten(line, turn, context)
            return line.then(turn, rewritten=True) if rewritten else Line(context, continues=True)
        if line.base is None or not line.base.extends(context):
            return line.then(turn)
        if own.base is not context:
            return line
        return replace(line, pending=_without_held(line.base, own.pending))

    def _continues(self, line: Line, context: Context) -> bool:
        """Whether `context` begins with what the line would have prefilled."""
        if _opening(line, context) is None:
            return False
        following = context.lineage[_base_segments(line)]
        try:
            planned = self._token_ids_of(line)
        except PromptError:  # no context was ever made from a prompt that cannot be rendered
            return False
        if not planned:  # the turn that the base leaves open went on: the answer alone is behind it
            return len(context.lineage) == _base_segments(line) + 1
        return isinstance(following, TokenSegment) and following.token_ids == planned

    def _is_rewritten(self, line: Line, turn: Turn, context: Context) -> bool:
        """Whether the template, asked for this earlier answer, renders other tokens than those it was made of."""
        made = context.lineage[_base_segments(line) :]
        is_answer = len(made) > 1 and all(isinstance(segment, TokenSegment) for segment in made)
        return is_answer and (bool(turn.message.get("reasoning_content")) or not self._keeps_opening)

    def _not_held(self, context: Context, index: int) -> tuple[Turn, ...]:
        """The turns before `index` that `context` does not hold."""
        for start, line in reversed(self._planned):
            if self._continues(line, context):
                return _without_held(context, self._turns[start:index])
        return _without_held(context, self._turns[:index])


def _base_segments(line: Line) -> int:
    return 0 if line.base is None else len(line.base.lineage)


def _opening(line: Line, context: Context) -> str | None:
    """The recipe id of the line's base and one segment more in `context`; None if it does not go on from the base."""
    nothing_planned = line.base is None and not line.pending
    if nothing_planned or len(context.lineage) == _base_segments(line):
        return None
    if line.base is not None and not context.extends(line.base):
        return None
    return context.recipe_ids[_base_segments(line)]


def _without_held(context: Context, turns: Sequence[Turn]) -> tuple[Turn, ...]:
    return tuple(turn for turn in turns if turn.context is None or not context.extends(turn.context))
