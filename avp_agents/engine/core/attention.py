"""Attention over the KV pool, by the extension points that transformers offers to unmodified model code.

A forward pass of the engine is one *ragged* sequence of T positions that belong to several rows (sequences). Three
pieces make the model code compute it exactly:

- `PoolCache` stands in for transformers' cache: its layers write the T new keys and values to their pool positions
  and hand the whole pool on;
- `attend`, registered as attention implementation ``"avp"``, reads from the pool what each row may see. No mask
  function of that name exists, so the model code passes no mask at all;
- explicit `position_ids` give every position its place in its own row.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin

from avp_agents.engine.core.kv_pool import KvPool
from avp_agents.engine.core.layout import Layout, PaddedRows, Row
from avp_agents.errors import UnsupportedModelError

IMPLEMENTATION = "avp"


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
        scaling: Factor of the scores; ``key_dim ** -0.5`` by default.
        sliding_window: Positions a query sees, itself included; None is all.
        softcap: Scores become ``softcap * tanh(scores / softcap)``.
        **extra: What some architectures add; attention sinks are refused.

    Returns:
        ``[1, T, heads, value_dim]``, and None for the weights.
    """
    if extra.get("s_aux") is not None:
        raise UnsupportedModelError(f"{type(module).__name__} uses attention sinks, which the engine does not build.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries, keys, values = query[0], key[0], value[0]
    if avp_layout.padded is not None:
        out = _attend_padded(queries, keys, values, avp_layout.padded, scale, sliding_window, softcap)
        return out[None], None
    if avp_layout.steps:
        parts = _attend_steps(queries, key, value, avp_layout, scale, sliding_window, softcap)
    else:
        parts = [
            _attend_row(queries, keys, values, row, avp_layout, scale, sliding_window, softcap)
            for row in avp_layout.rows
        ]
    padding = queries.shape[1] - sum(row.count for row in avp_layout.rows)
    if padding:
        parts.append(values.new_zeros(padding, queries.shape[0], values.shape[-1]))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _attend_steps(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: Layout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> list[torch.Tensor]:
    """Rows of one new position each: ``[heads, T, dim]`` to parts ``[rows, heads, value_dim]``.

    As few small operations as possible, since they are what a step of a small model consists of.
    """
    heads, total, dim = queries.shape
    kv_heads = keys.shape[1]
    grouped = queries.transpose(0, 1).reshape(total, kv_heads, heads // kv_heads, dim)
    parts: list[torch.Tensor] = []
    for rows in layout.spaced(window, keys):
        query = grouped[rows.first : rows.first + rows.count]
        if layout.realign:
            query = query.clone(memory_format=torch.contiguous_format)
        out = _scores(query, rows.view(keys), rows.view(values), rows.mask, scale, softcap)
        parts.append(out.reshape(rows.count, heads, -1))
    return parts


def _attend_row(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    row: Row,
    layout: Layout,
    scale: float,
    window: int | None,
    softcap: float | None,
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
    mask = layout.mask(row, window, groups, query)
    out = _scores(stacked, row.visible(keys), row.visible(values), mask, scale, softcap)
    return out.reshape(heads, row.count, -1).transpose(0, 1)


def _attend_padded(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    padded: PaddedRows,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Single-position rows of fixed shapes: ``[heads, rows, dim]`` to ``[rows, heads, value_dim]``."""
    heads, rows, dim = query.shape
    kv_heads, span = keys.shape[0], padded.where.shape[1]
    position = torch.arange(span, device=query.device)[None]
    lengths = padded.lengths[:, None]
    hidden = position >= lengths
    if window is not None:
        hidden = hidden | (position < lengths - window)
    mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
    mask = mask.masked_fill(hidden, torch.finfo(query.dtype).min)[:, None, None]
    where = padded.where.reshape(-1)
    row_keys = keys.index_select(1, where).view(kv_heads, rows, span, -1).transpose(0, 1)
    row_values = values.index_select(1, where).view(kv_heads, rows, span, -1).transpose(0, 1)
    grouped = query.transpose(0, 1).reshape(rows, kv_heads, heads // kv_heads, dim)
    return _scores(grouped, row_keys, row_values, mask, scale, softcap).reshape(rows, heads, -1)


def _scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Softmax attention; torch's fused kernel has no soft cap, so that is spelled out."""
    if softcap is None:
        batched = query.dim() == 4
        q, k, v = (t if batched else t[None] for t in (query, keys, values))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return out if batched else out[0]
    scores = softcap * torch.tanh(torch.matmul(query, keys.transpose(-2, -1)).float() * (scale / softcap))
    if mask is not None:
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, dim=-1).to(values.dtype), values)


@cache
def register() -> None:
    """Make ``"avp"`` known to transformers (once per process)."""
    AttentionInterface.register(IMPLEMENTATION, attend)
