"""The embedded default model: find it, fetch it, verify it.

resolve_model(None)          what an engine loads where no model is named
default_model()              the folder of the default model, fetched once per user
default_model_status()       whether it is there, without fetching it
"""

from avp_agents.models.embedded import DefaultModelStatus, default_model, default_model_status, resolve_model

__all__ = ["DefaultModelStatus", "default_model", "default_model_status", "resolve_model"]
