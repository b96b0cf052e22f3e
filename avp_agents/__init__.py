"""avp-agents: LLM agents hand over their computation instead of text.

>>> from avp_agents import LatentEngine
>>> engine = LatentEngine.from_pretrained()
>>> context = engine.think("Analyze: 24 * 17 + 3", steps=20)
>>> engine.generate("Solve step by step: 24 * 17 + 3", context=context).text
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avp_agents.lazy import lazy_names

if TYPE_CHECKING:
    from avp_agents.answer.generation import Chunk, Generation
    from avp_agents.context import Context, LatentSegment, Readout, TokenSegment
    from avp_agents.engine.latent_engine import LatentEngine
    from avp_agents.engine.protocol import Engine
    from avp_agents.errors import AvpError
    from avp_agents.handle import ContextHandle, ContextHandleState
    from avp_agents.store import ContextStore, DiskStore, MemoryStore, Namespace, TieredStore
    from avp_agents.usage import Handoff, Usage

_HOME = {
    "AvpError": ".errors",
    "Chunk": ".answer.generation",
    "Context": ".context",
    "ContextHandle": ".handle",
    "ContextHandleState": ".handle",
    "ContextStore": ".store",
    "DiskStore": ".store",
    "Engine": ".engine.protocol",
    "Generation": ".answer.generation",
    "Handoff": ".usage",
    "LatentEngine": ".engine.latent_engine",
    "LatentSegment": ".context",
    "MemoryStore": ".store",
    "Namespace": ".store",
    "Readout": ".context",
    "TieredStore": ".store",
    "TokenSegment": ".context",
    "Usage": ".usage",
}

__version__ = "0.1.0"
__all__ = [
    "AvpError", "Chunk", "Context", "ContextHandle", "ContextHandleState", "ContextStore", "DiskStore", "Engine",
    "Generation", "Handoff", "LatentEngine", "LatentSegment", "MemoryStore", "Namespace", "Readout", "TieredStore",
    "TokenSegment", "Usage",
]  # fmt: skip

__getattr__, __dir__ = lazy_names(__name__, _HOME)
