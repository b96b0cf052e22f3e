"""An engine on another host, used like one in this process.

connection        HTTP: one client for threads, one for each event loop
remote_context    contexts that stay on the server; their values are fetched when somebody looks
remote_store      the server's store
remote_engine     RemoteEngine
crossing          from a server's engine to one in this process, by handshake
"""

from avp_agents.transport.client.crossing import hand_over
from avp_agents.transport.client.remote_engine import RemoteEngine

__all__ = ["RemoteEngine", "hand_over"]
