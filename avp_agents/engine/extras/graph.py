"""A decode or latent step captured once and played back: static shapes, a few buckets of rows and length.

On a GPU launching hundreds of small kernels costs more time than they take; a CUDA graph launches them as one. On a CPU
`torch.compile` fuses them instead. Both see the same function on the same buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch._inductor import config as inductor

from avp_agents.engine.core.attention import PoolCache
from avp_agents.engine.core.kv_pool import KvPool
from avp_agents.engine.core.layout import Layout, PaddedRows
from avp_agents.engine.core.model import Forward, LoadedModel

if TYPE_CHECKING:
    from avp_agents.engine.core.forward import Piece

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


class CapturedStep:
    """Runs single-position rows through a captured forward pass.

    Args:
        loaded: The model, on one device.
        pool: Its KV memory.
    """

    def __init__(self, loaded: LoadedModel, pool: KvPool) -> None:
        self._loaded, self._pool = loaded, pool
        self._forward = Forward(loaded.model)
        self._cache = PoolCache(pool)
        self._steps: dict[tuple[int, int], _GraphStep | _CompiledStep] = {}

    def __call__(self, embeddings: torch.Tensor, pieces: Sequence[Piece]) -> tuple[torch.Tensor, torch.Tensor]:
        """One step.

        Args:
            embeddings: ``[n, hidden]``.
            pieces: n pieces of one position each.

        Returns:
            Hidden states ``[n, hidden]`` and logits ``[n, vocabulary]``.
        """
        longest = max(piece.start + 1 for piece in pieces)
        rows = next((b for b in ROW_BUCKETS if b >= len(pieces)), len(pieces))
        span = min(-(-longest // SPAN_BUCKET) * SPAN_BUCKET, self._pool.positions)
        step = self._steps.get((rows, span))
        if step is None:
            step = self._steps[(rows, span)] = self._capture(rows, span)
        self._fill(step.buffers, embeddings, pieces, rows, span)
        hidden, logits = step()
        return hidden[: len(pieces)].clone(), logits[: len(pieces)].clone()

    def _capture(self, rows: int, span: int) -> _GraphStep | _CompiledStep:
        device, hidden = self._loaded.device, self._loaded.model.config.get_text_config().hidden_size
        buffers = _Buffers(
            embeddings=torch.zeros(rows, hidden, dtype=self._loaded.dtype, device=device),
            positions=torch.zeros(rows, dtype=torch.int64, device=device),
            slots=torch.full((rows,), self._pool.scratch, dtype=torch.int64, device=device),
            where=torch.full((rows, span), self._pool.scratch, dtype=torch.int64, device=device),
            lengths=torch.ones(rows, dtype=torch.int64, device=device),
        )

        def run(embeddings, positions, slots, where, lengths):
            self._cache.place(slots)
            layout = Layout(slots=slots, padded=PaddedRows(where, lengths))
            everywhere = torch.arange(rows, device=device)
            return self._forward(embeddings, positions, everywhere, self._cache, layout)

        return _GraphStep(run, buffers) if device.type == "cuda" else _CompiledStep(run, buffers)

    def _fill(self, buffers: _Buffers, embeddings: torch.Tensor, pieces: Sequence[Piece], rows: int, span: int) -> None:
        padding = rows - len(pieces)
        scratch = self._pool.scratch
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
