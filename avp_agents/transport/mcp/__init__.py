"""Contexts and latent thinking over the Model Context Protocol. Needs ``avp-agents[mcp]``. See docs/mcp-a2a.md.

    mount            what `avp-agents serve --mcp` adds to a server: tools and resources at ``/mcp``
    McpContexts      the client: a context offered over MCP becomes one of an engine here

The server announces the extension `EXTENSION`. To a client that knows nothing of it, contexts are text resources, and
`think` and `generate` are ordinary tools.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avp_agents.lazy import lazy_names
from avp_agents.transport.mcp.names import EXTENSION

if TYPE_CHECKING:
    from avp_agents.transport.mcp.client import McpContexts
    from avp_agents.transport.mcp.endpoint import mount

__all__ = ["EXTENSION", "McpContexts", "mount"]

_MODULES = {"McpContexts": ".client", "mount": ".endpoint"}

__getattr__, __dir__ = lazy_names(
    __name__,
    _MODULES,
    needs="mcp_types",
    without='MCP needs version 2 of the package mcp. Install it with: pip install "avp-agents[mcp]"',
)
