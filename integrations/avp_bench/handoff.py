"""``avp-agents bench handoff``: a researcher in one process, a solver in another, and what each way between them takes.

The researcher's model is behind `avp-agents serve` and spoken to over HTTP/2; the solver runs in this process with the
same weights. The researcher reads a report of 300 tokens with a question and thinks 20 latent steps; the solver, which
gets nothing but what is handed over and the question, answers:

    kv           the KV-cache moves
    replay       the lineage moves, and is prefilled
    projection   the text that the researcher read moves, and its thought as a vector
    text         the researcher says its thought in words

Times run from the beginning of the handover to the answer's first token, so that they hold what a mode leaves to be
done afterwards. Every context is let go before the next handover: nothing of it is there to be reused.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from avp_agents.answer.generation import Generation
from avp_agents.engine.latent_engine import LatentEngine
from avp_agents.errors import ConfigurationError
from avp_agents.protocol.handshake import MODES, CrossingMode
from avp_agents.transport import RemoteEngine
from avp_agents.transport.client import hand_over
from avp_agents.transport.client.remote_context import RemoteContext
from avp_bench.comprehension import Passage
from avp_bench.engine_bench import machine
from avp_bench.handoff_crossover import Crossover, find_crossover
from avp_bench.handoff_link import limited_link
from avp_bench.served_model import ModelServer

STEPS = 20
ANSWER_TOKENS = 24
TEXT_TOKENS = 64
SLOW_BYTES_PER_SECOND = 10e6 / 8
"""10 Mbit/s."""


@dataclass(frozen=True)
class TimedHandover:
    """One handover, and the answer on top of it.

    Attributes:
        mode: As it was done.
        bytes: That moved, in both directions.
        moved_ms: Until the solver held a context.
        ready_ms: Until it had decoded its first token; includes `moved_ms`.
        answer: Its text.
    """

    mode: str
    bytes: int
    moved_ms: float
    ready_ms: float
    answer: str


@dataclass(frozen=True)
class ServedThought:
    """What the researcher has for one question, on the server, and what it answers itself."""

    item: Passage
    context: RemoteContext
    answer: str


@dataclass(frozen=True)
class ModeFigures:
    """One mode over all questions: medians, and counts of answers.

    Attributes:
        mode: Asked for.
        done: As it was done, if that is another one.
        right: Right answers.
        same: Answers that are the researcher's own engine's, word for word.
    """

    mode: str
    done: str
    right: int
    same: int
    bytes: float
    moved_ms: float
    ready_ms: float


@dataclass(frozen=True)
class LinkChoice:
    """What the handshake chose by itself on one link."""

    link: str
    bits_per_second: float
    done: TimedHandover


def read_questions(count: int | None = None) -> list[Passage]:
    """The report with its questions, or the first `count` of them.

    Raises:
        ConfigurationError: There are not so many.
    """
    data = json.loads(files("avp_bench").joinpath("data/lighthouse.json").read_text(encoding="utf-8"))
    items = [Passage(data["report"], asked["question"], tuple(asked["answers"])) for asked in data["questions"]]
    if count is not None and not 1 <= count <= len(items):
        raise ConfigurationError(f"There are {len(items)} questions, so take 1 to {len(items)}.")
    return items[:count]


class HandoffBench:
    """Measures one pair of processes.

    Args:
        solver: Of this process; nobody else uses it meanwhile.
        server: The researcher's.
        items: The report with one question each.
        report: Told what is going on.
    """

    def __init__(
        self, solver: LatentEngine, server: ModelServer, items: Sequence[Passage], report: Callable[[str], None]
    ) -> None:
        self._solver, self._server, self._items, self._report = solver, server, items, report

    def run(self, repeats: int) -> dict[str, Any]:
        """All figures, as JSON data.

        Args:
            repeats: Handovers of each mode per speed, where the crossover is looked for.
        """
        self._solver.load()
        with RemoteEngine(self._server.url, token=self._server.token) as source:
            if source.fingerprint != self._solver.fingerprint:
                raise ConfigurationError("Researcher and solver run different models; the modes need one.")
            thoughts = [self._think(source, item) for item in self._items]
            self._warm_up(source, thoughts[0])
            rows = [self._mode(source, thoughts, mode) for mode in MODES]
        first = thoughts[0]
        choices = [self._choose("loopback", None, first), self._choose("10 Mbit/s", SLOW_BYTES_PER_SECOND, first)]
        crossover = self._crossover(first, repeats)
        by_mode = {row.mode: row for row in rows}
        return {
            "machine": machine(self._solver),
            "questions": len(thoughts),
            "prompt_tokens": statistics.median(len(thought.context) - STEPS for thought in thoughts),
            "steps": STEPS,
            "right_in_one_process": sum(thought.item.is_right(thought.answer) for thought in thoughts),
            "modes": [asdict(row) for row in rows],
            "replay_bytes_of_kv": by_mode["replay"].bytes / by_mode["kv"].bytes,
            "choices": [asdict(choice) for choice in choices],
            "crossover": crossover.to_json() if crossover is not None else None,
        }

    def hand_over(
        self, source: RemoteEngine, thought: ServedThought, mode: CrossingMode | None, *, tokens: int = ANSWER_TOKENS
    ) -> TimedHandover:
        """Hand a thought over and have the solver answer.

        Args:
            source: The server, on whatever link.
            thought: One of its thoughts.
            mode: None lets the handshake choose.
            tokens: Most that it decodes.
        """
        started = time.perf_counter()
        context = hand_over(thought.context, source, self._solver, mode=mode, text_tokens=TEXT_TOKENS)
        moved = time.perf_counter()
        ready: float | None = None
        answer: Generation | None = None
        for chunk in self._solver.stream(thought.item.question, context=context, max_tokens=tokens):
            ready, answer = ready or time.perf_counter(), chunk.generation
        assert ready is not None, "a stream has a first chunk"
        assert answer is not None, "a stream ends with its generation"
        handoff = context.handoff
        assert handoff is not None, "what was handed over says how"
        moved_ms, ready_ms = 1e3 * (moved - started), 1e3 * (ready - started)
        return TimedHandover(handoff.mode, handoff.bytes, moved_ms, ready_ms, answer.text)

    def _think(self, source: RemoteEngine, item: Passage) -> ServedThought:
        """Have the researcher read the report and think about a question."""
        self._report(f"The researcher reads and thinks: {item.question}")
        context = source.think(f"Read this report.\n\n{item.paragraph}\n\n{item.question}", steps=STEPS)
        answer = source.generate(item.question, context=context, max_tokens=ANSWER_TOKENS)
        return ServedThought(item, context, answer.text)

    def _warm_up(self, source: RemoteEngine, thought: ServedThought) -> None:
        """What is made once is made before anything is timed."""
        for mode in (*MODES, None):
            self.hand_over(source, thought, mode)

    def _mode(self, source: RemoteEngine, thoughts: Sequence[ServedThought], mode: CrossingMode) -> ModeFigures:
        """One mode on the loopback."""
        self._report(f"Handing {len(thoughts)} thoughts over: {mode}")
        return _row(mode, thoughts, [self.hand_over(source, thought, mode) for thought in thoughts])

    def _choose(self, name: str, bytes_per_second: float | None, thought: ServedThought) -> LinkChoice:
        """Let the handshake choose on a link that it has not met before."""
        self._report(f"The handshake chooses: {name}")
        with ExitStack() as opened:
            url = self._server.url
            if bytes_per_second is not None:
                url = opened.enter_context(limited_link(url, bytes_per_second))
            source = opened.enter_context(RemoteEngine(url, token=self._server.token))
            return LinkChoice(name, 8 * source.link().bytes_per_second, self.hand_over(source, thought, None, tokens=1))

    def _crossover(self, thought: ServedThought, repeats: int) -> Crossover | None:
        """Where moving the KV-cache and rebuilding it take equally long, and where the handshake switches."""

        def seconds(bytes_per_second: float, mode: CrossingMode) -> float:
            self._report(f"{mode} at {8e-6 * bytes_per_second:.0f} Mbit/s")
            with (
                limited_link(self._server.url, bytes_per_second) as url,
                RemoteEngine(url, token=self._server.token) as source,
            ):
                _ = source.info  # greeted, as it is before any handover but the first
                return self.hand_over(source, thought, mode, tokens=1).ready_ms / 1e3

        def chosen(bytes_per_second: float) -> str:
            return self._choose(f"{8e-6 * bytes_per_second:.0f} Mbit/s", bytes_per_second, thought).done.mode

        return find_crossover(seconds, chosen, slowest=SLOW_BYTES_PER_SECOND, repeats=repeats)


def _row(mode: str, thoughts: Sequence[ServedThought], done: Sequence[TimedHandover]) -> ModeFigures:
    pairs = list(zip(thoughts, done, strict=True))
    return ModeFigures(
        mode=mode,
        done=", ".join(sorted({one.mode for one in done})),
        right=sum(thought.item.is_right(one.answer) for thought, one in pairs),
        same=sum(thought.answer == one.answer for thought, one in pairs),
        bytes=statistics.median(one.bytes for one in done),
        moved_ms=statistics.median(one.moved_ms for one in done),
        ready_ms=statistics.median(one.ready_ms for one in done),
    )
