"""Fan-in: several contexts of one model as one, whose lineage the next agent continues.

    replay    the lineages behind one another, prefilled as one: every context sees those before it
    splice    the KV-caches behind one another, keys rotated to their new positions: none sees another one
    text      the texts of the contexts' answers, as one user turn: what agents without latent contexts would hand over

A prefix that a context shares with the first one is kept once, up to the last end of a turn in it. Handed contexts end
in an open assistant turn; here each is closed, the last one too, so a joined context is a conversation of whole turns.

Ids. A spliced context holds `SplicedSegment`s, so its recipe differs from the replayed one's, and replaying it makes
the splice again: each splice is prefilled behind the prefix that it saw, and rotated. In a replayed join, latent steps
stand behind other positions than those they were made behind. Their values are kept, and their segments name the
lineage that they come from (`LatentSegment.origin`): a thought that is made at just that place is another context.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import get_args

from typing_extensions import override

from avp_agents.context import Context, SplicedSegment, TokenSegment, prefix_of
from avp_agents.engine.core.sequence import Sequence
from avp_agents.engine.protocol import JoinStrategy
from avp_agents.engine.sequences import Report
from avp_agents.errors import ConfigurationError, PromptError
from avp_agents.lineage import (
    Lineage,
    distinct,
    ids_of,
    in_one_piece,
    length_of,
    moved,
    shared_positions,
    suffix_of,
)
from avp_agents.prompt.whole_turns import WholeTurns
from avp_agents.usage import Handoff, HandoffMode


@dataclass(frozen=True)
class Joined:
    """What joining comes to.

    Attributes:
        lineage: The joined context's.
        strategy: Which ran; None where there was only one context to join, which is left as it is.
        contexts: How many were joined: those that another one holds are left out.
        new: Positions that come from none of the contexts: ends of turns, or text.
        notes: What was left out.
    """

    lineage: Lineage
    strategy: JoinStrategy | None
    contexts: int
    new: int = 0
    notes: tuple[str, ...] = ()


class Joiner:
    """Joins lineages of one model.

    Args:
        turns: The boundaries of its turns.
    """

    def __init__(self, turns: WholeTurns) -> None:
        self._turns = turns

    def join(self, contexts: Seq[Context], strategy: JoinStrategy) -> Joined:
        """Plan a join; nothing is computed.

        Raises:
            ConfigurationError: There is no context, or no such strategy.
            PromptError: The strategy is ``"text"``, and no context has any.
        """
        if strategy not in get_args(JoinStrategy):
            raise ConfigurationError(
                f"Unknown strategy {strategy!r}; choose one of {', '.join(get_args(JoinStrategy))}."
            )
        if not contexts or not all(len(context) for context in contexts):
            raise ConfigurationError("There is nothing to join; pass at least one context, and none that is empty.")
        kept = distinct(contexts)
        left_out = len(contexts) - len(kept)
        notes = (f"{left_out} of {len(contexts)} contexts left out: others hold them",) if left_out else ()
        if strategy == "text":
            joined = self._as_text(kept)
        elif len(kept) == 1:
            joined = Joined(kept[0].lineage, None, 1)
        else:
            joined = self._behind_one_another(kept, strategy)
        return replace(joined, notes=notes + joined.notes)

    def _behind_one_another(self, contexts: Seq[Context], strategy: JoinStrategy) -> Joined:
        first, *others = contexts
        lineage = first.lineage if strategy == "splice" else in_one_piece(first)
        taken = len(first)
        for other in others:
            shared = self._shared_turns(first, other)
            tail = suffix_of(other.lineage if strategy == "splice" else moved(other), shared)
            taken += len(other) - shared
            if strategy == "splice":
                closed = self._without_end(tail)
                taken -= length_of(tail) - length_of(closed)
                tail = (SplicedSegment(closed, shared),) if closed else ()
            if tail:
                lineage = (*lineage, *self._end_of_turn(lineage, gap=True), *tail)
        lineage = (*lineage, *self._end_of_turn(lineage, gap=False))
        return Joined(lineage, strategy, len(contexts), new=length_of(lineage) - taken)

    def _as_text(self, contexts: Seq[Context]) -> Joined:
        texts: list[str] = []
        notes: list[str] = []
        for number, context in enumerate(contexts, start=1):
            agent = context.handle.agent if context.handle is not None else ""
            name = agent or f"Result {number}"
            if text := self._turns.answer(context):
                texts.append(f"{name}:\n{text}")
            else:
                notes.append(f"{name} is left out: it has no text, only latent steps (or a prompt)")
        if not texts:
            raise PromptError(
                "None of the contexts ends in an answer, so there is no text to join. Use strategy='replay' or "
                "'splice', or let the agents generate."
            )
        shared = min(self._shared_turns(contexts[0], other) for other in contexts)
        first = shared <= len(self._turns.bos)
        told = self._turns.user("\n\n".join(texts), first=first)
        kept = () if first else prefix_of(contexts[0].lineage, shared)
        return Joined((*kept, TokenSegment(told)), "text", len(contexts), new=len(told), notes=tuple(notes))

    def _shared_turns(self, one: Context, other: Context) -> int:
        """Leading positions that two contexts have in common, cut behind the last end of a turn."""
        ids = ids_of(other.lineage)[: shared_positions(one.lineage, other.lineage)]
        mark = [self._turns.end[-1], *self._turns.gap]
        for stop in range(len(ids), len(mark) - 1, -1):
            if ids[stop - len(mark) : stop] == mark:
                return stop
        bos = list(self._turns.bos)
        return len(bos) if ids[: len(bos)] == bos else 0

    def _end_of_turn(self, lineage: Lineage, *, gap: bool) -> tuple[TokenSegment, ...]:
        """What ends a lineage's last turn, and what stands between it and the next one."""
        ids = (() if self._turns.is_ended(lineage) else self._turns.end) + (self._turns.gap if gap else ())
        return (TokenSegment(ids),) if ids else ()

    def _without_end(self, lineage: Lineage) -> Lineage:
        """A lineage without the id that ended its last answer: it has no keys and values yet."""
        if not self._turns.is_ended(lineage):
            return lineage
        *before, last = lineage
        assert isinstance(last, TokenSegment)
        return (*before, TokenSegment(last.token_ids[:-1])) if len(last) > 1 else tuple(before)


class JoinReport(Report):
    """Which strategy ran, and how much had to be computed again for it."""

    def __init__(self, fingerprint: str, dtype: str, joined: Joined) -> None:
        super().__init__(fingerprint, dtype, "join")
        self._joined = joined

    @override
    def handoff(self, of: Sequence) -> Handoff:
        joined, started = self._joined, of.started
        if joined.strategy is None:
            return replace(super().handoff(of), reason="one context: nothing to join", notes=joined.notes)
        again = max(0, of.total - joined.new - started.reused)
        mode: HandoffMode = "text" if joined.strategy == "text" else "kv" if again <= joined.contexts else "replay"
        return Handoff(
            mode=mode,
            reason=f"{joined.contexts} contexts joined by {joined.strategy}",
            bytes=started.bytes_moved,
            milliseconds=1e3 * (started.seconds + of.prefilled - of.admitted),
            positions_reused=started.reused,
            positions_replayed=again if mode == "replay" else 0,
            notes=joined.notes,
        )
