"""Batch invariance: a row computes the same bits alone and in company.

Sums are made in the order that shapes and places in memory suggest to the kernels, so both are fixed: single positions
run in passes of as many rows as ever run at once, prompts alone in chunks of `INVARIANT_CHUNK` positions, every row on
a copy of its queries. A sequence may start from what another one computed only where that was computed in the same
shapes: from its own base's run, or from whole chunks that begin at position 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from typing_extensions import override

from avp_agents.context import Context, LatentSegment, Segment
from avp_agents.engine.core.attention import Layout
from avp_agents.engine.core.forward import ModelRunner, Piece, PieceOutput
from avp_agents.engine.core.kv_pool import KvPool, PooledKv
from avp_agents.engine.core.latent_step import LatentStep
from avp_agents.engine.core.model import LoadedModel
from avp_agents.engine.core.sequence import Extra
from avp_agents.engine.core.sequence import Sequence as RunningSequence
from avp_agents.engine.core.start import Found
from avp_agents.lineage import shared_positions

INVARIANT_CHUNK = 64


class InvariantRunner(ModelRunner):
    """A `ModelRunner` whose passes have one shape for steps and one for prompts.

    Args:
        rows: As many as ever run at once.
    """

    def __init__(self, loaded: LoadedModel, pool: KvPool, latent_step: LatentStep, *, rows: int) -> None:
        super().__init__(loaded, pool, latent_step)
        self._rows = rows

    @override
    def run(self, pieces: Sequence[Piece]) -> list[PieceOutput]:
        steps = [i for i, piece in enumerate(pieces) if piece.is_step]
        alone = [[i] for i, piece in enumerate(pieces) if not piece.is_step]
        return self._run_groups(pieces, [steps, *alone] if steps else alone)

    @override
    def _size(self, pieces: Sequence[Piece]) -> int:
        return self._rows if pieces[0].is_step else INVARIANT_CHUNK

    @override
    def _logits_at(self, wanted: list[int], pieces: Sequence[Piece], size: int) -> list[int]:
        """The head, too, always sees the same number of rows."""
        return wanted + [wanted[-1]] * (size - len(wanted)) if pieces[0].is_step else wanted

    @override
    def _layout(self, pieces: Sequence[Piece], size: int, *, realign: bool = True) -> tuple[Layout, torch.Tensor]:
        return super()._layout(pieces, size, realign=realign)


class ChunkNotes(Extra):
    """Notes which leading positions of a region were computed in whole chunks."""

    @override
    def after_fed(self, sequence: RunningSequence, piece: Piece) -> None:
        region = sequence.region
        assert region is not None
        if piece.count == INVARIANT_CHUNK and piece.frame is None and region.chunked == piece.start:
            region.chunked += piece.count


def same_shapes(sequence: RunningSequence, views: Iterable[PooledKv], most: int) -> Found:
    """The KV-cache with most positions that were computed in the shapes in which this sequence would compute them."""
    request, lineage = sequence.request, sequence.lineage
    view, own = _own_view(request.prefix, views)
    behind = min(own, shared_positions(request.prefix.lineage, lineage)) if request.prefix is not None else 0
    candidates = (_own_view(request.base, views), (view, behind), _chunked_view(lineage, views, most))
    return max(candidates, key=lambda candidate: candidate[1])


def _own_view(base: Context | None, views: Iterable[PooledKv]) -> Found:
    """A KV-cache of the base's own positions, from its own run or a descendant's."""
    if base is None:
        return None, 0
    # the last token of an answer has keys and values only where a descendant fed it, so nobody takes them
    own = len(base) if isinstance(base.lineage[-1], LatentSegment) else len(base) - 1
    for view in views:
        context = view.context()
        if context is not None and view.length >= len(base) - 1 and context.extends(base):
            matched = min(view.length, own, shared_positions(context.lineage, base.lineage))
            if matched >= len(base) - 1:
                return view, matched
    return None, 0


def _chunked_view(lineage: tuple[Segment, ...], views: Iterable[PooledKv], most: int) -> Found:
    """The KV-cache with most whole chunks, among the first `most` positions, that this lineage would compute, too."""
    best: PooledKv | None = None
    longest = 0
    for view in views:
        context, region = view.context(), view.region
        if context is None or region is None or min(region.chunked, view.length) <= longest:
            continue
        shared = min(region.chunked, view.length, most, shared_positions(context.lineage, lineage))
        whole = shared // INVARIANT_CHUNK * INVARIANT_CHUNK
        if whole > longest:
            best, longest = view, whole
    return best, longest
