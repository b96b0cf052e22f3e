"""``avp-agents bench engine``: what a latent step, a token, a prefill and a handoff cost, against fair peers.

Every comparison is made of variants that take turns in one run; medians are reported. Answers have fixed lengths
(``min_tokens == max_tokens``), prompts begin with a number of their own so that none reuses another's KV-cache.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from avp_agents.context import Context
from avp_agents.engine.latent_engine import LatentEngine
from avp_bench.peers import TransformersPeer
from avp_bench.timing import medians, read_bandwidth

BATCHES = (1, 2, 4, 8)
RESEARCHER_TOKENS = (64, 128, 256, 387)
ANSWER_TOKENS = 128
STEPS = 20
CONSUMERS = 8


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        group: Which comparison it belongs to.
        name: What was measured.
        value: The figure.
        unit: ``"ms"``, ``"tokens/s"``, ``"x"`` (a ratio) or ``"GB/s"``.
        note: What it is compared with, or why it is missing.
    """

    group: str
    name: str
    value: float | None
    unit: str
    note: str = ""


@dataclass
class EngineBench:
    """Measures one engine.

    Args:
        engine: The engine; nobody else uses it meanwhile.
        invariant: The same model with ``batch_invariant=True``, None to leave that comparison out.
        peer: The same model run by transformers itself, None where there is no second copy.
        repeats: Timed rounds of each comparison.
        tokens: Tokens per decode measurement.
        report: Told what is being measured.
    """

    engine: LatentEngine
    invariant: LatentEngine | None
    peer: TransformersPeer | None
    repeats: int = 5
    tokens: int = 32
    report: Callable[[str], None] = lambda _: None
    _number: Iterator[int] = field(default_factory=itertools.count)

    def groups(self) -> dict[str, Callable[[], list[Figure]]]:
        """The comparisons by name."""
        return {
            "steps": self.steps,
            "decode": self.decode,
            "prefill": self.prefill,
            "thinkers": self.thinkers,
            "fork": self.fork,
            "pipeline": self.pipeline,
            "batch-invariant": self.invariance,
        }

    def run(self) -> list[Figure]:
        """All comparisons, in order."""
        figures: list[Figure] = []
        for name, measure in self.groups().items():
            self.report(f"Measuring: {name}")
            figures.extend(measure())
        return figures

    def steps(self) -> list[Figure]:
        """A latent step and a decode step at batch 1, against the time of reading all weights once."""
        bandwidth = read_bandwidth(self.engine.device)
        limit = self.engine.weight_bytes / bandwidth
        seconds = medians({"latent": self._latent_step, "decode": self._decode_step}, self.repeats)
        latent, decode = seconds["latent"], seconds["decode"]
        return [
            Figure("steps", "memory read bandwidth", bandwidth / 1e9, "GB/s"),
            Figure("steps", "reading all weights once", 1e3 * limit, "ms", "the limit of a step"),
            Figure("steps", "latent step", 1e3 * latent, "ms", f"{latent / limit:.2f} x the limit"),
            Figure("steps", "decode step", 1e3 * decode, "ms", f"{decode / limit:.2f} x the limit"),
            Figure("steps", "latent step / decode step", latent / decode, "x"),
        ]

    def decode(self) -> list[Figure]:
        """Tokens per second, prefill included, for several batch sizes; transformers' own loops beside it."""
        figures: list[Figure] = []
        peer = self.peer
        for batch in BATCHES:
            variants: dict[str, Callable[[], float | None]] = {
                "engine": lambda batch=batch: self._answers(self.engine, batch, self.tokens)
            }
            if peer is not None:
                variants["generate"] = lambda batch=batch: peer.generate(self._prompts(batch), self.tokens)
            seconds = medians(variants, self.repeats)
            rates = {name: batch * self.tokens / value for name, value in seconds.items()}
            note = f"{rates['engine'] / rates['generate']:.2f} x model.generate" if "generate" in rates else ""
            figures.append(Figure("decode", f"batch {batch}", rates["engine"], "tokens/s", note))
            if "generate" in rates:
                figures.append(Figure("decode", f"batch {batch}, model.generate", rates["generate"], "tokens/s"))
        if peer is not None:
            rate, note = peer.generate_batch_rate(self._prompts(CONSUMERS), tokens=4)
            figures.append(Figure("decode", f"batch {CONSUMERS}, model.generate_batch", rate, "tokens/s", note))
        return figures

    def prefill(self) -> list[Figure]:
        """Prompt tokens per second, and replaying a lineage against prefilling as many tokens."""
        long = "All agents in the graph read the same long report. " * 40
        context = self.engine.think(f"{next(self._number)} {long}", steps=STEPS)

        def prefill() -> float:
            thought = self.engine.think(f"{next(self._number)} {long}", steps=0)
            return _usage(thought).prefill_seconds

        def replay() -> float:
            lost = Context(context.fingerprint, context.dtype, context.lineage, context.readout)
            context.detach_kv()
            return _usage(self.engine.replay(lost)).prefill_seconds

        seconds = medians({"prefill": prefill, "replay": replay}, self.repeats)
        prompt, lineage = len(context) - STEPS, len(context)
        per_position = {"prefill": seconds["prefill"] / prompt, "replay": seconds["replay"] / lineage}
        return [
            Figure("prefill", f"{prompt} positions", 1 / per_position["prefill"], "tokens/s"),
            Figure("prefill", f"replay of {lineage} positions", 1 / per_position["replay"], "tokens/s"),
            Figure("prefill", "replay / prefill, per position", per_position["replay"] / per_position["prefill"], "x"),
        ]

    def thinkers(self) -> list[Figure]:
        """Eight researchers thinking at once against one."""

        def think(count: int) -> None:
            _together([lambda p=p: self.engine.think(p, steps=STEPS) for p in self._prompts(count)])

        seconds = medians({"one": lambda: think(1), "eight": lambda: think(CONSUMERS)}, self.repeats)
        return [
            Figure("thinkers", f"one, {STEPS} steps", 1e3 * seconds["one"], "ms"),
            Figure("thinkers", f"{CONSUMERS} at once", 1e3 * seconds["eight"], "ms"),
            Figure("thinkers", f"{CONSUMERS} at once / one", seconds["eight"] / seconds["one"], "x"),
        ]

    def fork(self) -> list[Figure]:
        """Eight consumers of one context, first token each, against eight that read its prompt themselves."""
        text = "Here is what the researcher found out about the case. " * 30

        def first_tokens(context: Context | None) -> None:
            asks = [f"{next(self._number)} What follows?" for _ in range(CONSUMERS)]
            own = [ask if context is not None else f"{text} {ask}" for ask in asks]
            _together([lambda q=q: self.engine.generate(q, context=context, max_tokens=1) for q in own])

        shared = self.engine.think(f"{next(self._number)} {text}", steps=STEPS)
        seconds = medians({"fork": lambda: first_tokens(shared), "own": lambda: first_tokens(None)}, self.repeats)
        return [
            Figure("fork", f"{CONSUMERS} consumers of one context of {len(shared)}", 1e3 * seconds["fork"], "ms"),
            Figure("fork", f"{CONSUMERS} that prefill it themselves", 1e3 * seconds["own"], "ms"),
            Figure("fork", "prefill / fork", seconds["own"] / seconds["fork"], "x"),
        ]

    def invariance(self) -> list[Figure]:
        """What bit-equal results in company cost."""
        if self.invariant is None:
            return []
        invariant = self.invariant
        figures: list[Figure] = []
        for batch in (1, CONSUMERS):
            variants = {
                "default": lambda batch=batch: self._answers(self.engine, batch, self.tokens),
                "invariant": lambda batch=batch: self._answers(invariant, batch, self.tokens),
            }
            seconds = medians(variants, self.repeats)
            ratio = seconds["invariant"] / seconds["default"]
            figures.append(Figure("batch-invariant", f"time at batch {batch}, against the default", ratio, "x"))
        return figures

    def pipeline(self) -> list[Figure]:
        """Researcher and solver: 20 latent steps against so many tokens of text; the ratio, and what steps predict."""
        lengths = RESEARCHER_TOKENS
        variants: dict[str, Callable[[], float | None]] = {"latent": self._latent_pipeline}
        variants |= {f"text {n}": (lambda n=n: self._text_pipeline(n)) for n in lengths}
        variants |= {"latent step": self._latent_step, "decode step": self._decode_step, "prefill": self._prefill_step}
        seconds = medians(variants, max(1, self.repeats // 2))
        decode, latent_step, prefill = seconds["decode step"], seconds["latent step"], seconds["prefill"]
        question = self.engine.count_tokens(self._prompts(1)[0])
        figures = [Figure("pipeline", f"latent, {STEPS} steps, {ANSWER_TOKENS} tokens", 1e3 * seconds["latent"], "ms")]
        for n in lengths:
            ratio = seconds[f"text {n}"] / seconds["latent"]
            texts = (2 * question + n) * prefill + (n + ANSWER_TOKENS) * decode
            latents = 2 * question * prefill + STEPS * latent_step + ANSWER_TOKENS * decode
            note = f"text {seconds[f'text {n}']:.2f} s; steps predict {texts / latents:.2f} x"
            figures.append(Figure("pipeline", f"text / latent at {n} researcher tokens", ratio, "x", note))
        return figures

    def _prompts(self, count: int) -> list[str]:
        return [
            f"{next(self._number)} apples cost twice as much as a pear. What do five pears cost?" for _ in range(count)
        ]

    def _answers(self, engine: LatentEngine, batch: int, tokens: int) -> None:
        options: dict[str, Any] = {"max_tokens": tokens, "min_tokens": tokens}
        _together([lambda p=p: engine.generate(p, **options) for p in self._prompts(batch)])

    def _latent_step(self) -> float:
        return _usage(self.engine.think(self._prompts(1)[0], steps=STEPS)).latent_seconds / STEPS

    def _decode_step(self) -> float:
        answer = self.engine.generate(self._prompts(1)[0], max_tokens=self.tokens, min_tokens=self.tokens)
        # the first token comes out of the prefill
        return answer.usage.decode_seconds / (self.tokens - 1)

    def _prefill_step(self) -> float:
        usage = _usage(self.engine.think(self._prompts(1)[0], steps=0))
        return usage.prefill_seconds / (usage.prompt_tokens - usage.positions_reused)

    def _latent_pipeline(self) -> None:
        question = self._prompts(1)[0]
        thought = self.engine.think(question, steps=STEPS)
        self._solve(question, thought)

    def _text_pipeline(self, tokens: int) -> None:
        question = self._prompts(1)[0]
        research = self.engine.generate(question, max_tokens=tokens, min_tokens=tokens)
        self._solve(f"{question}\n\n{research.text}", None)

    def _solve(self, prompt: str, context: Context | None) -> None:
        self.engine.generate(prompt, context=context, max_tokens=ANSWER_TOKENS, min_tokens=ANSWER_TOKENS)


def machine(engine: LatentEngine) -> dict[str, Any]:
    """Where the figures come from."""
    device = engine.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "model": engine.model_path,
        "dtype": engine.dtype,
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _together(calls: list[Callable[[], Any]]) -> None:
    """Make all calls at once, each from a thread of its own."""
    if len(calls) == 1:
        calls[0]()
        return
    with ThreadPoolExecutor(len(calls)) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result()


def _usage(context: Context) -> Any:
    assert context.usage is not None
    return context.usage
