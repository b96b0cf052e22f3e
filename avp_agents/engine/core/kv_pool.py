"""The engine's KV memory: one preallocated tensor pair per layer, handed out in regions of consecutive positions.

A *region* holds one growing run of positions. Contexts are views of its first `length` positions: a child that
continues where the region's written part ends grows in place and shares the parent's memory; a second child (a fork)
gets a copy, which on every device measured costs far less than gathering a shared prefix at each step
(`avp-agents bench engine`, row "fork").
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from avp_agents.context import Context
from avp_agents.errors import ConfigurationError, KvMemoryError
from avp_agents.kv_cache import HostKv, KvCache

START_MULTIPLE = 16
"""Regions start at multiples of it: matrix kernels sum in another order where their operands are aligned otherwise."""
_ALIGNMENT = 64


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer stores per position.

    Attributes:
        kv_heads: Key and value heads.
        key_dim, value_dim: Elements per head.
        device: Where the layer runs.
        dtype: Element type of keys and values.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    device: torch.device
    dtype: torch.dtype

    @property
    def bytes_per_position(self) -> int:
        """Bytes of keys and values of one position."""
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


@dataclass(eq=False)
class Owner:
    """Whose KV-caches they are: those of one owner serve no request of another.

    Attributes:
        offload: Called with a KV-cache that is about to be evicted.
    """

    offload: Callable[[PooledKv], None]


class Region:
    """Consecutive positions ``start : start + capacity`` of the pool.

    Attributes:
        written: Positions holding keys and values of the region's lineage.
        chunked: Leading positions that were computed chunk by chunk from position 0 on (batch-invariant engines only):
            whoever begins with the same inputs computes the same bits.
        writer: Whether a running sequence may append.
        views: Live `PooledKv` objects that show a prefix of it.
        last_use: Tick of the last use, for LRU.
    """

    __slots__ = ("__weakref__", "capacity", "chunked", "last_use", "start", "views", "writer", "written")

    def __init__(self, start: int, capacity: int) -> None:
        self.start, self.capacity = start, capacity
        self.written, self.chunked, self.writer, self.last_use = 0, 0, False, 0
        self.views: weakref.WeakSet[PooledKv] = weakref.WeakSet()


class PooledKv(KvCache):
    """A context's KV-cache in the pool: the first `length` positions of a region, until evicted.

    Attributes:
        owner: Only its requests may start from it.
    """

    def __init__(self, pool: KvPool, region: Region, length: int, context: Context, owner: Owner) -> None:
        self.length = length
        self.owner = owner
        self._pool = pool
        self.region: Region | None = region
        self.context = weakref.ref(context)

    @property
    def available(self) -> bool:
        """False once the region was evicted."""
        return self.region is not None

    @property
    def on_device(self) -> bool:
        """Always: pool memory counts against the engine's budget."""
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, shared ones included."""
        return self.length * self._pool.bytes_per_position

    def to_host(self, start: int = 0, stop: int | None = None) -> HostKv:
        """Copies of positions ``start:stop``.

        Raises:
            KvMemoryError: The region was evicted meanwhile.
        """
        stop = self.length if stop is None else min(stop, self.length)
        return self._pool.read(self, start, stop)


class KvPool:
    """Preallocated keys and values for all layers, with first-fit regions and LRU eviction.

    Args:
        shapes: One per attention layer.
        positions: Positions to preallocate.
    """

    def __init__(self, shapes: Sequence[LayerShape], positions: int) -> None:
        self.shapes = tuple(shapes)
        self.positions = positions
        self.bytes_per_position = sum(shape.bytes_per_position for shape in shapes)
        # one position past the end takes the writes of padding rows
        self.scratch = positions
        self.keys = [_buffer(s, positions + 1, s.key_dim) for s in shapes]
        self.values = [_buffer(s, positions + 1, s.value_dim) for s in shapes]
        self.lock = threading.RLock()
        self._regions: list[Region] = []
        self._dropped: deque[Region] = deque()
        self._tick = 0

    @property
    def used(self) -> int:
        """Positions in regions, after dropped ones are returned."""
        with self.lock:
            self._collect()
            return sum(region.capacity for region in self._regions)

    def open(self, length: int, capacity: int, parent: PooledKv | None) -> Region | None:
        """A region whose first `length` positions are the parent's, with room for `capacity` in all.

        Grows the parent's own region where nobody has written past `length`, else copies. None while running
        sequences hold the memory.

        Raises:
            KvMemoryError: The pool is smaller than `capacity`.
        """
        if capacity > self.positions:
            raise KvMemoryError(
                f"The request needs {capacity} positions of KV-cache, the whole pool has {self.positions}. "
                "Raise kv_pool_bytes, or lower max_tokens or the prompt's length."
            )
        with self.lock:
            source = parent.region if parent is not None else None
            if source is not None and self._extend(source, length, capacity):
                source.writer = True
                self.touch(source)
                return source
            region = self._allocate(capacity, spare=source)
            if region is not None and source is not None:
                self.copy(source.start, region.start, length)
                region.written, region.chunked = length, min(source.chunked, length)
            elif region is None and parent is not None and not any(r.writer for r in self._regions):
                # no room for both, and nobody whose end would make some: the parent's memory gives way
                kept = self.read(parent, 0, length)
                region = self._allocate(capacity, spare=None)
                if region is not None:
                    self.upload(region, kept, length)
            if region is not None:
                region.writer = True
                self.touch(region)
            return region

    def upload(self, region: Region, kv: HostKv, length: int) -> None:
        """Write the first `length` positions of a host KV-cache into an empty region.

        Raises:
            ConfigurationError: Its layers, heads, dimensions or dtype are not this model's.
        """
        self.check(kv)
        span = slice(region.start, region.start + length)
        for index, (keys, values) in enumerate(kv.layers):
            self.keys[index][:, span].copy_(keys[:, :length])
            self.values[index][:, span].copy_(values[:, :length])
        region.written = length

    def check(self, kv: HostKv) -> None:
        """Refuse a host KV-cache that this pool's model cannot have made."""
        expected = [(s.kv_heads, s.key_dim, s.value_dim, s.dtype) for s in self.shapes]
        found = [(k.shape[0], k.shape[2], v.shape[2], k.dtype) for k, v in kv.layers]
        lengths = {tensor.shape[1] for pair in kv.layers for tensor in pair}
        if expected != found or len(lengths) > 1:
            raise ConfigurationError(
                f"A KV-cache of {len(found)} layers {found[:1]} does not fit this model: "
                f"{len(expected)} layers {expected[:1]}."
            )

    def close(self, region: Region, context: Context | None, owner: Owner) -> PooledKv | None:
        """End a sequence's use of its region: keep what it wrote as `context`'s KV-cache, or give it back.

        Returns:
            The context's KV-cache, None when nothing is kept.
        """
        with self.lock:
            region.writer = False
            if context is None:
                self._wipe(region)
                self._shrink_to_views(region)
                return None
            view = PooledKv(self, region, region.written, context, owner)
            self._shrink(region, region.written)
            self.add_view(region, view)
            return view

    def add_view(self, region: Region, view: PooledKv) -> None:
        """Keep the region while `view` lives."""
        region.views.add(view)
        weakref.finalize(view, self._dropped.append, region).atexit = False

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy `length` positions of all layers within the pool."""
        for buffer in (*self.keys, *self.values):
            buffer[:, target : target + length] = buffer[:, source : source + length]

    def touch(self, region: Region) -> None:
        """Mark as most recently used."""
        self._tick += 1
        region.last_use = self._tick

    def read(self, view: PooledKv, start: int, stop: int) -> HostKv:
        """Copy positions ``start:stop`` of a view to the host."""
        with self.lock:
            region = view.region
            if region is None:
                raise KvMemoryError("This KV-cache was evicted; call engine.replay(context) to rebuild it.")
            span = slice(region.start + start, region.start + stop)
            pairs = zip(self.keys, self.values, strict=True)
            return HostKv(tuple((_host_copy(k[:, span]), _host_copy(v[:, span])) for k, v in pairs))

    def views(self) -> list[PooledKv]:
        """All live views, most recently used first."""
        with self.lock:
            self._collect()
            regions = sorted(self._regions, key=lambda region: -region.last_use)
            return [view for region in regions for view in region.views]

    def clear(self) -> None:
        """Evict everything without offloading; used when the engine closes."""
        with self.lock:
            for region in self._regions:
                _forget_views(region)
            self._regions.clear()
            self.keys, self.values = [], []

    def evict(self, view: PooledKv) -> None:
        """Offload and free the region of one view, unless a sequence is writing to it."""
        with self.lock:
            if view.region is not None and not view.region.writer:
                self._evict(view.region)

    def _extend(self, region: Region, length: int, capacity: int) -> bool:
        """Whether the region can take the new positions in place, its capacity grown if need be."""
        if region.writer or region.written != length:
            return False
        if region.capacity >= capacity:
            return True
        end = region.start + region.capacity
        following = min((r.start for r in self._regions if r.start >= end), default=self.positions)
        if following - region.start < capacity:
            return False
        region.capacity = capacity
        return True

    def _allocate(self, capacity: int, spare: Region | None) -> Region | None:
        """First fit; evicts least recently used regions until there is room. `spare` is copied from, so it stays."""
        self._collect()
        while (start := self._first_fit(capacity)) is None:
            idle = [r for r in self._regions if not r.writer and r is not spare]
            if not idle:
                return None
            self._evict(min(idle, key=lambda region: region.last_use))
        region = Region(start, capacity)
        self._regions.append(region)
        self._regions.sort(key=lambda r: r.start)
        return region

    def _first_fit(self, capacity: int) -> int | None:
        for start, stop in self._gaps():
            aligned = -(-start // START_MULTIPLE) * START_MULTIPLE
            if stop - aligned >= capacity:
                return aligned
        return None

    def _gaps(self) -> Iterator[tuple[int, int]]:
        cursor = 0
        for region in self._regions:
            if region.start > cursor:
                yield cursor, region.start
            cursor = region.start + region.capacity
        if cursor < self.positions:
            yield cursor, self.positions

    def _evict(self, region: Region) -> None:
        longest = max(region.views, key=lambda view: view.length, default=None)
        if longest is not None:
            longest.owner.offload(longest)
        _forget_views(region)
        self._regions.remove(region)

    def _collect(self) -> None:
        """Give back what finalizers dropped; they may run in any thread, so they only leave a note."""
        while self._dropped:
            region = self._dropped.popleft()
            if region in self._regions and not region.writer:
                self._shrink_to_views(region)

    def _wipe(self, region: Region) -> None:
        """Zero what no context shows: a failed sequence may leave NaN, which spoils sums even where it is masked."""
        kept = max((view.length for view in region.views), default=0)
        for buffer in (*self.keys, *self.values):
            buffer[:, region.start + kept : region.start + region.written] = 0

    def _shrink_to_views(self, region: Region) -> None:
        longest = max((view.length for view in region.views), default=0)
        if longest:
            self._shrink(region, longest)
        else:
            self._regions.remove(region)

    def _shrink(self, region: Region, length: int) -> None:
        region.capacity = region.written = length
        region.chunked = min(region.chunked, length)


def _buffer(shape: LayerShape, positions: int, dim: int) -> torch.Tensor:
    """Zeros, since masked positions still enter sums with weight 0; on a CPU, memory is only taken when written."""
    size = (shape.kv_heads, positions, dim)
    if shape.device.type != "cpu":
        return torch.zeros(size, dtype=shape.dtype, device=shape.device)
    needed = math.prod(size) * shape.dtype.itemsize
    lazy = np.zeros(needed + _ALIGNMENT, dtype=np.uint8)
    first = -lazy.ctypes.data % _ALIGNMENT
    return torch.from_numpy(lazy[first : first + needed]).view(shape.dtype).view(size)


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu() if tensor.device.type != "cpu" else tensor.clone(memory_format=torch.contiguous_format)


def _forget_views(region: Region) -> None:
    for view in list(region.views):
        view.region = None
    region.views.clear()
