"""Pure operations on lineages: what two have in common, cuts and joins, another dtype, equal values.

None of them computes keys and values, and none knows an engine. `prefix_of` and `leaves` stand beside the segments in
`avp_agents.context`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from avp_agents.context import Context, LatentSegment, Segment, SplicedSegment, TokenSegment, leaves

if TYPE_CHECKING:
    import torch

Lineage = tuple[Segment, ...]


def shared_positions(one: Lineage, other: Lineage) -> int:
    """Leading positions that two lineages have in common: equal ids, and latent runs of equal values.

    A latent run or a splice counts as a whole or not at all.
    """
    shared = 0
    for a, b in zip(one, other, strict=False):
        same = len(a) if a is b else _shared_by_segments(a, b)
        shared += same
        if same < max(len(a), len(b)):
            break
    return shared


def _shared_by_segments(one: Segment, other: Segment) -> int:
    if isinstance(one, TokenSegment) and isinstance(other, TokenSegment):
        return _common_ids(one.token_ids, other.token_ids)
    if isinstance(one, LatentSegment) and isinstance(other, LatentSegment):
        return len(one) if _same_latents(one, other) else 0
    if isinstance(one, SplicedSegment) and isinstance(other, SplicedSegment):
        inner = shared_positions(one.segments, other.segments)
        return inner if one.prefix == other.prefix and inner == len(one) == len(other) else 0
    return 0


def _common_ids(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    if one == other:
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def same_values(one: Context, other: Context) -> bool:
    """Whether two contexts of the same recipe hold the same latent values, bit for bit.

    Runs of one recipe may differ in their last bits. A KV-cache belongs to the values it was computed from.
    """
    pairs = zip(leaves(one.lineage), leaves(other.lineage), strict=True)
    return all(a is b or _same_latents(a, b) for a, b in pairs if isinstance(a, LatentSegment))


def _same_latents(one: LatentSegment, other: Segment) -> bool:
    return isinstance(other, LatentSegment) and one.embeddings.equal(other.embeddings)


def length_of(lineage: Lineage) -> int:
    """Positions of a lineage."""
    return sum(len(segment) for segment in lineage)


def ids_of(lineage: Lineage) -> list[int | None]:
    """One entry per position: its token id, None where it is latent or spliced."""
    ids: list[int | None] = []
    for segment in lineage:
        ids.extend(segment.token_ids if isinstance(segment, TokenSegment) else [None] * len(segment))
    return ids


def suffix_of(lineage: Lineage, positions: int) -> Lineage:
    """A lineage without its first `positions` positions, which do not cut a run of latent steps or a splice."""
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


def concatenated(*lineages: Iterable[Segment]) -> Lineage:
    """Lineages behind one another, consecutive token segments as one: where they were cut does not matter."""
    joined: list[Segment] = []
    for segment in (segment for lineage in lineages for segment in lineage if len(segment)):
        last = joined[-1] if joined else None
        if isinstance(segment, TokenSegment) and isinstance(last, TokenSegment):
            joined[-1] = TokenSegment(last.token_ids + segment.token_ids)
        else:
            joined.append(segment)
    return tuple(joined)


def moved(context: Context, start: int = 0) -> Lineage:
    """A lineage from segment `start` on, in one piece, to stand behind other positions than those it was made behind.

    Its latent steps say where that was (`LatentSegment.origin`).
    """
    segments: list[Segment] = []
    for recipe_id, segment in list(zip(context.recipe_ids, context.lineage, strict=True))[start:]:
        for number, leaf in enumerate(leaves((segment,))):
            place = f"{recipe_id}.{number}".encode()
            origin = hashlib.blake2b(place, digest_size=32).hexdigest()
            segments.append(replace(leaf, origin=origin) if isinstance(leaf, LatentSegment) else leaf)
    return tuple(segments)


def in_one_piece(context: Context) -> Lineage:
    """A lineage with its splices dissolved; from the first one on, latent steps were made behind another lineage."""
    splices = [index for index, segment in enumerate(context.lineage) if isinstance(segment, SplicedSegment)]
    return (*context.lineage[: splices[0]], *moved(context, splices[0])) if splices else context.lineage


def distinct(contexts: Sequence[Context]) -> list[Context]:
    """The contexts that no other one holds, each once, in order."""
    kept: list[Context] = []
    for index, context in enumerate(contexts):
        others = (other for i, other in enumerate(contexts) if i != index)
        held = any(other.extends(context) and not context.extends(other) for other in others)
        if not held and not any(one.recipe_id == context.recipe_id for one in kept):
            kept.append(context)
    return kept


def in_dtype(context: Context, dtype: str) -> Context:
    """The same lineage for an engine of the same weights that runs `dtype`: latents cast, without its KV-cache.

    Args:
        context: Of any dtype.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    """
    import torch

    target = getattr(torch, dtype)
    readout = context.readout
    if readout is not None:
        readout = replace(readout, hidden=readout.hidden.to(target))
    return Context(context.fingerprint, dtype, tuple(_cast(segment, target) for segment in context.lineage), readout)


def _cast(segment: Segment, dtype: torch.dtype) -> Segment:
    if isinstance(segment, LatentSegment):
        return replace(segment, embeddings=segment.embeddings.to(dtype))
    if isinstance(segment, SplicedSegment):
        return replace(segment, segments=tuple(_cast(inner, dtype) for inner in segment.segments))
    return segment
