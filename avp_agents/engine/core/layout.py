"""Where the positions of one forward pass belong in the KV pool, and what each of them may see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Row:
    """One sequence's share of a forward pass.

    Attributes:
        first: Index of its first new position among the T.
        count: New positions.
        base: Where its keys and values begin in the pool.
        length: Positions that it sees after this pass, the new ones included.
        spans: Which those are, relative to `base`, if not the first `length`.
    """

    first: int
    count: int
    base: int
    length: int
    spans: tuple[tuple[int, int], ...] | None = None

    def visible(self, pool: torch.Tensor) -> torch.Tensor:
        """Keys or values that it sees, ``[kv_heads, length, dim]``, of ``[kv_heads, positions, dim]``."""
        if self.spans is None:
            return pool[:, self.base : self.base + self.length]
        return torch.cat([pool[:, self.base + start : self.base + stop] for start, stop in self.spans], dim=1)


@dataclass(frozen=True)
class PaddedRows:
    """Single-position rows as tensors of fixed shapes, for a captured step.

    Attributes:
        where: ``[rows, span]`` int64, pool positions of each row's keys, padded with any of its own.
        lengths: ``[rows]`` int64, how many of them are real.
    """

    where: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class SpacedRows:
    """Consecutive single-position rows whose visible keys begin at equal distances, so that one strided view of the
    pool shows them all, without a copy.

    Attributes:
        first: Index of the first row's position among the T.
        count: Rows.
        start: Pool position of the first row's first visible key.
        distance: Pool positions from one row's start to the next one's.
        span: Most keys that a row sees.
        mask: ``[count, 1, 1, span]`` additive; None where all see `span` keys.
    """

    first: int
    count: int
    start: int
    distance: int
    span: int
    mask: torch.Tensor | None

    def view(self, pool: torch.Tensor) -> torch.Tensor:
        """``[1, kv_heads, positions, dim]`` as ``[count, kv_heads, span, dim]``."""
        _, heads, _, dim = pool.shape
        _, head_stride, position_stride, dim_stride = pool.stride()
        size = (self.count, heads, self.span, dim)
        strides = (self.distance * position_stride, head_stride, position_stride, dim_stride)
        return pool.as_strided(size, strides, pool.storage_offset() + self.start * position_stride)


@dataclass(frozen=True)
class Layout:
    """Where the T positions of one forward pass belong.

    Attributes:
        slots: ``[T]`` int64, the pool position each new key and value is written to.
        rows: The rows, in order; positions beyond the last row are padding whose output is zero.
        padded: Set for a captured step; then `rows` is not looked at.
        realign: Compute every row by itself and on a copy of its queries, so that neither its place in the batch nor
            its company can change the order of sums, and with that the last bits.
    """

    slots: torch.Tensor
    rows: Sequence[Row] = ()
    padded: PaddedRows | None = None
    realign: bool = False
    _masks: dict[tuple[int, int | None, int, torch.dtype], torch.Tensor] = field(default_factory=dict, repr=False)
    _spaced: dict[tuple[int | None, torch.dtype], list[SpacedRows]] = field(default_factory=dict, repr=False)

    @property
    def steps(self) -> bool:
        """Whether every row has one new position behind consecutive ones."""
        return all(row.count == 1 and row.spans is None for row in self.rows)

    def mask(self, row: Row, window: int | None, groups: int, like: torch.Tensor) -> torch.Tensor:
        """Additive mask ``[groups * count, length]`` of a row with several new positions; the same in all layers."""
        key = (row.first, window, groups, like.dtype)
        if key not in self._masks:
            query = torch.arange(row.length - row.count, row.length, device=like.device)[:, None]
            position = torch.arange(row.length, device=like.device)[None]
            hidden = position > query
            if window is not None:
                hidden |= position <= query - window
            self._masks[key] = _additive(hidden, like).repeat(groups, 1)
        return self._masks[key]

    def spaced(self, window: int | None, pool: torch.Tensor) -> list[SpacedRows]:
        """All rows of a pass of single positions, in as few strided views of `pool` as they allow; the same in all
        layers."""
        key = (window, pool.dtype)
        if key not in self._spaced:
            limit = 1 if self.realign else len(self.rows)
            runs = _equally_spaced(_visible(self.rows, window), limit, pool.shape[2])
            self._spaced[key] = [_spaced_rows(run, pool) for run in runs]
        return self._spaced[key]


@dataclass(frozen=True)
class _Visible:
    """The keys that one row sees: `seen` of them from pool position `start` on."""

    first: int
    start: int
    seen: int


def _visible(rows: Sequence[Row], window: int | None) -> list[_Visible]:
    visible: list[_Visible] = []
    for row in rows:
        seen = row.length if window is None else min(row.length, window)
        visible.append(_Visible(row.first, row.base + row.length - seen, seen))
    return visible


def _equally_spaced(rows: Sequence[_Visible], limit: int, positions: int) -> list[list[_Visible]]:
    """Cut rows into runs of at most `limit` at equal distances that are wide enough for the longest of the run.

    Wide enough, so that no row's view reaches into another's keys: masked numbers are multiplied by zero, which does
    not make a NaN harmless.
    """
    runs: list[list[_Visible]] = []
    for index, row in enumerate(rows):
        end = rows[index + 1].start if index + 1 < len(rows) else positions
        run = runs[-1] if runs else []
        if run and len(run) < limit and _fits(run, row, end - row.start):
            run.append(row)
        else:
            runs.append([row])
    return runs


def _fits(run: list[_Visible], row: _Visible, room: int) -> bool:
    distance = row.start - run[-1].start
    span = max(row.seen, *(other.seen for other in run))
    equal = len(run) == 1 or distance == run[1].start - run[0].start
    return equal and span <= distance and span <= room


def _spaced_rows(run: list[_Visible], like: torch.Tensor) -> SpacedRows:
    span = max(row.seen for row in run)
    mask = None
    if any(row.seen < span for row in run):
        seen = torch.tensor([row.seen for row in run], device=like.device)
        hidden = torch.arange(span, device=like.device)[None] >= seen[:, None]
        mask = _additive(hidden, like)[:, None, None]
    distance = run[1].start - run[0].start if len(run) > 1 else span
    return SpacedRows(run[0].first, len(run), run[0].start, distance, span, mask)


def _additive(hidden: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """0 where a key is seen and the lowest number of `like`'s dtype where it is hidden."""
    mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(hidden, torch.finfo(like.dtype).min)
