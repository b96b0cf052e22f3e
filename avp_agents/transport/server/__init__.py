"""The server for one engine: what `avp-agents serve` runs.

    gate                  every request passes it: site, token, rate, concurrency, slow clients, metrics, errors
    access                tokens and their namespaces; Host and Origin
    tenants               one engine, a store for each namespace
    engine_routes         think, generate, replay, count, cancel
    context_routes        contexts: look up, store, pin, drop, delete, down as a frame
    upload_routes         contexts up, in pieces that can be resumed
    chat_routes           the OpenAI-compatible endpoints
    running               granian

`create_app` makes the ASGI application, `serve` runs it.
"""

from avp_agents.transport.server.access import Access, TokenFile, Tokens
from avp_agents.transport.server.app import create_app
from avp_agents.transport.server.limits import ServerLimits
from avp_agents.transport.server.running import Binding, serve

__all__ = ["Access", "Binding", "ServerLimits", "TokenFile", "Tokens", "create_app", "serve"]
