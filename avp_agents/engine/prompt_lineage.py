"""Which context a conversation continues, and which of its messages are rendered behind it.

The messages are walked left to right with a `Line`: a *base* (the context that new tokens are appended to; none at
first) and the *pending* turns, which are rendered behind it. A message that carries a context C is decided by what
would have been prefilled for the messages before it: the base's lineage, and the pending turns as one token segment.

    C                                         then
    ---------------------------------------   ---------------------------------------------------------------------
    begins with exactly that                  C is the base and nothing is pending: a continuation
    is held by the base (which extends it)    the message is in the base; it is not rendered
    is text only, and begins otherwise        the message is pending, as text
    has latent steps, and begins otherwise    C is the base: a handoff; pending are the earlier messages that C does
                                              not hold, those with other contexts as text

C holds the messages before an earlier one with a context if it begins with what had been planned there: so does a
descendant of that context, and a sibling branch of the same fork. It also holds each message whose context it extends.

A context that is given explicitly is the base of a second line over the same messages. It drops what it holds by the
same rules, and gives way only to a context that continues from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from avp_agents.context import Context, TokenSegment
from avp_agents.engine.turn_messages import Turn
from avp_agents.errors import PromptError


@dataclass(frozen=True)
class Line:
    """A base, the turns to render behind it, and whether the base was made from the messages before it."""

    base: Context | None = None
    pending: tuple[Turn, ...] = ()
    continues: bool = False

    def then(self, turn: Turn) -> Line:
        """The line with one more pending turn."""
        return replace(self, pending=(*self.pending, turn))


class LineageWalk:
    """The walk over one prompt's turns.

    Args:
        turns: The prompt's messages.
        token_ids_of: What a line would append to its base, as token ids; raises `PromptError` if it cannot be rendered.
    """

    def __init__(self, turns: Sequence[Turn], token_ids_of: Callable[[Line], tuple[int, ...]]) -> None:
        self._turns, self._token_ids_of = turns, token_ids_of
        self._planned: list[tuple[int, Line]] = []
        self._refuted: set[str] = set()

    def follow(self, given: Context | None) -> Line:
        """The line at the end of the prompt; `given` is the context handed over explicitly."""
        own, handed = Line(), Line(given)
        for turn in self._turns:
            if turn.context is None:
                own, handed = own.then(turn), handed.then(turn)
                continue
            self._planned.append((turn.index, own))
            own = self._advance(own, turn, turn.context)
            if given is not None:
                handed = self._advance_given(handed, turn, turn.context, own)
        return own if given is None else handed

    def _advance(self, line: Line, turn: Turn, context: Context) -> Line:
        # What one context began with was there before its message, so it cannot be what a later one begins with.
        opening = _opening(line, context)
        if opening is not None and opening not in self._refuted:
            if self._continues(line, context):
                return Line(context, continues=True)
            self._refuted.add(opening)
        if line.base is not None and line.base.extends(context):
            return line
        if context.is_text:
            return line.then(turn)
        return Line(context, self._not_held(context, turn.index))

    def _advance_given(self, line: Line, turn: Turn, context: Context, own: Line) -> Line:
        if self._continues(line, context):
            return Line(context, continues=True)
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
            return isinstance(following, TokenSegment) and following.token_ids == self._token_ids_of(line)
        except PromptError:  # no context was ever made from a prompt that cannot be rendered
            return False

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
