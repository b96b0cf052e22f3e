"""Running one batch: from the pieces of several sequences to one forward pass and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from avp_agents.engine.core.attention import PoolCache
from avp_agents.engine.core.kv_pool import KvPool
from avp_agents.engine.core.layout import Layout, Row
from avp_agents.engine.core.model import Forward, LoadedModel
from avp_agents.engine.core.prefill import Span, extended, frame_length
from avp_agents.engine.extras.graph import CapturedStep

INVARIANT_CHUNK = 64


Inputs = Sequence[int] | torch.Tensor
"""Token ids, or latent embeddings ``[count, hidden]``."""


@dataclass(frozen=True)
class Piece:
    """The next positions of one sequence.

    Attributes:
        inputs: What is fed, in order.
        base: Where the sequence's keys and values begin in the pool.
        start: Positions of the sequence that are in the pool already.
        wants_logits: Whether the last position's logits are needed.
        frame: Which of those they see, if not all; see `avp_agents.engine.core.prefill`.
    """

    inputs: tuple[Inputs, ...]
    base: int
    start: int
    wants_logits: bool
    frame: tuple[Span, ...] | None = None

    @property
    def count(self) -> int:
        """New positions."""
        return sum(len(part) for part in self.inputs)

    @property
    def is_step(self) -> bool:
        """Whether it is a single position behind all others of its sequence."""
        return self.count == 1 and self.frame is None


@dataclass(frozen=True)
class PieceOutput:
    """What came out at a piece's last position: hidden state ``[hidden]``, logits ``[vocabulary]`` where wanted."""

    hidden: torch.Tensor
    logits: torch.Tensor | None


class Runner:
    """Turns pieces into forward passes.

    Args:
        loaded: The model.
        pool: Its KV memory.
        invariant_rows: Give every row the same shapes and sums alone as in company: single positions run in passes of
            this many rows, as many as ever run at once, and prompts alone in chunks of `INVARIANT_CHUNK` positions.
            None lets shapes follow the company.
        captured: Runs single positions as one captured step; None runs everything eagerly.
    """

    def __init__(
        self, loaded: LoadedModel, pool: KvPool, *, invariant_rows: int | None, captured: CapturedStep | None
    ) -> None:
        self._embed = loaded.vocabulary.embed
        self._device = loaded.device
        self._hidden_size = loaded.model.config.get_text_config().hidden_size
        self._dtype = loaded.dtype
        self._pool = pool
        self._cache = PoolCache(pool)
        self._forward = Forward(loaded.model)
        self._invariant_rows = invariant_rows
        self._captured = captured

    def run(self, pieces: Sequence[Piece]) -> list[PieceOutput]:
        """Run all pieces; one output each, in order."""
        if self._invariant_rows is not None:
            return self._run_invariant(pieces)
        if self._captured is not None and len(pieces) > 1:
            singles = [i for i, piece in enumerate(pieces) if piece.is_step]
            longer = [i for i, piece in enumerate(pieces) if not piece.is_step]
            return self._run_groups(pieces, [g for g in (singles, longer) if g])
        # in the order of their places in the pool, rows that are equally spaced there are read as one
        return self._run_groups(pieces, [sorted(range(len(pieces)), key=lambda i: pieces[i].base)])

    def _run_invariant(self, pieces: Sequence[Piece]) -> list[PieceOutput]:
        singles = [i for i, piece in enumerate(pieces) if piece.is_step]
        alone = [[i] for i, piece in enumerate(pieces) if not piece.is_step]
        return self._run_groups(pieces, [singles, *alone] if singles else alone)

    def _run_groups(self, pieces: Sequence[Piece], groups: list[list[int]]) -> list[PieceOutput]:
        outputs: dict[int, PieceOutput] = {}
        for group in groups:
            outputs.update(zip(group, self._run_together([pieces[i] for i in group]), strict=True))
        return [outputs[i] for i in range(len(pieces))]

    def _run_together(self, pieces: Sequence[Piece]) -> list[PieceOutput]:
        """One forward pass."""
        total = sum(piece.count for piece in pieces)
        steps = all(piece.is_step for piece in pieces)
        if self._captured is not None and steps:
            hidden, logits = self._captured(self._embeddings(pieces, total), pieces)
            return [PieceOutput(hidden[i], logits[i] if piece.wants_logits else None) for i, piece in enumerate(pieces)]
        size = self._padded_size(total, steps)
        layout, positions = self._layout(pieces, size)
        self._cache.place(layout.slots)
        lasts = [row.first + row.count - 1 for row in layout.rows]
        wanted = [last for last, piece in zip(lasts, pieces, strict=True) if piece.wants_logits]
        logits_at = self._logits_at(wanted, size, steps)
        hidden, logits = self._forward(self._embeddings(pieces, size), positions, logits_at, self._cache, layout)
        rows = iter(range(len(wanted)))
        return [
            PieceOutput(hidden[last], logits[next(rows)] if piece.wants_logits and logits is not None else None)
            for last, piece in zip(lasts, pieces, strict=True)
        ]

    def _padded_size(self, total: int, steps: bool) -> int:
        if self._invariant_rows is None:
            return total
        return self._invariant_rows if steps else INVARIANT_CHUNK

    def _logits_at(self, wanted: list[int], size: int, singles: bool) -> torch.Tensor | None:
        """Positions that need logits; in a batch-invariant pass the head too always sees the same number of rows."""
        if not wanted:
            return None
        if self._invariant_rows is not None and singles:
            wanted = wanted + [wanted[-1]] * (size - len(wanted))
        return torch.tensor(wanted, device=self._device)

    def _embeddings(self, pieces: Sequence[Piece], size: int) -> torch.Tensor:
        """Input embeddings ``[size, hidden]``; positions past the pieces repeat token 0."""
        ids: list[int] = []
        latents: list[tuple[int, torch.Tensor]] = []
        for part in (part for piece in pieces for part in piece.inputs):
            if isinstance(part, torch.Tensor):
                latents.append((len(ids), part))
                ids.extend([0] * len(part))
            else:
                ids.extend(part)
        ids.extend([0] * (size - len(ids)))
        embeddings = self._embed(torch.tensor(ids, device=self._device))
        for first, rows in latents:
            embeddings[first : first + len(rows)] = rows.to(embeddings.device)
        return embeddings

    def _layout(self, pieces: Sequence[Piece], size: int) -> tuple[Layout, torch.Tensor]:
        rows: list[Row] = []
        slots: list[int] = []
        positions: list[int] = []
        for piece in pieces:
            stop = piece.start + piece.count
            spans = None if piece.frame is None else extended(piece.frame, (piece.start, stop))
            seen = stop if spans is None else frame_length(spans)
            rows.append(Row(first=len(slots), count=piece.count, base=piece.base, length=seen, spans=spans))
            slots.extend(range(piece.base + piece.start, piece.base + stop))
            positions.extend(range(seen - piece.count, seen))
        padding = size - len(slots)
        slots.extend([self._pool.scratch] * padding)
        positions.extend([0] * padding)
        where = torch.tensor(slots, device=self._device)
        layout = Layout(slots=where, rows=tuple(rows), realign=self._invariant_rows is not None)
        return layout, torch.tensor(positions, device=self._device)
