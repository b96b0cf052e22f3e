"""vLLM as an engine: in this process, or a server that runs somewhere.

    engine          VllmEngine, which implements `avp_agents.engine.protocol.Engine`
    served_model    what is known of a model without running it: tokenizer, prompts, fingerprint
    lineage_prompt  a lineage as token ids and embeddings
    requests        from a caller's prompt and options to a request
    answer          from vLLM's tokens to text, stops and a context
    in_process      AsyncLLM
    server          a running OpenAI-compatible server, over HTTP

A context reaches vLLM as its lineage: token ids, and the embeddings of latent steps where those stand. vLLM prefills
it, as far as its prefix cache does not hold it already. Needs the extra ``vllm``; a server needs only ``httpx`` here.

>>> from avp_agents.vllm import VllmEngine
>>> engine = VllmEngine.from_pretrained("Qwen/Qwen3-8B")
>>> engine = VllmEngine.from_server("http://127.0.0.1:8000")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avp_agents.lazy import lazy_names

if TYPE_CHECKING:
    from avp_agents.vllm.engine import VllmEngine

__all__ = ["VllmEngine"]

# vLLM loads the plugin beside the engine in processes that need no engine
__getattr__, __dir__ = lazy_names(__name__, {"VllmEngine": ".engine"})
