"""The demo's contract: what the command line asks of a framework's demo, and what it gets back.

``avp-agents demo`` runs the same two agents twice, once handing over a latent context and once handing over text.
The graphs belong to a framework's integration, which registers a `Demo` under the entry point group
``avp_agents.demos``; this package itself imports no framework.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol

from avp_agents.engine.protocol import Engine
from avp_agents.errors import ConfigurationError

ENTRY_POINT_GROUP = "avp_agents.demos"

_WARM_UP_QUESTION = "How many days are there in two weeks?"


@dataclass(frozen=True)
class DemoRequest:
    """What the demo is to do.

    Attributes:
        question: What the agents work on.
        latent_steps: Latent steps of the latent graph's researcher.
        researcher_tokens: Most tokens the text graph's researcher decodes.
        max_tokens: Most tokens either solver decodes.
    """

    question: str
    latent_steps: int
    researcher_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class AgentRun:
    """What one agent did.

    Attributes:
        agent: Its name in the graph.
        seconds: Wall time of its node.
        latent_steps: Latent steps it ran.
        tokens_decoded: Tokens it decoded.
        positions_reused: Positions it was conditioned on whose keys and values were already there.
        bytes_handed_over: Bytes it received: the message in the graph's state, and what moved outside of it.
        mode: How the work of the agent before it reached it: ``"none"`` for the first one, ``"kv"``, ``"text"``, ...
        text: What it wrote.
    """

    agent: str
    seconds: float
    latent_steps: int
    tokens_decoded: int
    positions_reused: int
    bytes_handed_over: int
    mode: str
    text: str


@dataclass(frozen=True)
class GraphRun:
    """What one graph did, agent by agent.

    Attributes:
        agents: The agents in the order they ran; the last one wrote the answer.
        seconds: Wall time of the whole graph.
    """

    agents: tuple[AgentRun, ...]
    seconds: float

    @property
    def answer(self) -> str:
        """What the last agent wrote."""
        return self.agents[-1].text

    @property
    def mode(self) -> str:
        """How the last agent received what came before it."""
        return self.agents[-1].mode

    @property
    def latent_steps(self) -> int:
        """Latent steps that all agents ran."""
        return sum(agent.latent_steps for agent in self.agents)

    @property
    def tokens_decoded(self) -> int:
        """Tokens that all agents decoded."""
        return sum(agent.tokens_decoded for agent in self.agents)

    @property
    def positions_reused(self) -> int:
        """Positions that all agents found already computed."""
        return sum(agent.positions_reused for agent in self.agents)

    @property
    def bytes_handed_over(self) -> int:
        """Bytes that all agents received from one another."""
        return sum(agent.bytes_handed_over for agent in self.agents)

    def to_json(self) -> dict[str, Any]:
        """The graph's figures and its answer."""
        return {
            "seconds": round(self.seconds, 4),
            "tokens_decoded": self.tokens_decoded,
            "positions_reused": self.positions_reused,
            "bytes_handed_over": self.bytes_handed_over,
            "mode": self.mode,
            "answer": self.answer,
        }


@dataclass(frozen=True)
class Comparison:
    """The same agents and question, handing over a latent context and handing over text."""

    latent: GraphRun
    text: GraphRun

    @property
    def ratio(self) -> float:
        """Seconds of the text graph over seconds of the latent graph."""
        return self.text.seconds / self.latent.seconds

    def to_json(self) -> dict[str, Any]:
        """Both graphs' figures and the ratio of their seconds."""
        return {"latent": self.latent.to_json(), "text": self.text.to_json(), "ratio": round(self.ratio, 3)}


def compare(
    run: Callable[[DemoRequest, bool], GraphRun], request: DemoRequest, report: Callable[[str], None], *, graph: str
) -> Comparison:
    """Run a demo both ways, after a short run of each on another question that warms the model.

    Args:
        run: Runs the agents on a request, handing over a latent context or not.
        request: What the demo is to do.
        report: Told what is going on.
        graph: What the framework calls its agents together.
    """
    report("Warming the model up")
    for latent in (True, False):
        run(DemoRequest(_WARM_UP_QUESTION, latent_steps=2, researcher_tokens=4, max_tokens=4), latent)
    report(f"Latent {graph}: the researcher thinks for {request.latent_steps} steps")
    thought = run(request, True)
    report(f"Text {graph}: the researcher writes up to {request.researcher_tokens} tokens")
    return Comparison(thought, run(request, False))


class Demo(Protocol):
    """What an integration registers."""

    def __call__(self, engine: Engine, request: DemoRequest, report: Callable[[str], None]) -> Comparison:
        """Run both graphs, after warming the model, telling `report` what is going on."""
        ...


def find_demo(framework: str) -> Demo:
    """The demo that a framework's integration registered.

    Raises:
        ConfigurationError: It is not registered, or the framework is not installed.
    """
    registered = entry_points(group=ENTRY_POINT_GROUP)
    found = tuple(registered.select(name=framework))
    if not found:
        known = ", ".join(sorted(registered.names)) or "none: install avp-agents with pip, not only its source folder"
        raise ConfigurationError(f"No demo is registered for {framework!r}. Registered: {known}.")
    try:
        return found[0].load()
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"The demo needs {error.name!r}, which is not installed: pip install 'avp-agents[{framework}]'"
        ) from error
