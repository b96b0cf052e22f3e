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

import hashlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import get_args

from typing_extensions import override

from avp_agents.context import Context, LatentSegment, Segment, SplicedSegment, TokenSegment, leaves, prefix_of
from avp_agents.engine.core.sequence import Sequence
from avp_agents.engine.core.start import shared_positions
from avp_agents.engine.protocol import JoinStrategy
from avp_agents.engine.sequences import Report
from avp_agents.errors import ConfigurationError, PromptError
from avp_agents.prompt.whole_turns import WholeTurns
from avp_agents.usage import Handoff, HandoffMode

Lineage = tuple[Segment, ...]


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
        distinct = _distinct(contexts)
        left_out = len(contexts) - len(distinct)
        notes = (f"{left_out} of {len(contexts)} contexts left out: others hold them",) if left_out else ()
        if strategy == "text":
            joined = self._as_text(distinct)
        elif len(distinct) == 1:
            joined = Joined(distinct[0].lineage, None, 1)
        else:
            joined = self._behind_one_another(distinct, strategy)
        return replace(joined, notes=notes + joined.notes)

    def _behind_one_another(self, contexts: Seq[Context], strategy: JoinStrategy) -> Joined:
        first, *others = contexts
        lineage = first.lineage if strategy == "splice" else _in_one_piece(first)
        taken = len(first)
        for other in others:
            shared = self._shared_turns(first, other)
            tail = _behind(other.lineage if strategy == "splice" else _moved(other), shared)
            taken += len(other) - shared
            if strategy == "splice":
                closed = self._without_end(tail)
                taken -= _positions(tail) - _positions(closed)
                tail = (SplicedSegment(closed, shared),) if closed else ()
            if tail:
                lineage = (*lineage, *self._end_of_turn(lineage, gap=True), *tail)
        lineage = (*lineage, *self._end_of_turn(lineage, gap=False))
        return Joined(lineage, strategy, len(contexts), new=_positions(lineage) - taken)

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
        ids = _ids(other.lineage)[: shared_positions(one.lineage, other.lineage)]
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


def _distinct(contexts: Seq[Context]) -> list[Context]:
    """The contexts that no other one holds, each once, in order."""
    distinct: list[Context] = []
    for index, context in enumerate(contexts):
        others = (other for i, other in enumerate(contexts) if i != index)
        held = any(other.extends(context) and not context.extends(other) for other in others)
        if not held and not any(kept.recipe_id == context.recipe_id for kept in distinct):
            distinct.append(context)
    return distinct


def _in_one_piece(context: Context) -> Lineage:
    """A lineage with its splices dissolved; from the first one on, latent steps were made behind another lineage."""
    splices = [index for index, segment in enumerate(context.lineage) if isinstance(segment, SplicedSegment)]
    return (*context.lineage[: splices[0]], *_moved(context, splices[0])) if splices else context.lineage


def _moved(context: Context, start: int = 0) -> Lineage:
    """A lineage from segment `start` on, in one piece, to stand behind other positions than those it was made behind:
    its latent steps say where that was."""
    moved: list[Segment] = []
    for recipe_id, segment in list(zip(context.recipe_ids, context.lineage, strict=True))[start:]:
        for number, leaf in enumerate(leaves((segment,))):
            place = f"{recipe_id}.{number}".encode()
            origin = hashlib.blake2b(place, digest_size=32).hexdigest()
            moved.append(replace(leaf, origin=origin) if isinstance(leaf, LatentSegment) else leaf)
    return tuple(moved)


def _behind(lineage: Lineage, positions: int) -> Lineage:
    """What is left of a lineage without its first `positions` positions, which do not cut a run of latent steps."""
    rest: list[Segment] = []
    for segment in lineage:
        skipped = min(positions, len(segment))
        positions -= skipped
        if not skipped:
            rest.append(segment)
        elif skipped < len(segment):
            assert isinstance(segment, TokenSegment)
            rest.append(TokenSegment(segment.token_ids[skipped:]))
    return tuple(rest)


def _ids(lineage: Lineage) -> list[int | None]:
    """One entry per position: its token id, None where it is latent or spliced."""
    ids: list[int | None] = []
    for segment in lineage:
        ids.extend(segment.token_ids if isinstance(segment, TokenSegment) else [None] * len(segment))
    return ids


def _positions(lineage: Lineage) -> int:
    return sum(len(segment) for segment in lineage)
