"""What an engine gives back, as LangChain's messages: text, usage and response metadata.

``response_metadata["avp"]`` is the turn's metadata (`avp_agents.agent.exchange`), and beside it

    content     a digest of the message's content, so that an edit is noticed
    think       only on messages that stand for latent steps: how those were made
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from langchain_core.messages import AIMessageChunk
from langchain_core.messages.ai import UsageMetadata

from avp_agents.agent.exchange import AnswerReader, Made, describe
from avp_agents.agent.ladder import Prepared
from avp_agents.agent.turns import Scope, content_digest, source_note
from avp_agents.answer.generation import TokenLogprob
from avp_agents.handle import ContextHandle
from avp_agents.usage import Usage
from avp_langgraph.messages import DIGEST_KEY, HANDLE_KEY, METADATA_KEY, THINK_KEY

PROVIDER = "avp"
THOUGHT_LINE = "{agent} thought for {steps} latent steps ({positions} positions)"
"""The line for people that stands for latent steps."""


def last_chunk(
    made: Made,
    prepared: Prepared,
    handle: ContextHandle,
    scope: Scope,
    reader: AnswerReader,
    line: str,
    *,
    model: str,
) -> AIMessageChunk:
    """The chunk that ends a message: of an answer no text, all the rest; of a thought its line for people, too."""
    steps = made.steps if made.said is None else None
    told = describe(made, prepared)
    finish_reason, source = made.finish_reason, ""
    if steps is not None:
        told |= {DIGEST_KEY: content_digest(line), THINK_KEY: asdict(steps.recipe)}
        source = source_note(prepared.prompt, steps.recipe) if prepared.context is None else ""
    else:
        told[DIGEST_KEY] = content_digest(reader.text, reader.calls)
        finish_reason = "tool_calls" if reader.calls and finish_reason == "stop" else finish_reason
    metadata = {
        "model_name": shown_name(model),
        "model_provider": PROVIDER,
        "finish_reason": finish_reason,
        HANDLE_KEY: handle.labelled(agent=scope.agent, text=line, source=source).to_state(),
        METADATA_KEY: told,
    }
    if made.said is not None and made.said.logprobs is not None:
        metadata["logprobs"] = {"content": [_logprob(token) for token in made.said.logprobs]}
    return AIMessageChunk(
        content=line if steps is not None else "",
        usage_metadata=_usage(made.usage, prepared),
        response_metadata=metadata,
        chunk_position="last",
    )


def shown_name(model: str) -> str:
    """A model's name for metadata: of a folder its last part, since paths do not belong into graph state."""
    return os.path.basename(os.path.normpath(model)) if os.path.isabs(model) else model


def _usage(usage: Usage, prepared: Prepared) -> UsageMetadata:
    """LangChain's counts. As everywhere in LangChain, the output includes the reasoning: latent steps, and thoughts."""
    latent_steps = usage.latent_steps + prepared.latent_steps
    output = usage.completion_tokens + latent_steps
    return {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": output,
        "total_tokens": usage.prompt_tokens + output,
        "input_token_details": {"cache_read": usage.positions_reused},
        "output_token_details": {"reasoning": latent_steps + usage.reasoning_tokens},
    }


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.text,
        "token_id": token.token_id,
        "logprob": token.logprob,
        "top_logprobs": [{"token_id": token_id, "logprob": logprob} for token_id, logprob in token.top],
    }
