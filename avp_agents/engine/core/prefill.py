"""How a lineage is prefilled: in one run from its start, and each splice in a frame of its own.

A *frame* is the sequence of positions that a run sees, in order. For most runs that is all that stands before them.
The positions of a splice were made behind a prefix of the lineage alone, so their frame is that prefix and what comes
before them within the splice; their places in it are the positions that the model is told. When the last one of a
splice is in, its keys are moved (rotated) to where it stands in the lineage around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from avp_agents.context import LatentSegment, Segment, SplicedSegment, TokenSegment

if TYPE_CHECKING:
    import torch

Span = tuple[int, int]
"""Lineage positions ``start:stop``."""


@dataclass(frozen=True)
class Move:
    """Keys at lineage positions ``start:stop`` are to be rotated `by` positions forward."""

    start: int
    stop: int
    by: int


@dataclass(frozen=True)
class PrefillRun:
    """A segment that is prefilled in one frame.

    Attributes:
        start, stop: Its lineage positions.
        segment: Its token ids or latent embeddings.
        frame: The spans before `start` that it sees, in order.
        splice: Where the splice that it belongs to starts; None outside of a splice.
        moves: What is to be moved when its last position is in.
    """

    start: int
    stop: int
    segment: TokenSegment | LatentSegment
    frame: tuple[Span, ...]
    splice: int | None = None
    moves: tuple[Move, ...] = ()


def prefill_runs(lineage: Sequence[Segment]) -> tuple[PrefillRun, ...]:
    """The runs of a lineage, in order; together they cover all of its positions."""
    runs: list[PrefillRun] = []
    _add_runs(runs, lineage, (), 0, None)
    return tuple(runs)


def _add_runs(
    runs: list[PrefillRun], lineage: Sequence[Segment], frame: tuple[Span, ...], start: int, splice: int | None
) -> int:
    """Append the runs of `lineage`, which begins at `start` and sees `frame`; returns where it ends."""
    for segment in lineage:
        if not len(segment):
            continue
        if isinstance(segment, SplicedSegment):
            around = start if splice is None else splice
            stop = _add_runs(runs, segment.segments, _leading(frame, segment.prefix), start, around)
            last = runs.pop()
            move = Move(start, stop, frame_length(frame) - segment.prefix)
            runs.append(PrefillRun(last.start, last.stop, last.segment, last.frame, last.splice, (*last.moves, move)))
        else:
            stop = start + len(segment)
            runs.append(PrefillRun(start, stop, segment, frame, splice))
        frame = extended(frame, (start, stop))
        start = stop
    return start


def whole_positions(runs: Sequence[PrefillRun], length: int) -> int:
    """The positions among the first `length` that another sequence may start behind: none of half a splice."""
    return next((r.splice for r in runs if r.splice is not None and r.splice < length < r.stop), length)


def frame_length(frame: tuple[Span, ...]) -> int:
    """Positions of a frame."""
    return sum(stop - start for start, stop in frame)


def extended(frame: tuple[Span, ...], span: Span) -> tuple[Span, ...]:
    """The frame with the positions of `span` behind it."""
    if frame and frame[-1][1] == span[0]:
        return (*frame[:-1], (frame[-1][0], span[1]))
    return (*frame, span)


def _leading(frame: tuple[Span, ...], count: int) -> tuple[Span, ...]:
    """The first `count` positions of a frame."""
    leading: list[Span] = []
    for start, stop in frame:
        if count <= 0:
            break
        leading.append((start, min(stop, start + count)))
        count -= stop - start
    return tuple(leading)


def next_inputs(
    runs: Sequence[PrefillRun], start: int, budget: int
) -> tuple[tuple[Sequence[int] | torch.Tensor, ...], tuple[Span, ...] | None]:
    """What to feed from lineage position `start` on: at most `budget` positions that see the same frame.

    Returns:
        Token ids and latent embeddings ``[count, hidden]``, in order; and the frame, None where it is all before them.
    """
    index = next(i for i, run in enumerate(runs) if start < run.stop)
    run = runs[index]
    if run.splice is not None:
        frame = extended(run.frame, (run.start, start)) if start > run.start else run.frame
        return (_content(run, start, budget),), frame
    parts = []
    for run in runs[index:]:
        if budget <= 0 or run.splice is not None:
            break
        parts.append(_content(run, start, budget))
        budget -= len(parts[-1])
        start = run.stop
    return tuple(parts), None


def _content(run: PrefillRun, start: int, budget: int) -> Sequence[int] | torch.Tensor:
    segment = run.segment
    values = segment.token_ids if isinstance(segment, TokenSegment) else segment.embeddings
    return values[start - run.start : start - run.start + budget]
