"""Where a sequence starts: which of its positions have keys and values somewhere already (the prefix cache)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from avp_agents.engine.core.kv_pool import KvPool, PooledKv, Region
from avp_agents.engine.core.prefill import whole_positions
from avp_agents.engine.core.sequence import Sequence, Start
from avp_agents.lineage import shared_positions

Found = tuple[PooledKv | None, int]
"""A KV-cache, and how many leading positions of it serve."""

FindStart = Callable[[Sequence, list[PooledKv], int], Found]
"""Of the KV-caches of a sequence's owner, the one to start from; at most the given number of positions serve."""


def place(sequence: Sequence, pool: KvPool, find: FindStart) -> tuple[Region, Start] | None:
    """Open a region for a sequence, its known positions filled in.

    Args:
        sequence: Not admitted yet.
        pool: The KV memory.
        find: Which KV-cache it starts from, unless a store has more of it.

    Returns:
        The region and how it was filled; None while running sequences hold the memory.

    Raises:
        KvMemoryError: The pool is smaller than the sequence.
    """
    began = time.monotonic()
    request = sequence.request
    # the last position is always fed again, since its hidden state is needed
    most = sequence.total - 1
    view, matched = find(sequence, [view for view in pool.views() if view.owner is request.owner], most)
    host, source = request.host_kv, request.host_context
    from_host = 0
    if host is not None and source is not None:
        from_host = min(host.length, shared_positions(source.lineage, sequence.lineage))
    uploads = host is not None and from_host > matched
    reused = from_host if uploads else matched
    start = whole_positions(sequence.runs, min(reused, most))
    region = pool.open(0 if uploads else start, sequence.capacity, view if start and not uploads else None)
    if region is None:
        return None
    moved = 0
    if host is not None and uploads:
        pool.upload(region, host, start)
        moved = host.nbytes * from_host // host.length
    # the last position of a lineage is fed once more where its keys are there, too: that is not computed anew
    reused = reused if reused - start <= 1 else start
    return region, Start(reused, start, moved, time.monotonic() - began)


def longest_match(sequence: Sequence, views: Iterable[PooledKv], most: int) -> Found:
    """The KV-cache that covers most of a lineage; among equals the one that can be grown in place."""
    best: PooledKv | None = None
    best_key = (0, 0)
    for view in views:
        context = view.context()
        if context is None:
            continue
        matched = min(view.length, shared_positions(context.lineage, sequence.lineage))
        key = (matched, -(view.length - matched))
        if matched and key > best_key:
            best, best_key = view, key
    return best, best_key[0]
