"""Engines over the network: a server for one, and a client that is one.

    avp_agents.transport.server     what `avp-agents serve` runs (needs the extra ``server``)
    avp_agents.transport.client     RemoteEngine, which implements `avp_agents.engine.protocol.Engine`
    avp_agents.transport.wire       the JSON that passes between them; payloads are frames of `avp_agents.protocol`

>>> from avp_agents.transport import RemoteEngine
>>> engine = RemoteEngine("http://127.0.0.1:8300", token="...")
>>> context = engine.think("Analyze: 24 * 17 + 3", steps=20)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avp_agents.lazy import lazy_names

if TYPE_CHECKING:
    from avp_agents.transport.client import RemoteEngine

__all__ = ["RemoteEngine"]

__getattr__, __dir__ = lazy_names(__name__, {"RemoteEngine": ".client"})
