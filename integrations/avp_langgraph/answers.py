"""What an engine gives back, as LangChain's messages: text, usage and response metadata.

``response_metadata["avp"]`` says how the answer came about:

    mode, reason, notes                         the rung of the handoff ladder, why, and what else was decided
    bytes, milliseconds                         what the handoff moved and took
    positions_reused, positions_replayed        positions of the context that were there, and that were prefilled again
    latent_steps, tokens_decoded                what this call itself did
    tokens_not_decoded                          latent positions that it was handed: work that nobody decoded to text
    content                                     a digest of the message's content, so that an edit is noticed
    think                                       only on messages that stand for latent steps: how those were made
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from langchain_core.messages import AIMessageChunk
from langchain_core.messages.ai import UsageMetadata

from avp_agents.answer.generation import Generation, TokenLogprob
from avp_agents.context import Context, LatentSegment
from avp_agents.handle import ContextHandle
from avp_agents.usage import Handoff, HandoffMode, Usage
from avp_langgraph.handoffs import Prepared
from avp_langgraph.messages import DIGEST_KEY, HANDLE_KEY, METADATA_KEY, THINK_KEY, content_digest
from avp_langgraph.scope import Scope
from avp_langgraph.sources import source_note
from avp_langgraph.tool_calling import AnswerReader

PROVIDER = "avp"


def thought_line(thought: Context, scope: Scope) -> str:
    """The line for people that stands for latent steps."""
    steps = len(thought.lineage[-1])
    return f"{scope.agent or 'The model'} thought for {steps} latent steps ({len(thought)} positions)"


def answer_line(generation: Generation) -> str:
    """The line for people beside the handle of an answer."""
    return " ".join(generation.text.split())


def thought_chunk(
    thought: Context, handle: ContextHandle, prepared: Prepared, scope: Scope, *, model: str
) -> AIMessageChunk:
    """The only chunk of a message that stands for latent steps."""
    line = thought_line(thought, scope)
    steps = thought.lineage[-1]
    assert isinstance(steps, LatentSegment), "what was thought ends in latent steps"
    usage, handoff = thought.usage or Usage(), thought.handoff or Handoff()
    made = _made(line, handoff, usage, prepared, inherited=thought.latent_steps - len(steps))
    source = source_note(prepared.prompt, steps.recipe) if prepared.context is None else ""
    handle = handle.labelled(agent=scope.agent, text=line, source=source)
    return AIMessageChunk(
        content=line,
        usage_metadata=_usage(usage, prepared),
        response_metadata=_metadata(model, "stop", handle) | {METADATA_KEY: made | {THINK_KEY: asdict(steps.recipe)}},
        chunk_position="last",
    )


def answer_chunk(
    generation: Generation, handle: ContextHandle, prepared: Prepared, scope: Scope, reader: AnswerReader, *, model: str
) -> AIMessageChunk:
    """The chunk that ends an answer: no text, all the rest."""
    handle = handle.labelled(agent=scope.agent, text=answer_line(generation))
    inherited, calls = generation.context.latent_steps, reader.calls
    made = _made(reader.text, generation.handoff, generation.usage, prepared, calls=calls, inherited=inherited)
    called = calls and generation.finish_reason == "stop"
    metadata = _metadata(model, "tool_calls" if called else generation.finish_reason, handle) | {METADATA_KEY: made}
    if generation.logprobs is not None:
        metadata["logprobs"] = {"content": [_logprob(token) for token in generation.logprobs]}
    return AIMessageChunk(
        content="",
        usage_metadata=_usage(generation.usage, prepared),
        response_metadata=metadata,
        chunk_position="last",
    )


def shown_name(model: str) -> str:
    """A model's name for metadata: of a folder its last part, since paths do not belong into graph state."""
    return os.path.basename(os.path.normpath(model)) if os.path.isabs(model) else model


def _metadata(model: str, finish_reason: str, handle: ContextHandle) -> dict[str, Any]:
    return {
        "model_name": shown_name(model),
        "model_provider": PROVIDER,
        "finish_reason": finish_reason,
        HANDLE_KEY: handle.to_state(),
    }


def _made(
    content: str,
    handoff: Handoff,
    usage: Usage,
    prepared: Prepared,
    *,
    inherited: int,
    calls: Sequence[tuple[str, Any]] = (),
) -> dict[str, Any]:
    mode, reason = _rung(handoff, prepared)
    return handoff.to_metadata() | {
        "mode": mode,
        "reason": reason,
        "latent_steps": usage.latent_steps + prepared.latent_steps,
        "tokens_decoded": usage.completion_tokens,
        "tokens_not_decoded": inherited,
        DIGEST_KEY: content_digest(content, calls),
    }


def _rung(handoff: Handoff, prepared: Prepared) -> tuple[HandoffMode, str]:
    """The lowest rung that the call had to take. An answer read as text counts only where no context was used."""
    taken = {fallback.mode: fallback.reason for fallback in prepared.fallbacks}
    for mode in ("lost", "rethink"):
        if mode in taken:
            return mode, taken[mode]
    if handoff.mode == "none" and "text" in taken:
        return "text", taken["text"]
    return handoff.mode, handoff.reason


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
