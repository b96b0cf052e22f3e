"""``avp-agents bench throughput``: researcher-solver pipelines per minute on both engines, with contexts and with text.

One arm after the other has the machine to itself:

    latent, LatentEngine    the researcher thinks, the solver goes on
    latent, VllmEngine      the same, both inside vLLM
    text, vLLM              the researcher writes notes, the solver reads them: vLLM as it comes

Notes and answers have fixed lengths, questions begin with a number of their own, so that none reuses another's
positions.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from avp_agents.engine.latent_engine import LatentEngine
from avp_agents.engine.protocol import Engine
from avp_agents.store import MemoryStore
from avp_agents.vllm import VllmEngine

Pipeline = Callable[[Engine, str], Awaitable[None]]

_RESEARCH = "List what has to be computed, and watch out for traps.\n\n"
_TASK = (
    "Order {number}: a bakery sells rolls at 30 cents, loaves at 4 euros and cakes at 18 euros. A school wants 120 "
    "rolls, 14 loaves and 3 cakes on Friday, and half as many of each on Monday. It pays within ten days, and then "
    "takes 5 percent off. What does it pay in all?"
)
_WINDOW = 2048


@dataclass(frozen=True)
class PipelineWork:
    """What each pipeline does.

    Attributes:
        steps: Latent steps of the researcher.
        note_tokens: Tokens of its notes, where it writes.
        answer_tokens: Tokens of the solver's answer.
    """

    steps: int = 20
    note_tokens: int = 128
    answer_tokens: int = 64

    async def latent(self, engine: Engine, question: str) -> None:
        """Hand over a context."""
        thought = await engine.athink(_RESEARCH + question, steps=self.steps)
        count = self.answer_tokens
        await engine.agenerate(question, context=thought, max_tokens=count, min_tokens=count)

    async def text(self, engine: Engine, question: str) -> None:
        """Hand over notes."""
        count = self.note_tokens
        notes = await engine.agenerate(_RESEARCH + question, max_tokens=count, min_tokens=count)
        count = self.answer_tokens
        await engine.agenerate(f"{question}\n\nNotes: {notes.text}", max_tokens=count, min_tokens=count)


@dataclass(frozen=True)
class EngineArm:
    """One engine and what runs on it."""

    name: str
    open_engine: Callable[[], Engine]
    pipeline: Pipeline


@dataclass(frozen=True)
class Throughput:
    """What one arm reaches.

    Attributes:
        arm: Which one.
        concurrency: Pipelines that run at once.
        per_minute: Pipelines per minute.
        median_seconds: From a pipeline's start to its end.
    """

    arm: str
    concurrency: int
    per_minute: float
    median_seconds: float


def arms(model: str | None, dtype: str, work: PipelineWork, most: int, *, eager: bool) -> list[EngineArm]:
    """The three arms.

    Args:
        model: Name or folder; None is the default model.
        dtype: Of all arms.
        work: What each pipeline does.
        most: Pipelines that run at once, at most.
        eager: Run vLLM without compiling.
    """
    options = {"enforce_eager": eager, "max_num_seqs": most, "max_model_len": _WINDOW}

    def latent_engine() -> Engine:
        return LatentEngine.from_pretrained(model, dtype=dtype, store=MemoryStore(), max_batch=most)

    def vllm(*, thinks: bool) -> Engine:
        return VllmEngine.from_pretrained(model, dtype=dtype, latent_steps=thinks, store=MemoryStore(), **options)

    return [
        EngineArm("latent, LatentEngine", latent_engine, work.latent),
        EngineArm("latent, VllmEngine", lambda: vllm(thinks=True), work.latent),
        EngineArm("text, vLLM", lambda: vllm(thinks=False), work.text),
    ]


def measure(arm: EngineArm, levels: Sequence[int], pipelines: int, report: Callable[[str], None]) -> list[Throughput]:
    """One arm at all levels, after a warm-up at each.

    Args:
        arm: Which one; its engine is opened and closed here.
        levels: Pipelines at once.
        pipelines: How many are timed at each.
        report: Told what is being measured.

    Raises:
        AvpError: The model cannot run, or vLLM is not installed.
    """
    report(f"{arm.name}: loading")
    engine = arm.open_engine()
    numbers = itertools.count(1000)

    async def run(level: int, count: int) -> Throughput:
        free = asyncio.Semaphore(level)

        async def once(question: str) -> float:
            async with free:
                started = time.perf_counter()
                await arm.pipeline(engine, question)
                return time.perf_counter() - started

        questions = [_TASK.format(number=next(numbers)) for _ in range(count)]
        started = time.perf_counter()
        seconds = await asyncio.gather(*map(once, questions))
        whole = time.perf_counter() - started
        return Throughput(arm.name, level, 60 * count / whole, statistics.median(seconds))

    found: list[Throughput] = []
    try:
        for level in levels:
            report(f"{arm.name}: {level} at once")
            asyncio.run(run(level, level))
            found.append(asyncio.run(run(level, pipelines)))
    finally:
        engine.close()
    return found
