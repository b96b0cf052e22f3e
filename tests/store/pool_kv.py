"""A KV-cache as an engine has it: in memory that is not the store's, read on demand, evicted at any time."""

from __future__ import annotations

from avp_agents.context import Context
from avp_agents.errors import KvMemoryError
from avp_agents.kv_cache import HostKv, KvCache


class PoolKv(KvCache):
    """Shows a host cache as if it lay in a pool; notes which positions were read."""

    def __init__(self, host: HostKv) -> None:
        self.length = host.length
        self.reads: list[tuple[int, int]] = []
        self.evicted = self.evict_at_read = False
        self._host = host

    @property
    def available(self) -> bool:
        return not self.evicted

    @property
    def nbytes(self) -> int:
        return self._host.nbytes

    @property
    def on_device(self) -> bool:
        return True

    def to_host(self, start: int = 0, stop: int | None = None) -> HostKv:
        if self.evicted or self.evict_at_read:
            self.evicted = True
            raise KvMemoryError("evicted")
        self.reads.append((start, self.length if stop is None else stop))
        return self._host.to_host(start, stop)


def in_pool(context: Context) -> PoolKv:
    """Move a context's KV-cache into a pool."""
    assert context.kv is not None
    kv = PoolKv(context.kv.to_host())
    context.attach(kv=kv)
    return kv
