"""Arms: how a team of agents answers a question, with latent contexts, with text, and with the controls beside them.

    direct             the solver alone
    latent             researchers think, the solver answers on their context
    text               researchers write notes, the solver reads them
    prefill            as latent, without a single latent step (control: is it the steps?)
    shuffled           as latent, on the thought about another problem (control: does the context carry anything?)
    text-capped        as text, with as many tokens per researcher as latent steps (control: the same compute)
    projection         another model thinks, its thought is projected into the solver's model
    text-cross-model   another model writes the notes

Every solver is asked the same question for the same form of answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

from avp_agents.context import Context, LatentMethod
from avp_agents.engine.base import GenerateOptions, JoinStrategy
from avp_agents.engine.latent_engine import LatentEngine
from avp_agents.errors import ConfigurationError
from avp_agents.evals.quality.tasks import Item, Task
from avp_agents.usage import Handoff, Usage

Mode = Literal[
    "direct", "latent", "text", "prefill", "shuffled", "text-capped", "projection", "text-cross-model"
]  # fmt: skip
MODES: tuple[str, ...] = (
    "direct", "latent", "text", "prefill", "shuffled", "text-capped", "projection", "text-cross-model",
)  # fmt: skip
CROSS_MODEL = ("projection", "text-cross-model")
Project = Callable[[Context], Context]
"""Makes a context of the solver's model of a context of the source's."""


@dataclass(frozen=True)
class Team:
    """Who works before the solver.

    Attributes:
        name: As on the command line.
        briefs: What each of them is told, before the question.
        parallel: They work side by side and are joined, instead of one after another.
    """

    name: str
    briefs: tuple[str, ...]
    parallel: bool


TEAMS = {
    team.name: team
    for team in (
        Team("pair", ("Work out how to solve the task below. A colleague writes the answer.",), False),
        Team(
            "chain",
            (
                "Plan how to solve the task below. Colleagues go on from your plan.",
                "Look for mistakes and gaps in the plan so far.",
                "Put together the best way to solve the task. A colleague writes the answer.",
            ),
            False,
        ),
        Team(
            "fan-in",
            (
                "Collect what the task below gives and asks. A colleague writes the answer.",
                "Find the method that solves the task below. A colleague writes the answer.",
                "Name the mistakes that are easily made in the task below. A colleague writes the answer.",
            ),
            True,
        ),
    )
}


@dataclass(frozen=True)
class Arm:
    """One way to answer.

    Attributes:
        name: Names it in results; its options in brackets where they are not the run's.
        mode: See the module's summary.
        steps: Latent steps per researcher.
        think: More options of `LatentEngine.think`: method, k, temperature, renormalise.
        strategy: How the contexts of parallel researchers are joined.
    """

    name: str
    mode: Mode
    steps: int = 20
    think: dict[str, Any] = field(default_factory=dict)
    strategy: JoinStrategy = "replay"


@dataclass(frozen=True)
class Stage:
    """What one agent cost, or one handoff."""

    role: str
    usage: Usage


@dataclass(frozen=True)
class Answer:
    """A team's answer.

    Attributes:
        text: What the solver wrote.
        finish_reason: Why it ended.
        stages: Every agent's usage, in order; the solver's is the last.
        handoff: How the researchers' work reached the solver.
        bytes_handed_over: Bytes of text, or what had to move of contexts.
    """

    text: str
    finish_reason: str
    stages: tuple[Stage, ...]
    handoff: Handoff
    bytes_handed_over: int


@dataclass(frozen=True)
class Bench:
    """What all arms of a run share.

    Attributes:
        engine: The solver's, and the researchers' unless an arm is cross-model.
        task: The task.
        team: Who works before the solver.
        temperature: Of everything that is decoded.
        source: The researchers' engine in cross-model arms.
        project: Takes a context of `source` to one of `engine`.
    """

    engine: LatentEngine
    task: Task
    team: Team
    temperature: float = 0.0
    source: LatentEngine | None = None
    project: Project | None = None

    def answer(self, arm: Arm, item: Item, other: Item, seed: int) -> Answer:
        """Have the arm answer a question.

        Args:
            arm: The arm.
            item: The question.
            other: Another problem, for the shuffled control.
            seed: Of this question; the same in all arms.
        """
        if arm.mode == "direct":
            return self._solved(item, None, (), Handoff(), seed)
        if arm.mode in ("text", "text-capped", "text-cross-model"):
            return self._on_notes(arm, item, seed)
        if arm.mode == "projection":
            return self._on_projection(arm, item, seed)
        about = other if arm.mode == "shuffled" else item
        steps = 0 if arm.mode == "prefill" else arm.steps
        context, stages = self._think(self.engine, arm, about, steps)
        return self._solved(item, context, stages, None, seed)

    def _think(self, engine: LatentEngine, arm: Arm, item: Item, steps: int) -> tuple[Context, tuple[Stage, ...]]:
        options: dict[str, Any] = {"steps": steps, **arm.think}
        contexts: list[Context] = []
        stages: list[Stage] = []
        for number, brief in enumerate(self.team.briefs, 1):
            before = contexts[-1] if contexts and not self.team.parallel else None
            prompt = brief if before is not None else f"{brief}\n\n{item.question}"
            contexts.append(engine.think(prompt, context=before, **options))
            stages.append(Stage(f"researcher {number}", _usage(contexts[-1])))
        if not self.team.parallel:
            return contexts[-1], tuple(stages)
        joined = engine.join(contexts, strategy=arm.strategy)
        return joined, (*stages, Stage("join", _usage(joined)))

    def _on_projection(self, arm: Arm, item: Item, seed: int) -> Answer:
        if self.source is None or self.project is None:
            raise ConfigurationError("The arm projection needs a second model: pass --source.")
        thought, stages = self._think(self.source, arm, item, arm.steps)
        return self._solved(item, self.project(thought), stages, None, seed)

    def _on_notes(self, arm: Arm, item: Item, seed: int) -> Answer:
        engine = self.engine
        if arm.mode == "text-cross-model":
            if self.source is None:
                raise ConfigurationError("The arm text-cross-model needs a second model: pass --source.")
            engine = self.source
        most = max(1, arm.steps) if arm.mode == "text-capped" else self.task.note_tokens
        notes: list[str] = []
        stages: list[Stage] = []
        for number, brief in enumerate(self.team.briefs, 1):
            seen = "" if self.team.parallel else _notes(notes)
            written = engine.generate(f"{brief}\n\n{item.question}{seen}", **self._sampling(most, seed))
            notes.append(written.text)
            stages.append(Stage(f"researcher {number}", written.usage))
        handed = _notes(notes)
        handoff = Handoff(mode="text", reason="notes", bytes=len(handed.encode()))
        return self._solved(item, None, tuple(stages), handoff, seed, handed)

    def _solved(
        self,
        item: Item,
        context: Context | None,
        stages: tuple[Stage, ...],
        handoff: Handoff | None,
        seed: int,
        notes: str = "",
    ) -> Answer:
        prompt = f"{item.question}{notes}\n\n{self.task.form}"
        made = self.engine.generate(prompt, context=context, **self._sampling(self.task.max_tokens, seed))
        how = handoff or made.handoff
        return Answer(made.text, made.finish_reason, (*stages, Stage("solver", made.usage)), how, how.bytes)

    def _sampling(self, max_tokens: int, seed: int) -> GenerateOptions:
        return {"max_tokens": max_tokens, "temperature": self.temperature, "seed": seed}


def arms_named(
    modes: Sequence[str],
    *,
    steps: Sequence[int],
    methods: Sequence[LatentMethod | None],
    strategies: Sequence[JoinStrategy],
    renormalise: Sequence[bool | None],
    latent_temperatures: Sequence[float],
) -> list[Arm]:
    """One arm per mode, and for latent modes one per combination of the options that are given several times.

    Raises:
        ConfigurationError: There is no such mode.
    """
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ConfigurationError(f"Unknown mode {unknown[0]!r}; choose from {', '.join(MODES)}.")
    return [
        _arm(mode, combination)
        for mode in modes
        for combination in _combinations(mode, steps, methods, strategies, renormalise, latent_temperatures)
    ]


@dataclass(frozen=True)
class _Options:
    steps: int
    method: LatentMethod | None
    strategy: JoinStrategy
    renormalise: bool | None
    temperature: float
    varied: tuple[str, ...]


def _combinations(
    mode: str,
    steps: Sequence[int],
    methods: Sequence[LatentMethod | None],
    strategies: Sequence[JoinStrategy],
    renormalise: Sequence[bool | None],
    temperatures: Sequence[float],
) -> list[_Options]:
    several = {
        "steps": len(steps) > 1, "method": len(methods) > 1, "strategy": len(strategies) > 1,
        "renormalise": len(renormalise) > 1, "temperature": len(temperatures) > 1,
    }  # fmt: skip
    if mode not in ("latent", "projection"):
        steps, methods, strategies = steps[:1], methods[:1], strategies[:1]
        renormalise, temperatures, several = renormalise[:1], temperatures[:1], {}
    varied = tuple(name for name, many in several.items() if many)
    return [
        _Options(n, method, strategy, norm, temperature, varied)
        for n in steps
        for method in methods
        for strategy in strategies
        for norm in renormalise
        for temperature in temperatures
    ]


def _arm(mode: str, options: _Options) -> Arm:
    shown = ", ".join(f"{name}={value}" for name, value in asdict(options).items() if name in options.varied)
    think: dict[str, Any] = {"temperature": options.temperature}
    if options.method is not None:
        think["method"] = options.method
    if options.renormalise is not None:
        think["renormalise"] = options.renormalise
    name = f"{mode}[{shown}]" if shown else mode
    return Arm(name, cast(Mode, mode), options.steps, think, options.strategy)


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return "\n\n" + "\n\n".join(f"Notes of colleague {n}:\n{text}" for n, text in enumerate(notes, 1))


def _usage(context: Context) -> Usage:
    return context.usage or Usage()
