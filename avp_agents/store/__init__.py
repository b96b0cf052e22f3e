"""Where contexts live between the agents that share them: in memory, on disk, on a server, or in tiers.

>>> from avp_agents.store import default_store
>>> store = default_store()
>>> handle = store.put(context, scope="thread-1")
>>> context = store.get(handle, scope="thread-1")
"""

from avp_agents.store.base import ContextStore, PruneReport, StoreStats
from avp_agents.store.encryption import Encryption
from avp_agents.store.files import DiskStore
from avp_agents.store.memory import MemoryStore
from avp_agents.store.mooncake import MooncakeStore
from avp_agents.store.namespace import Namespace
from avp_agents.store.objects import ObjectStore
from avp_agents.store.open import open_store
from avp_agents.store.redis import RedisStore
from avp_agents.store.tiered import TieredStore, default_store

__all__ = [
    "ContextStore",
    "DiskStore",
    "Encryption",
    "MemoryStore",
    "MooncakeStore",
    "Namespace",
    "ObjectStore",
    "PruneReport",
    "RedisStore",
    "StoreStats",
    "TieredStore",
    "default_store",
    "open_store",
]
