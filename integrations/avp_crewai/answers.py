"""What an engine gives back, as CrewAI counts and shows it.

The usage of a call (in ``LLMCallCompletedEvent.usage``; CrewAI adds its counts up to ``CrewOutput.token_usage``):

    prompt_tokens         positions that the answer was conditioned on, those of contexts included
    cached_prompt_tokens  those of them whose keys and values were there already
    reasoning_tokens      latent steps
    completion_tokens     decoded tokens and latent steps; as everywhere, the completion includes the reasoning
    avp                   how the answer came about:

    mode, reason, notes                         the rung of the handoff ladder, why, and what else was decided
    as_text                                     what was read as text instead of a context, and why
    bytes, milliseconds                         what the handoff moved and took
    positions_reused, positions_replayed        positions of the context that were there, and that were prefilled again
    latent_steps, tokens_decoded                what this call itself did
    tokens_not_decoded                          latent positions that it was handed: work that nobody decoded to text
    handle                                      the id of the context that it left, inside of a crew or a `handover`
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from avp_agents.context import LatentSegment
from avp_agents.errors import ConfigurationError
from avp_crewai.exchange import Outcome

THOUGHT_LINE = "{agent} thought for {steps} latent steps ({positions} positions)."
"""The readable line of an agent that only thought."""


def usage_of(outcome: Outcome) -> dict[str, Any]:
    """The counts of one call."""
    usage = outcome.usage
    completion = usage.completion_tokens + usage.latent_steps
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": usage.prompt_tokens + completion,
        "cached_prompt_tokens": max(0, usage.positions_reused - _positions_joined_anew(outcome)),
        "reasoning_tokens": usage.latent_steps,
        "avp": metadata_of(outcome),
    }


def _positions_joined_anew(outcome: Outcome) -> int:
    """Positions that joining contexts computed; the answer found them there, but they are this call's own work."""
    if not outcome.is_joined or outcome.base is None or outcome.base.usage is None:
        return 0
    return outcome.base.usage.prompt_tokens - outcome.base.usage.positions_reused


def metadata_of(outcome: Outcome) -> dict[str, Any]:
    """How an answer came about, as JSON data."""
    handoff = outcome.handoff
    if outcome.is_joined and outcome.base is not None and outcome.base.handoff is not None:
        joined = outcome.base.handoff
        handoff = replace(joined, notes=(*joined.notes, *handoff.notes))
    metadata = handoff.to_metadata() | {
        "as_text": list(outcome.prepared.fallbacks),
        "latent_steps": outcome.usage.latent_steps,
        "tokens_decoded": outcome.usage.completion_tokens,
        "tokens_not_decoded": 0 if outcome.base is None else outcome.base.latent_steps,
        "handle": None,
    }
    if outcome.base is None:
        metadata |= {"mode": outcome.prepared.mode_without_context, "reason": "; ".join(outcome.prepared.fallbacks)}
    return metadata


def thought_line(template: str, outcome: Outcome, agent: str) -> str:
    """What people (and CrewAI) read of an agent that thought.

    Raises:
        ConfigurationError: The template has fields of other names, or leaves nothing to read.
    """
    steps = sum(len(segment) for segment in outcome.context.lineage[-1:] if isinstance(segment, LatentSegment))
    try:
        line = template.format(agent=agent or "The model", steps=steps, positions=len(outcome.context))
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigurationError(
            f"latent_line {template!r} cannot be filled in ({error}); it knows {{agent}}, {{steps}} and {{positions}}."
        ) from error
    if not line.strip():
        raise ConfigurationError("latent_line is empty, but CrewAI refuses an empty answer; write a few words.")
    return line


def people_line(text: str) -> str:
    """The line for people beside a handle."""
    return " ".join(text.split())
