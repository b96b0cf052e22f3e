"""avp-agents for LangChain and LangGraph: agents that hand over contexts instead of text.

>>> from avp_langgraph import AvpChatModel
>>> researcher = AvpChatModel(mode="latent", latent_steps=20)
>>> solver = AvpChatModel()

Importing this package loads neither torch nor weights.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from avp_agents.lazy import lazy_names

if find_spec("langchain_core") is None:
    raise ModuleNotFoundError(
        'avp_langgraph needs LangChain and LangGraph. Install them with: pip install "avp-agents[langgraph]"',
        name="langchain_core",
    )

if TYPE_CHECKING:
    from avp_agents.engine.registry import close_engines, shared_engine
    from avp_langgraph.chat_model import AvpChatModel
    from avp_langgraph.errors import AvpContextOverflowError
    from avp_langgraph.join import JoinNode
    from avp_langgraph.lifetimes import ContextLifetimes
    from avp_langgraph.middleware import AvpMiddleware
    from avp_langgraph.nodes import GenerateNode, ThinkNode
    from avp_langgraph.state import ContextState, merge_contexts

_HOME = {
    "AvpChatModel": ".chat_model",
    "AvpContextOverflowError": ".errors",
    "AvpMiddleware": ".middleware",
    "ContextLifetimes": ".lifetimes",
    "ContextState": ".state",
    "GenerateNode": ".nodes",
    "JoinNode": ".join",
    "ThinkNode": ".nodes",
    "close_engines": "avp_agents.engine.registry",
    "merge_contexts": ".state",
    "shared_engine": "avp_agents.engine.registry",
}

__all__ = [
    "AvpChatModel", "AvpContextOverflowError", "AvpMiddleware", "ContextLifetimes", "ContextState", "GenerateNode",
    "JoinNode", "ThinkNode", "close_engines", "merge_contexts", "shared_engine",
]  # fmt: skip

__getattr__, __dir__ = lazy_names(__name__, _HOME)
