"""An answer, whole and in pieces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from avp_agents.context import Context
from avp_agents.usage import Handoff, Usage

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class TokenLogprob:
    """A decoded token's log-probability (of the model's own distribution, before sampling options)."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        text: The decoded text, without special tokens, cut at a stop string; without what the model reasoned first.
        token_ids: The decoded ids that are in the lineage (an end-of-sequence id included).
        context: The lineage including this answer; hand it on, or generate on it again.
        usage: What it cost.
        handoff: How the given context was used.
        finish_reason: ``"stop"`` or ``"length"``.
        logprobs: One entry per decoded token, where asked for.
        reasoning: What a reasoning model wrote between ``<think>`` and ``</think>`` before the text; else empty.
    """

    text: str
    token_ids: tuple[int, ...]
    context: Context
    usage: Usage
    handoff: Handoff
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    reasoning: str = ""


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer: of its text or of its reasoning. The last one carries the whole `Generation`."""

    text: str
    token_ids: tuple[int, ...] = ()
    generation: Generation | None = None
    logprobs: tuple[TokenLogprob, ...] = field(default=())
    reasoning: str = ""
