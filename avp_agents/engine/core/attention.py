"""Attention over the KV pool, by the extension points that transformers offers to unmodified model code.

A forward pass of the engine is one *ragged* sequence of T positions that belong to several rows (sequences). Four
pieces make the model code compute it exactly:

- `Layout` says where each position belongs in the pool, and what it may see;
- `PoolCache` stands in for transformers' cache: its layers write the T new keys and values to their pool positions
  and hand the whole pool on;
- `attend`, registered as attention implementation ``"avp"``, reads from the pool what each row may see. No mask
  function of that name exists, so the model code passes no mask at all;
- explicit `position_ids` give every position its place in its own row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin

from avp_agents.engine.core.kv_pool import KvPool
from avp_agents.errors import UnsupportedModelError

IMPLEMENTATION = "avp"


class Scoring(NamedTuple):
    """How a layer scores keys.

    Attributes:
        scale: Factor of the scores.
        window: Positions a query sees, itself included; None is all.
        softcap: Scores become ``softcap * tanh(scores / softcap)``.
    """

    scale: float
    window: int | None
    softcap: float | None


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Scoring], torch.Tensor]
"""Queries ``[heads, T, key_dim]`` over keys and values ``[kv_heads, positions, dim]`` to ``[T, heads, value_dim]``."""


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
        attend: Attention that is computed otherwise; then `rows` is not looked at.
        realign: Compute every row by itself and on a copy of its queries, so that neither its place in the batch nor
            its company can change the order of sums, and with that the last bits.
    """

    slots: torch.Tensor
    rows: Sequence[Row] = ()
    attend: Attend | None = None
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


class PooledLayer(CacheLayerMixin):
    """One layer's keys and values in the pool, as transformers' cache interface wants them."""

    is_compileable = True

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.slots = torch.empty(0, dtype=torch.int64)
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the pool is preallocated."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``[1, kv_heads, T, dim]`` to this pass's slots; return the pool ``[1, kv_heads, positions, dim]``."""
        assert self.keys is not None
        assert self.values is not None
        slots = self.slots.to(self.keys.device)
        self.keys.index_copy_(1, slots, key_states[0])
        self.values.index_copy_(1, slots, value_states[0])
        return self.keys[None], self.values[None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Not used by ``"avp"`` attention, which builds its own masks."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0: positions are always given explicitly."""
        return 0

    def get_max_length(self) -> int:
        """No maximum of its own."""
        return -1


class PoolCache(Cache):
    """All layers of a `KvPool`; `place` tells them where the next pass writes."""

    def __init__(self, pool: KvPool) -> None:
        self.pooled = [PooledLayer(k, v) for k, v in zip(pool.keys, pool.values, strict=True)]
        super().__init__(layers=list(self.pooled))

    def place(self, slots: torch.Tensor) -> None:
        """Set the pool positions of the next forward pass."""
        for layer in self.pooled:
            layer.slots = slots


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    avp_layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of T ragged queries over the pool.

    Args:
        module: The model's attention layer.
        query: ``[1, heads, T, key_dim]``.
        key: The pool's keys, ``[1, kv_heads, positions, key_dim]``; this pass's are written already.
        value: The pool's values, ``[1, kv_heads, positions, value_dim]``.
        attention_mask: Always None here.
        avp_layout: Which position belongs where.
        scaling: `Scoring.scale`; ``key_dim ** -0.5`` by default.
        sliding_window, softcap: See `Scoring`.
        **extra: What some architectures add; attention sinks are refused.

    Returns:
        ``[1, T, heads, value_dim]``, and None for the weights.
    """
    if extra.get("s_aux") is not None:
        raise UnsupportedModelError(f"{type(module).__name__} uses attention sinks, which the engine does not build.")
    how = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    queries = query[0]
    if avp_layout.attend is not None:
        return avp_layout.attend(queries, key[0], value[0], how)[None], None
    if avp_layout.steps:
        parts = _attend_steps(queries, key, value, avp_layout, how)
    else:
        parts = [_attend_row(queries, key[0], value[0], row, avp_layout, how) for row in avp_layout.rows]
    padding = queries.shape[1] - sum(row.count for row in avp_layout.rows)
    if padding:
        parts.append(value.new_zeros(padding, queries.shape[0], value.shape[-1]))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _attend_steps(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layout: Layout, how: Scoring
) -> list[torch.Tensor]:
    """Rows of one new position each: ``[heads, T, dim]`` to parts ``[rows, heads, value_dim]``.

    As few small operations as possible, since they are what a step of a small model consists of.
    """
    heads, total, dim = queries.shape
    kv_heads = keys.shape[1]
    grouped = queries.transpose(0, 1).reshape(total, kv_heads, heads // kv_heads, dim)
    parts: list[torch.Tensor] = []
    for rows in layout.spaced(how.window, keys):
        query = grouped[rows.first : rows.first + rows.count]
        if layout.realign:
            query = query.clone(memory_format=torch.contiguous_format)
        out = weighted_values(query, rows.view(keys), rows.view(values), rows.mask, how)
        parts.append(out.reshape(rows.count, heads, -1))
    return parts


def _attend_row(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, row: Row, layout: Layout, how: Scoring
) -> torch.Tensor:
    """One row: ``[heads, T, dim]`` to ``[count, heads, value_dim]``.

    The query heads that share a key head are stacked as its queries, so that keys are neither repeated nor copied.
    """
    heads, _, dim = query.shape
    kv_heads = keys.shape[0]
    groups = heads // kv_heads
    stacked = query[:, row.first : row.first + row.count].reshape(kv_heads, groups * row.count, dim)
    if layout.realign:
        stacked = stacked.clone(memory_format=torch.contiguous_format)
    mask = layout.mask(row, how.window, groups, query)
    out = weighted_values(stacked, row.visible(keys), row.visible(values), mask, how)
    return out.reshape(heads, row.count, -1).transpose(0, 1)


def weighted_values(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, how: Scoring
) -> torch.Tensor:
    """Softmax attention; torch's fused kernel has no soft cap, so that is spelled out."""
    if how.softcap is None:
        batched = query.dim() == 4
        q, k, v = (t if batched else t[None] for t in (query, keys, values))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=how.scale)
        return out if batched else out[0]
    scores = how.softcap * torch.tanh(torch.matmul(query, keys.transpose(-2, -1)).float() * (how.scale / how.softcap))
    if mask is not None:
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, dim=-1).to(values.dtype), values)


@cache
def register() -> None:
    """Make ``"avp"`` known to transformers (once per process)."""
    AttentionInterface.register(IMPLEMENTATION, attend)


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
