"""The engines that chat models share: `avp_agents.engine.registry`, under the names this package exports."""

from avp_agents.engine.registry import close_engines, shared_engine

__all__ = ["close_engines", "shared_engine"]
