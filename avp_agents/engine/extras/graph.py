"""A decode or latent step captured once and played back: static shapes, a few buckets of rows and length.

On a GPU launching hundreds of small kernels costs more time than they take; a CUDA graph launches them as one. On a CPU
`torch.compile` fuses them instead. Both see the same function on the same buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._inductor import config as inductor
from typing_extensions import override

from avp_agents.engine.core.attention import Layout, Scoring, weighted_values
from avp_agents.engine.core.forward import ModelRunner, Piece, PieceOutput
from avp_agents.engine.core.kv_pool import KvPool
from avp_agents.engine.core.latent_step import LatentStep
from avp_agents.engine.core.model import LoadedModel

ROW_BUCKETS = (1, 2, 4, 8, 16, 32)
SPAN_BUCKET = 256


@dataclass
class _Buffers:
    """What one bucket's step reads, at fixed addresses."""

    embeddings: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    where: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class PaddedRows:
    """Single-position rows as tensors of fixed shapes, and attention over them.

    Attributes:
        where: ``[rows, span]`` int64, pool positions of each row's keys, padded with any of its own.
        lengths: ``[rows]`` int64, how many of them are real.
    """

    where: torch.Tensor
    lengths: torch.Tensor

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: Scoring) -> torch.Tensor:
        """``[heads, rows, dim]`` to ``[rows, heads, value_dim]``."""
        heads, rows, dim = query.shape
        kv_heads, span = keys.shape[0], self.where.shape[1]
        position = torch.arange(span, device=query.device)[None]
        lengths = self.lengths[:, None]
        hidden = position >= lengths
        if how.window is not None:
            hidden = hidden | (position < lengths - how.window)
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
        mask = mask.masked_fill(hidden, torch.finfo(query.dtype).min)[:, None, None]
        where = self.where.reshape(-1)
        row_keys = keys.index_select(1, where).view(kv_heads, rows, span, -1).transpose(0, 1)
        row_values = values.index_select(1, where).view(kv_heads, rows, span, -1).transpose(0, 1)
        grouped = query.transpose(0, 1).reshape(rows, kv_heads, heads // kv_heads, dim)
        return weighted_values(grouped, row_keys, row_values, mask, how).reshape(rows, heads, -1)


class CapturedRunner(ModelRunner):
    """A `ModelRunner` on one device whose single positions run as a captured step."""

    def __init__(self, loaded: LoadedModel, pool: KvPool, latent_step: LatentStep) -> None:
        super().__init__(loaded, pool, latent_step)
        self._steps: dict[tuple[int, int], _GraphStep | _CompiledStep] = {}

    @override
    def run(self, pieces: Sequence[Piece]) -> list[PieceOutput]:
        steps = [i for i, piece in enumerate(pieces) if piece.is_step]
        longer = [i for i, piece in enumerate(pieces) if not piece.is_step]
        return self._run_groups(pieces, [group for group in (steps, longer) if group])

    @override
    def _run_together(self, pieces: Sequence[Piece]) -> list[PieceOutput]:
        if not pieces[0].is_step:
            return super()._run_together(pieces)
        hidden, logits = self._run_captured(self.embeddings(pieces, len(pieces)), pieces)
        return [PieceOutput(hidden[i], logits[i] if piece.wants_logits else None) for i, piece in enumerate(pieces)]

    def _run_captured(self, embeddings: torch.Tensor, pieces: Sequence[Piece]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings ``[n, hidden]`` to hidden states ``[n, hidden]`` and logits ``[n, vocabulary]``."""
        longest = max(piece.start + 1 for piece in pieces)
        rows = next((b for b in ROW_BUCKETS if b >= len(pieces)), len(pieces))
        span = min(-(-longest // SPAN_BUCKET) * SPAN_BUCKET, self.pool.positions)
        step = self._steps.get((rows, span))
        if step is None:
            step = self._steps[(rows, span)] = self._capture(rows, span)
        self._fill(step.buffers, embeddings, pieces, rows, span)
        hidden, logits = step()
        return hidden[: len(pieces)].clone(), logits[: len(pieces)].clone()

    def _capture(self, rows: int, span: int) -> _GraphStep | _CompiledStep:
        device, hidden = self.loaded.device, self.loaded.model.config.get_text_config().hidden_size
        buffers = _Buffers(
            embeddings=torch.zeros(rows, hidden, dtype=self.loaded.dtype, device=device),
            positions=torch.zeros(rows, dtype=torch.int64, device=device),
            slots=torch.full((rows,), self.pool.scratch, dtype=torch.int64, device=device),
            where=torch.full((rows, span), self.pool.scratch, dtype=torch.int64, device=device),
            lengths=torch.ones(rows, dtype=torch.int64, device=device),
        )

        def run(embeddings, positions, slots, where, lengths):
            layout = Layout(slots=slots, attend=PaddedRows(where, lengths).attend)
            everywhere = torch.arange(rows, device=device)
            return self._forward(embeddings, positions, everywhere, self._cache, layout)

        return _GraphStep(run, buffers) if device.type == "cuda" else _CompiledStep(run, buffers)

    def _fill(self, buffers: _Buffers, embeddings: torch.Tensor, pieces: Sequence[Piece], rows: int, span: int) -> None:
        padding = rows - len(pieces)
        scratch = self.pool.scratch
        bases = torch.tensor([p.base for p in pieces] + [scratch] * padding)
        starts = torch.tensor([p.start for p in pieces] + [0] * padding)
        offsets = torch.arange(span)[None]
        # what is hidden must be finite all the same: a masked NaN is still a NaN
        where = bases[:, None] + torch.where(offsets <= starts[:, None], offsets, 0)
        buffers.embeddings[: len(pieces)].copy_(embeddings)
        buffers.positions.copy_(starts)
        buffers.slots.copy_(bases + starts)
        buffers.where.copy_(where)
        buffers.lengths.copy_(starts + 1)


class _GraphStep:
    """A CUDA graph over fixed buffers."""

    def __init__(self, run, buffers: _Buffers) -> None:
        self.buffers = buffers
        inputs = (buffers.embeddings, buffers.positions, buffers.slots, buffers.where, buffers.lengths)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = run(*inputs)

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._graph.replay()
        return self._outputs


class _CompiledStep:
    """The same step through `torch.compile`, shapes fixed.

    Freezing lets the compiler lay the weights out for the CPU's matrix kernels; each bucket keeps its own copy of them.
    """

    def __init__(self, run, buffers: _Buffers) -> None:
        self.buffers = buffers
        self._run = torch.compile(run, dynamic=False)
        with inductor.patch(freezing=True):
            self()

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        b = self.buffers
        return self._run(b.embeddings, b.positions, b.slots, b.where, b.lengths)
