"""Running one batch: from the pieces of several sequences to one forward pass and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from avp_agents.engine.core.attention import Layout, PoolCache, Row
from avp_agents.engine.core.kv_pool import KvPool
from avp_agents.engine.core.latent_step import LatentStep
from avp_agents.engine.core.model import Forward, LoadedModel
from avp_agents.engine.core.prefill import Span, extended, frame_length

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


class ModelRunner:
    """A model on its KV pool: turns pieces into forward passes.

    Args:
        loaded: The model.
        pool: Its KV memory.
        latent_step: Its f(h).

    Attributes:
        vocab_limit: Ids from here on are padding rows of the head.
    """

    def __init__(self, loaded: LoadedModel, pool: KvPool, latent_step: LatentStep) -> None:
        self.loaded, self.pool, self.latent_step = loaded, pool, latent_step
        self.vocab_limit = loaded.vocabulary.size
        self._forward = Forward(loaded.model)
        self._cache = PoolCache(pool)

    def run(self, pieces: Sequence[Piece]) -> list[PieceOutput]:
        """Run all pieces; one output each, in order."""
        # in the order of their places in the pool, rows that are equally spaced there are read as one
        return self._run_groups(pieces, [sorted(range(len(pieces)), key=lambda i: pieces[i].base)])

    def _run_groups(self, pieces: Sequence[Piece], groups: Sequence[Sequence[int]]) -> list[PieceOutput]:
        """One forward pass for each group of pieces, given by their indices."""
        outputs: dict[int, PieceOutput] = {}
        for group in groups:
            outputs.update(zip(group, self._run_together([pieces[i] for i in group]), strict=True))
        return [outputs[i] for i in range(len(pieces))]

    def _run_together(self, pieces: Sequence[Piece]) -> list[PieceOutput]:
        """One forward pass."""
        size = self._size(pieces)
        layout, positions = self._layout(pieces, size)
        lasts = [row.first + row.count - 1 for row in layout.rows]
        wanted = [last for last, piece in zip(lasts, pieces, strict=True) if piece.wants_logits]
        logits_at = torch.tensor(self._logits_at(wanted, pieces, size), device=self.loaded.device) if wanted else None
        embeddings = self.embeddings(pieces, size)
        hidden, logits = self._forward(embeddings, positions, logits_at, self._cache, layout)
        rows = iter(range(len(wanted)))
        return [
            PieceOutput(hidden[last], logits[next(rows)] if piece.wants_logits and logits is not None else None)
            for last, piece in zip(lasts, pieces, strict=True)
        ]

    def _size(self, pieces: Sequence[Piece]) -> int:
        """Positions of a pass, padding included."""
        return sum(piece.count for piece in pieces)

    def _logits_at(self, wanted: list[int], pieces: Sequence[Piece], size: int) -> list[int]:
        """Positions whose logits are computed; `wanted` are the first of them."""
        return wanted

    def _layout(self, pieces: Sequence[Piece], size: int, *, realign: bool = False) -> tuple[Layout, torch.Tensor]:
        """Where the positions of a pass belong, and their position ids ``[size]``."""
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
        slots.extend([self.pool.scratch] * padding)
        positions.extend([0] * padding)
        device = self.loaded.device
        layout = Layout(slots=torch.tensor(slots, device=device), rows=tuple(rows), realign=realign)
        return layout, torch.tensor(positions, device=device)

    def embeddings(self, pieces: Sequence[Piece], size: int) -> torch.Tensor:
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
        embeddings = self.loaded.vocabulary.embed(torch.tensor(ids, device=self.loaded.device))
        for first, rows in latents:
            embeddings[first : first + len(rows)] = rows.to(embeddings.device)
        return embeddings
