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
from avp_agents.engine.base import Engine, Message
from avp_agents.errors import ConfigurationError
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


def run(
    engine: Engine, lengths: Sequence[int], *, steps: int, tokens: int, report: Callable[[str], None]
) -> list[ChainCost]:
    """Run both chains for every number of agents.

    Args:
        engine: Runs all agents.
        lengths: Numbers of agents.
        steps: Latent steps of each agent.
        tokens: Tokens of each text; answers are exactly so long, so that the chains compare.
        report: Told what is run.

    Raises:
        ConfigurationError: A chain has fewer than 1 or more agents than there are roles.
    """
    if wrong := [n for n in lengths if not 1 <= n <= len(ROLES)]:
        raise ConfigurationError(f"A chain has 1 to {len(ROLES)} agents, not {wrong[0]}.")
    costs = []
    for agents in lengths:
        report(f"{agents} agents")
        latent = latent_chain(engine, agents, steps=steps, tokens=tokens)
        text = text_chain(engine, agents, tokens=tokens)
        costs.append(
            ChainCost(
                agents=agents,
                latent=sum(map(computed, latent)),
                text=sum(map(computed, text)),
                latent_decoded=sum(usage.completion_tokens for usage in latent),
                text_decoded=sum(usage.completion_tokens for usage in text),
            )
        )
    return costs


def latent_chain(engine: Engine, agents: int, *, steps: int, tokens: int) -> list[Usage]:
    """What each agent cost: all think on the context before them, and the last one answers on its own."""
    usages: list[Usage] = []
    context: Context | None = None
    for role in ROLES[: agents - 1]:
        context = engine.think(_prompt(role, first=context is None), steps=steps, context=context)
        usages.append(context.usage or Usage())
    prompt = _prompt(ROLES[agents - 1], first=context is None)
    answer = engine.generate(prompt, context=context, max_tokens=tokens, min_tokens=tokens)
    return [*usages, answer.usage]


def text_chain(engine: Engine, agents: int, *, tokens: int) -> list[Usage]:
    """What each agent cost: all read what was written before them, and write."""
    usages: list[Usage] = []
    written: list[Message] = []
    for role in ROLES[:agents]:
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
