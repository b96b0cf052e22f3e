"""avp-agents for CrewAI: crews whose agents hand over contexts instead of text.

>>> from avp_crewai import AvpLLM
>>> researcher = Agent(role="Researcher", ..., llm=AvpLLM(mode="latent", latent_steps=20))
>>> solver = Agent(role="Solver", ..., llm=AvpLLM())

Importing this package loads neither torch nor weights.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from avp_agents.lazy import lazy_names

if find_spec("crewai") is None:
    raise ModuleNotFoundError(
        'avp_crewai needs CrewAI. Install it with: pip install "avp-agents[crewai]"', name="crewai"
    )

if TYPE_CHECKING:
    from avp_agents.engine.registry import close_engines, shared_engine
    from avp_crewai.exchange import AvpContextOverflowError
    from avp_crewai.llm import AvpLLM
    from avp_crewai.registration import register_crewai_llm
    from avp_crewai.runs import Handover, handover

_HOME = {
    "AvpContextOverflowError": "avp_crewai.exchange",
    "AvpLLM": "avp_crewai.llm",
    "Handover": "avp_crewai.runs",
    "close_engines": "avp_agents.engine.registry",
    "handover": "avp_crewai.runs",
    "register_crewai_llm": "avp_crewai.registration",
    "shared_engine": "avp_agents.engine.registry",
}

__all__ = [
    "AvpContextOverflowError", "AvpLLM", "Handover", "close_engines", "handover", "register_crewai_llm",
    "shared_engine",
]  # fmt: skip

__getattr__, __dir__ = lazy_names(__name__, _HOME)
