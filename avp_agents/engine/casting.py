"""A context in another dtype of the same weights: its latents are cast, its KV-cache stays behind."""

from __future__ import annotations

from dataclasses import replace

import torch

from avp_agents.context import Context, LatentSegment, Segment, SplicedSegment


def in_dtype(context: Context, dtype: str) -> Context:
    """The same lineage for an engine that runs `dtype`."""
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
