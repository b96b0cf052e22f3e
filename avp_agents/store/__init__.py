"""Where contexts live between the agents that share them: in memory, on disk, or in tiers of both.

>>> from avp_agents.store import default_store
>>> store = default_store()
>>> handle = store.put(context, scope="thread-1")
>>> context = store.get(handle, scope="thread-1")
"""

from avp_agents.store.base import ContextStore, PruneReport, StoreStats
from avp_agents.store.disk import DiskStore
from avp_agents.store.memory import MemoryStore
from avp_agents.store.namespace import Namespace
from avp_agents.store.tiered import TieredStore, default_store

__all__ = [
    "ContextStore",
    "DiskStore",
    "MemoryStore",
    "Namespace",
    "PruneReport",
    "StoreStats",
    "TieredStore",
    "default_store",
]
