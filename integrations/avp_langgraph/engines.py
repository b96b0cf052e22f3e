"""The engines that chat models share: `avp_agents.engine.shared`, under the names this package exports."""

from avp_agents.engine.shared import close_engines, shared_engine

__all__ = ["close_engines", "shared_engine"]
