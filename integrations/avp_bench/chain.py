"""What a chain of agents computes: each hands its context on, or its text.

Every agent has a system prompt of its own and works on the same question. In the latent chain an agent thinks on the
context of the one before it, and only the last one decodes. In the text chain each one reads the question and the texts
of all before it, as agents that share their messages do, and decodes its own. What is counted are *positions computed*:
those that went through the model, prefilled or stepped; positions whose keys and values were there are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from avp_agents.context import Context
from avp_agents.engine.protocol import Engine
from avp_agents.errors import ConfigurationError
from avp_agents.prompt.chat_messages import Message
from avp_agents.usage import Usage

QUESTION = "A town of 9000 people wants to replace its diesel buses within five years. What should it do first?"
ROLES = (
    "You are a planner. Break the question into parts.",
    "You are an economist. Weigh the costs of each part.",
    "You are an engineer. Name the technical limits.",
    "You are a lawyer. Name the rules that apply.",
    "You are an ecologist. Judge the effects on nature.",
    "You are a citizen. Say what people will object to.",
    "You are a critic. Find the weakest argument so far.",
    "You are an editor. Give the final advice.",
)


@dataclass(frozen=True)
class ChainCost:
    """What a chain of `agents` agents cost.

    Attributes:
        agents: How many.
        latent, text: Positions computed by the latent and by the text chain.
        latent_decoded, text_decoded: Tokens decoded among them.
    """

    agents: int
    latent: int
    text: int
    latent_decoded: int
    text_decoded: int


def run(engine: Engine, longest: int, *, steps: int, tokens: int, report: Callable[[str], None]) -> list[ChainCost]:
    """Both chains for 2 to `longest` agents.

    A chain's agents do the same as the first ones of a longer chain, but for the last one of a latent chain, which
    answers. So every agent runs once, and answers once on the context before it.

    Args:
        engine: Runs all agents.
        longest: Agents of the longest chain.
        steps: Latent steps of each agent.
        tokens: Tokens of each text; answers are exactly so long, so that the chains compare.
        report: Told what is run.

    Raises:
        ConfigurationError: The chain has fewer than 2 or more agents than there are roles.
    """
    if not 2 <= longest <= len(ROLES):
        raise ConfigurationError(f"A chain has 2 to {len(ROLES)} agents, not {longest}.")
    latent = latent_chains(engine, longest, steps=steps, tokens=tokens, report=report)
    text = text_chain(engine, longest, tokens=tokens, report=report)
    return [
        ChainCost(
            agents=agents,
            latent=sum(map(computed, latent[agents - 1])),
            text=sum(map(computed, text[:agents])),
            latent_decoded=sum(usage.completion_tokens for usage in latent[agents - 1]),
            text_decoded=sum(usage.completion_tokens for usage in text[:agents]),
        )
        for agents in range(2, longest + 1)
    ]


def latent_chains(
    engine: Engine, longest: int, *, steps: int, tokens: int, report: Callable[[str], None]
) -> list[list[Usage]]:
    """What each agent cost in chains of 1 to `longest`: all but the last one think, and the last one answers."""
    chains: list[list[Usage]] = []
    thoughts: list[Usage] = []
    context: Context | None = None
    for number, role in enumerate(ROLES[:longest], start=1):
        report(f"Contexts handed on: agent {number} of {longest}")
        prompt = _prompt(role, first=context is None)
        answer = engine.generate(prompt, context=context, max_tokens=tokens, min_tokens=tokens)
        chains.append([*thoughts, answer.usage])
        del answer  # its KV-cache would serve the thought that follows
        context = engine.think(prompt, steps=steps, context=context)
        thoughts.append(context.usage or Usage())
    return chains


def text_chain(engine: Engine, longest: int, *, tokens: int, report: Callable[[str], None]) -> list[Usage]:
    """What each agent cost: all read what was written before them, and write."""
    usages: list[Usage] = []
    written: list[Message] = []
    for number, role in enumerate(ROLES[:longest], start=1):
        report(f"Text handed on: agent {number} of {longest}")
        prompt = [*_prompt(role, first=True), *written]
        answer = engine.generate(prompt, max_tokens=tokens, min_tokens=tokens)
        usages.append(answer.usage)
        written.append({"role": "user", "content": answer.text})
    return usages


def computed(usage: Usage) -> int:
    """Positions that a request sent through the model."""
    return usage.prompt_tokens - usage.positions_reused + usage.latent_steps + usage.completion_tokens


def save_plot(costs: Sequence[ChainCost], file: Path) -> None:
    """Draw both curves over the number of agents; the file's ending chooses the format.

    Raises:
        ConfigurationError: matplotlib is not installed, or does not know the format.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigurationError("Plots need matplotlib: pip install matplotlib.") from error
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    agents = [cost.agents for cost in costs]
    axes.plot(agents, [cost.text for cost in costs], marker="o", color="tab:orange", label="text handed over")
    axes.plot(agents, [cost.latent for cost in costs], marker="o", color="tab:blue", label="contexts handed over")
    axes.set_xlabel("agents in the chain")
    axes.set_ylabel("positions computed")
    axes.set_xticks(agents)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    try:
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    except ValueError as error:
        raise ConfigurationError(f"Cannot draw {file.name}: {error}. Try a .svg or .png file.") from error


def _prompt(role: str, *, first: bool) -> list[Message]:
    """An agent's own messages; the question is in the context of all but the first."""
    system: Message = {"role": "system", "content": role}
    return [system, {"role": "user", "content": QUESTION}] if first else [system]
