"""Names by which both sides know what is spoken over MCP."""

EXTENSION = "avp-agents/contexts"
"""Identifies what is spoken here among a server's capabilities."""

ERROR_KEY = "avp-agents/error"
"""Where an error's class and message stand in the ``_meta`` of a tool's result."""
