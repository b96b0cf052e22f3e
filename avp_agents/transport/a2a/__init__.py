"""Contexts between agents over the Agent2Agent protocol. Needs ``avp-agents[a2a]``. See docs/mcp-a2a.md.

    announce         adds the extension to an agent's card: which model it runs, and what it takes
    introduce        says the same in a message, for the other side's answer
    offer            the parts of a message that hand a context over, text beside it
    receive          a message's text, and the context that it hands over
    UrlPolicy        which URLs a receiver fetches payloads from

Any `AgentExecutor` and any client of a2a-sdk can use these; nothing here serves or sends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avp_agents.lazy import lazy_names
from avp_agents.transport.a2a.names import EXTENSION_URI

if TYPE_CHECKING:
    from avp_agents.transport.a2a.announcement import Announcement, announce, announcement_of, introduce
    from avp_agents.transport.a2a.fetching import UrlPolicy
    from avp_agents.transport.a2a.offering import offer
    from avp_agents.transport.a2a.receiving import Received, receive

__all__ = [
    "EXTENSION_URI", "Announcement", "Received", "UrlPolicy", "announce", "announcement_of", "introduce", "offer",
    "receive",
]  # fmt: skip

_MODULES = {
    "Announcement": ".announcement",
    "announce": ".announcement",
    "announcement_of": ".announcement",
    "introduce": ".announcement",
    "UrlPolicy": ".fetching",
    "offer": ".offering",
    "Received": ".receiving",
    "receive": ".receiving",
}

__getattr__, __dir__ = lazy_names(
    __name__,
    _MODULES,
    needs="a2a.types",
    without='A2A needs version 1 of the package a2a-sdk. Install it with: pip install "avp-agents[a2a]"',
)
