"""An engine on another host, used like one in this process.

connection        HTTP: one client for threads, one for each event loop
remote_context    contexts that stay on the server; their values are fetched when somebody looks
remote_store      the server's store
remote_engine     RemoteEngine; needs no torch
crossing          from a server's engine to one in this process, by handshake
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avp_agents.lazy import lazy_names

if TYPE_CHECKING:
    from avp_agents.transport.client.crossing import hand_over
    from avp_agents.transport.client.remote_engine import RemoteEngine

__all__ = ["RemoteEngine", "hand_over"]

__getattr__, __dir__ = lazy_names(__name__, {"RemoteEngine": ".remote_engine", "hand_over": ".crossing"})
