"""What an engine gives back, as CrewAI counts and shows it.

The usage of a call (in ``LLMCallCompletedEvent.usage``; CrewAI adds its counts up to ``CrewOutput.token_usage``):

    prompt_tokens         positions that the answer was conditioned on, those of contexts included
    cached_prompt_tokens  those of them whose keys and values were there already
    reasoning_tokens      latent steps
    completion_tokens     decoded tokens and latent steps; as everywhere, the completion includes the reasoning
    avp                   the turn's metadata (`avp_agents.agent.exchange`), and beside it

    as_text               what was read as text instead of a context, and why
    handle                the id of the context that it left, inside of a crew or a `handover`
"""

from __future__ import annotations

from typing import Any

from avp_agents.agent.exchange import describe
from avp_agents.errors import ConfigurationError
from avp_crewai.exchange import Outcome

THOUGHT_LINE = "{agent} thought for {steps} latent steps ({positions} positions)."
"""The readable line of an agent that only thought."""


def usage_of(outcome: Outcome) -> dict[str, Any]:
    """The counts of one call."""
    usage, basis = outcome.made.usage, outcome.basis
    completion = usage.completion_tokens + usage.latent_steps
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": usage.prompt_tokens + completion,
        "cached_prompt_tokens": max(0, usage.positions_reused - outcome.positions_joined),
        "reasoning_tokens": usage.latent_steps,
        "avp": describe(outcome.made, basis.prepared) | {"as_text": list(basis.fallbacks), "handle": None},
    }


def thought_line(template: str, outcome: Outcome, agent: str) -> str:
    """What people (and CrewAI) read of an agent that thought.

    Raises:
        ConfigurationError: The template has fields of other names, or leaves nothing to read.
    """
    try:
        line = outcome.made.thought_line(template, agent)
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigurationError(
            f"latent_line {template!r} cannot be filled in ({error}); it knows {{agent}}, {{steps}} and {{positions}}."
        ) from error
    if not line.strip():
        raise ConfigurationError("latent_line is empty, but CrewAI refuses an empty answer; write a few words.")
    return line
