"""Where a sequence starts: which of its positions have keys and values somewhere already."""

from __future__ import annotations

import time
from collections.abc import Iterable

from avp_agents.context import Context, LatentSegment, Segment, SplicedSegment, prefix_of
from avp_agents.engine.core.kv_pool import KvPool, PooledKv, Region
from avp_agents.engine.core.request import Placement
from avp_agents.engine.core.sequence import Sequence
from avp_agents.lineage import concatenated, shared_positions


def place(sequence: Sequence, pool: KvPool, *, chunk: int | None) -> tuple[Region, Placement] | None:
    """Open a region for a sequence, its known positions filled in.

    Args:
        sequence: Not admitted yet.
        pool: The KV memory.
        chunk: Positions per chunk where results must be equal bit for bit: used are then only what the base context's
            own run computed, and whole chunks from position 0 on, not what another run computed in other shapes. None
            uses whatever is equal but for rounding.

    Returns:
        The region and how it was filled; None while running sequences hold the memory.

    Raises:
        KvMemoryError: The pool is smaller than the sequence.
    """
    started = time.monotonic()
    request = sequence.request
    views = [view for view in pool.views() if view.store is request.store]
    # the last position is always fed again, since its hidden state is needed
    most = sequence.total - 1
    if chunk is None:
        view, matched = _best_view(sequence.lineage, views)
    else:
        candidates = (
            _own_view(request.base, views),
            _prefix_view(request.prefix, sequence.lineage, views),
            _chunked_view(sequence.lineage, views, chunk, most),
        )
        view, matched = max(candidates, key=lambda candidate: candidate[1])
    host = request.host_kv
    from_host = 0
    if host is not None:
        source = request.host_context
        assert source is not None
        from_host = min(host.length, shared_positions(source.lineage, sequence.lineage))
    if host is not None and from_host > matched:
        start = sequence.whole(min(from_host, most))
        region = pool.open(0, sequence.capacity, None)
        if region is None:
            return None
        pool.upload(region, host, start)
        moved = host.nbytes * from_host // host.length
        return region, Placement(_reused(from_host, start), start, moved, time.monotonic() - started)
    start = sequence.whole(min(matched, most))
    region = pool.open(start, sequence.capacity, view if start else None)
    if region is None:
        return None
    return region, Placement(_reused(matched, start), start, 0, time.monotonic() - started)


def _reused(matched: int, start: int) -> int:
    """Positions that are not computed anew; the last of a lineage is fed once more where its keys are there, too."""
    return matched if matched - start <= 1 else start


def copy_splice(sequence: Sequence, pool: KvPool) -> bool:
    """Copy the keys and values of the sequence's next splice from where they were made, as far as they are there.

    Returns:
        Whether any were. Once the splice is complete its keys are yet to be moved (`Sequence.moves_due`).
    """
    splice = sequence.next_splice()
    if splice is None:
        return False
    branch = concatenated(prefix_of(sequence.lineage, splice.prefix), splice.segments)
    most = splice.prefix + len(splice)
    # the keys of a splice within this one were moved already: it is copied whole or not at all
    least = most if any(isinstance(part, SplicedSegment) for part in splice.segments) else splice.prefix + 1
    source, found = 0, 0
    for view in pool.views():
        context, region = view.context(), view.region
        if context is None or region is None or view.store is not sequence.request.store:
            continue
        matched = min(view.length, most, shared_positions(concatenated(context.lineage), branch))
        if matched > found:
            source, found = region.start + splice.prefix, matched
    if found < least:
        return False
    assert sequence.region is not None
    pool.copy(source, sequence.region.start + sequence.length, found - splice.prefix)
    sequence.spliced(found - splice.prefix)
    return True


def _own_view(base: Context | None, views: Iterable[PooledKv]) -> tuple[PooledKv | None, int]:
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


def _prefix_view(
    prefix: Context | None, lineage: tuple[Segment, ...], views: Iterable[PooledKv]
) -> tuple[PooledKv | None, int]:
    """A KV-cache of the prefix's own positions, and how many of them the lineage begins with."""
    if prefix is None:
        return None, 0
    view, own = _own_view(prefix, views)
    return view, min(own, shared_positions(prefix.lineage, lineage))


def _chunked_view(
    lineage: tuple[Segment, ...], views: Iterable[PooledKv], chunk: int, most: int
) -> tuple[PooledKv | None, int]:
    """The KV-cache with most whole chunks, among the first `most` positions, that this lineage would compute, too."""
    best: PooledKv | None = None
    longest = 0
    for view in views:
        context, region = view.context(), view.region
        if context is None or region is None or min(region.chunked, view.length) <= longest:
            continue
        shared = min(region.chunked, view.length, most, shared_positions(context.lineage, lineage))
        whole = shared // chunk * chunk
        if whole > longest:
            best, longest = view, whole
    return best, longest


def _best_view(lineage: tuple[Segment, ...], views: Iterable[PooledKv]) -> tuple[PooledKv | None, int]:
    """The resident KV-cache that covers most of a lineage; among equals the one that can be grown in place."""
    best: PooledKv | None = None
    best_key = (0, 0)
    for view in views:
        context: Context | None = view.context()
        if context is None:
            continue
        matched = min(view.length, shared_positions(context.lineage, lineage))
        key = (matched, -(view.length - matched))
        if matched and key > best_key:
            best, best_key = view, key
    return best, best_key[0]
