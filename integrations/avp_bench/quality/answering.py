"""How a team answers a question, arm by arm, and what it takes."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from avp_agents.answer.options import GenerateOptions
from avp_agents.context import Context
from avp_agents.crossing.thought import TELL
from avp_agents.engine.latent_engine import LatentEngine
from avp_agents.engine.protocol import JoinStrategy
from avp_agents.errors import ConfigurationError
from avp_agents.prompt.chat_messages import Prompt
from avp_agents.protocol import decode_context, encode_context, open_frame
from avp_agents.store import MemoryStore
from avp_agents.usage import Handoff, Usage
from avp_bench.quality.arms import Arm
from avp_bench.quality.tasks import Item, Task
from avp_bench.quality.teams import TEAMS, Team
from avp_bench.quality.thoughts import Once

KEPT_THOUGHTS = 64


@dataclass(frozen=True)
class Stage:
    """What one agent cost, or one handoff.

    Attributes:
        role: Who.
        usage: What it took.
        given: Positions of the context that it went on from.
    """

    role: str
    usage: Usage
    given: int = 0

    @property
    def read(self) -> int:
        """Positions that it had to read beside what was handed to it.

        Whatever of them happened to be in memory already counts too, so that the figure is the same in every run.
        """
        return self.usage.prompt_tokens - self.given


@dataclass(frozen=True)
class TeamAnswer:
    """A team's answer.

    Attributes:
        text: What the solver wrote.
        finish_reason: Why it ended.
        stages: Every agent's usage, in order; the solver's is the last.
        handoff: How the researchers' work reached the solver; its bytes are those of text, or what had to move.
    """

    text: str
    finish_reason: str
    stages: tuple[Stage, ...]
    handoff: Handoff


@dataclass(frozen=True)
class _Thought:
    """What researchers hand over: one context, none where they were asked for words and had none.

    Those of parallel researchers are joined, or projected one by one.
    """

    contexts: tuple[Context, ...]
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Bench:
    """What all arms of a run share.

    Attributes:
        engine: The solver's, and the researchers' unless an arm is cross-model.
        task: The task.
        temperature: Of everything that is decoded.
        source: The researchers' engine in cross-model arms.
    """

    engine: LatentEngine
    task: Task
    temperature: float = 0.0
    source: LatentEngine | None = None
    _thoughts: Once[_Thought] = field(default_factory=lambda: Once(KEPT_THOUGHTS), repr=False)

    def answer(self, arm: Arm, item: Item, other: Item, seed: int) -> TeamAnswer:
        """Have the arm answer a question.

        Args:
            arm: The arm.
            item: The question.
            other: Another problem, for the shuffled control.
            seed: Of this question; the same in all arms.

        Raises:
            ConfigurationError: A cross-model arm has no source.
        """
        if arm.mode == "direct":
            return self._solved(self._asked(item), None, (), seed)
        if arm.mode in ("text", "text-capped", "text-cross-model"):
            return self._on_notes(arm, item, seed)
        if arm.mode == "projection":
            return self._on_projection(arm, item, seed)
        return self._on_context(arm, item, other if arm.mode == "shuffled" else item, seed)

    def _on_context(self, arm: Arm, item: Item, about: Item, seed: int) -> TeamAnswer:
        thought = self._thought(self.engine, arm, about, seed)
        context = thought.contexts[0] if thought.contexts else None
        prompt: Prompt = [] if arm.turn == "same" else self._asked(item)
        if arm.kv == "exact" or context is None:
            return self._solved(prompt, context, thought.stages, seed)
        received, size = self._through_int8_frame(context)
        made = self._solved(prompt, received, thought.stages, seed, self._receiver)
        return replace(made, handoff=replace(made.handoff, bytes=size))

    def _on_projection(self, arm: Arm, item: Item, seed: int) -> TeamAnswer:
        source = self._other_model(arm)
        made = self._thought(source, arm, item, seed)
        thought = source.crossing.express(made.contexts, reread=arm.projected != "vector")
        if arm.projected == "text":
            thought = replace(thought, distributions=())
            question = {"role": "user", "content": self._asked(item)}
            read_again = [message.to_chat() for message in thought.messages]
            handoff = Handoff(mode="reread", reason="without a vector", bytes=len(thought.encode()))
            return self._solved([*read_again, question], None, made.stages, seed, handoff=handoff)
        context = self.engine.crossing.project(thought)
        handoff = Handoff(mode="projection", reason=arm.projected, bytes=len(thought.encode()))
        answer = self._solved(self._asked(item), context, made.stages, seed, handoff=handoff)
        *others, solver = answer.stages
        # a projected context has no KV-cache yet: the solver reads all of it
        return replace(answer, stages=(*others, replace(solver, given=0)))

    def _on_notes(self, arm: Arm, item: Item, seed: int) -> TeamAnswer:
        engine = self._other_model(arm) if arm.mode == "text-cross-model" else self.engine
        most = max(1, arm.steps) if arm.mode == "text-capped" else self.task.note_tokens
        team = TEAMS[arm.team]
        notes: list[str] = []
        stages: list[Stage] = []
        for number, brief in enumerate(team.briefs, 1):
            seen = "" if team.parallel else _notes(notes)
            written = engine.generate(f"{brief}\n\n{item.question}{seen}", **self._sampling(most, seed))
            notes.append(written.text)
            stages.append(Stage(f"researcher {number}", written.usage))
        handed = _notes(notes)
        handoff = Handoff(mode="text", reason="notes", bytes=len(handed.encode()))
        return self._solved(self._asked(item, handed), None, tuple(stages), seed, handoff=handoff)

    def _thought(self, engine: LatentEngine, arm: Arm, item: Item, seed: int) -> _Thought:
        made_by = (item.id, engine.fingerprint, arm.team, arm.turn, *arm.think_options.items())
        thought = self._thoughts.get(made_by, lambda: self._think(engine, arm, item))
        if arm.mode == "projection" or not TEAMS[arm.team].parallel:
            return thought
        # words are sampled; other joins are the same for every seed, and for the problem before in the shuffled arm
        joined_by = (*made_by, arm.strategy, seed if arm.strategy == "text" else None)
        return self._thoughts.get(joined_by, lambda: self._joined(engine, thought, arm.strategy, seed))

    def _think(self, engine: LatentEngine, arm: Arm, item: Item) -> _Thought:
        team = TEAMS[arm.team]
        contexts: list[Context] = []
        stages: list[Stage] = []
        for number, prompt in enumerate(self._research_prompts(team, arm, item), 1):
            before = contexts[-1] if contexts and not team.parallel else None
            contexts.append(engine.think(prompt, context=before, **arm.think_options))
            stages.append(_stage(f"researcher {number}", contexts[-1], before))
        return _Thought(tuple(contexts) if team.parallel else (contexts[-1],), tuple(stages))

    def _joined(self, engine: LatentEngine, thought: _Thought, strategy: JoinStrategy, seed: int) -> _Thought:
        contexts, stages = thought.contexts, list(thought.stages)
        if strategy == "text":
            # latent steps have no text until somebody asks for it
            sampling = self._sampling(self.task.note_tokens, seed)
            told = [engine.generate(TELL, context=context, **sampling) for context in contexts]
            stages += [
                Stage(f"researcher {number} in words", answer.usage, len(context))
                for number, (answer, context) in enumerate(zip(told, contexts, strict=True), 1)
            ]
            contexts = tuple(answer.context for answer in told)
            if not any(answer.text.strip() for answer in told):
                return _Thought((), tuple(stages))
        joined = engine.join(contexts, strategy=strategy)
        return _Thought((joined,), (*stages, _stage("join", joined, None)))

    def _research_prompts(self, team: Team, arm: Arm, item: Item) -> list[str]:
        """Researchers that go on from others have read the question already."""
        prompts = [
            brief if number and not team.parallel else f"{brief}\n\n{item.question}"
            for number, brief in enumerate(team.briefs)
        ]
        if arm.turn == "same":
            prompts[-1] += f"\n\n{self.task.form}"
        return prompts

    def _asked(self, item: Item, notes: str = "") -> str:
        return f"{item.question}{notes}\n\n{self.task.form}"

    def _solved(
        self,
        prompt: Prompt,
        context: Context | None,
        stages: tuple[Stage, ...],
        seed: int,
        engine: LatentEngine | None = None,
        handoff: Handoff | None = None,
    ) -> TeamAnswer:
        options = self._sampling(self.task.max_tokens, seed)
        made = (engine or self.engine).generate(prompt, context=context, **options)
        solver = Stage("solver", made.usage, len(context) if context is not None else 0)
        return TeamAnswer(made.text, made.finish_reason, (*stages, solver), handoff or made.handoff)

    def _sampling(self, max_tokens: int, seed: int) -> GenerateOptions:
        return {"max_tokens": max_tokens, "temperature": self.temperature, "seed": seed}

    def _other_model(self, arm: Arm) -> LatentEngine:
        if self.source is None:
            raise ConfigurationError(f"The arm {arm.name} needs a second model: pass --source.")
        return self.source

    def _through_int8_frame(self, context: Context) -> tuple[Context, int]:
        """A context as it arrives in a frame with keys and values rounded to int8, and the frame's size in bytes."""
        if context.kv is None:
            context = self.engine.replay(context)
        key = secrets.token_bytes(32)
        frame = encode_context(context, key=key, int8=True)
        return decode_context(open_frame(frame.assemble(), key=key)), frame.nbytes

    @cached_property
    def _receiver(self) -> LatentEngine:
        """The solver's engine as another process would have it: without the KV-caches that are in memory here."""
        return self.engine.for_store(MemoryStore())


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return "\n\n" + "\n\n".join(f"Notes of colleague {n}:\n{text}" for n, text in enumerate(notes, 1))


def _stage(role: str, context: Context, before: Context | None) -> Stage:
    return Stage(role, context.usage or Usage(), len(before) if before is not None else 0)
