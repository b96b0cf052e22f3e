"""Where a sequence starts: which of its positions have keys and values somewhere already."""

from __future__ import annotations

import time

import torch

from avp_agents.context import Context, LatentSegment, Segment, TokenSegment
from avp_agents.engine.kv_pool import KvPool, PooledKv, Region
from avp_agents.engine.sequence import Placement, Sequence


def place(sequence: Sequence, pool: KvPool, *, exact_parents_only: bool) -> tuple[Region, Placement] | None:
    """Open a region for a sequence, its known positions filled in.

    Args:
        sequence: Not admitted yet.
        pool: The KV memory.
        exact_parents_only: Use only what the base context's own run computed, not equal tokens behind it that another
            run computed in other shapes (whose last bits may differ).

    Returns:
        The region and how it was filled; None while running sequences hold the memory.

    Raises:
        KvMemoryError: The pool is smaller than the sequence.
    """
    started = time.monotonic()
    request = sequence.request
    if exact_parents_only:
        view, matched = _own_view(request.base, pool)
    else:
        view, matched = _best_view(sequence.lineage, pool)
    # the last position is always fed again, since its hidden state is needed
    most = sequence.total - 1
    host = request.host_kv
    from_host = 0
    if host is not None:
        source = request.base or request.prefix
        assert source is not None
        from_host = min(host.length, shared_positions(source.lineage, sequence.lineage))
    if host is not None and from_host > matched:
        region = pool.open(0, sequence.capacity, None)
        if region is None:
            return None
        pool.upload(region, host, min(from_host, most))
        moved = host.nbytes * from_host // host.length
        return region, Placement(from_host, min(from_host, most), moved, time.monotonic() - started)
    start = min(matched, most)
    region = pool.open(start, sequence.capacity, view if start else None)
    if region is None:
        return None
    return region, Placement(matched, start, 0, time.monotonic() - started)


def shared_positions(one: tuple[Segment, ...], other: tuple[Segment, ...]) -> int:
    """Leading positions that two lineages have in common: equal ids, and latent runs of equal values."""
    shared = 0
    for a, b in zip(one, other, strict=False):
        if a is b:
            shared += len(a)
            continue
        if isinstance(a, LatentSegment) and isinstance(b, LatentSegment):
            if a.embeddings.shape != b.embeddings.shape or not torch.equal(a.embeddings, b.embeddings):
                return shared
            shared += len(a)
            continue
        if not (isinstance(a, TokenSegment) and isinstance(b, TokenSegment)):
            return shared
        same = _common_ids(a.token_ids, b.token_ids)
        shared += same
        if same < max(len(a), len(b)):
            return shared
    return shared


def _common_ids(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    if one == other:
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _own_view(base: Context | None, pool: KvPool) -> tuple[PooledKv | None, int]:
    """A KV-cache of the base's own positions, from its own run or a descendant's."""
    if base is None:
        return None, 0
    # the last token of an answer has keys and values only where a descendant fed it, so nobody takes them
    own = len(base) if isinstance(base.lineage[-1], LatentSegment) else len(base) - 1
    for view in pool.views():
        context = view.context()
        if context is not None and view.length >= len(base) - 1 and context.extends(base):
            matched = min(view.length, own, shared_positions(context.lineage, base.lineage))
            if matched >= len(base) - 1:
                return view, matched
    return None, 0


def _best_view(lineage: tuple[Segment, ...], pool: KvPool) -> tuple[PooledKv | None, int]:
    """The resident KV-cache that covers most of a lineage; among equals the one that can be grown in place."""
    best: PooledKv | None = None
    best_key = (0, 0)
    for view in pool.views():
        context: Context | None = view.context()
        if context is None:
            continue
        matched = min(view.length, shared_positions(context.lineage, lineage))
        key = (matched, -(view.length - matched))
        if matched and key > best_key:
            best, best_key = view, key
    return best, best_key[0]
