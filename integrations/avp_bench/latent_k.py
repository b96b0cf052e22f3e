"""``avp-agents bench latent-k``: does the soft embedding need the whole vocabulary, or do the likeliest k tokens do?

A coder thinks about a HumanEval problem, a reviewer writes the function on top of that context. The arms differ in k
alone and are paired per problem; ``prefill`` (no latent step) is the control.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from avp_agents.context import Context, LatentSegment
from avp_agents.engine.latent_engine import LatentEngine
from avp_bench.quality.tasks import Item, human_eval_program
from avp_bench.sandbox import sandboxed
from avp_bench.statistics import mcnemar_p

STEPS = 20
CURVE = (1, 2, 5, 10, 15, 20)
ARMS: dict[str, dict[str, Any]] = {
    "k=256": {"steps": STEPS, "method": "soft", "k": 256},
    "full": {"steps": STEPS, "method": "soft", "k": None},
    "prefill": {"steps": 0},
}
_CODER = "You are an expert Python programmer. Think about how to complete this function.\n\n{prompt}"
_REVIEWER = (
    "You are an expert Python programmer. Write the complete function, its signature included, in one ```python "
    "block and nothing else.\n\n{prompt}"
)


@dataclass(frozen=True)
class ArmResult:
    """What one arm did with every problem: the thought, the answer's ids, whether its code passed."""

    contexts: tuple[Context, ...]
    answers: tuple[tuple[int, ...], ...]
    passed: tuple[bool, ...]


def run(
    engine: LatentEngine, problems: Sequence[Item], max_tokens: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """All arms on all problems.

    Returns:
        JSON data: passes per arm, agreement, McNemar's exact p and the curves over latent steps.
    """
    results: dict[str, ArmResult] = {}
    for name, options in ARMS.items():
        report(f"Arm {name}: {len(problems)} problems")
        results[name] = _arm(engine, problems, options, max_tokens)
    one, other = results["k=256"], results["full"]
    report("Entropy over latent steps")
    return {
        "problems": len(problems),
        "passed": {name: sum(result.passed) for name, result in results.items()},
        "same_verdict": sum(a == b for a, b in zip(one.passed, other.passed, strict=True)),
        "same_answer": sum(a == b for a, b in zip(one.answers, other.answers, strict=True)),
        "mcnemar_p": {
            "k=256 / full": mcnemar_p(one.passed, other.passed),
            "k=256 / prefill": mcnemar_p(one.passed, results["prefill"].passed),
        },
        "median_cosine_between_arms": _cosines(one.contexts, other.contexts),
        "median_norm": {name: _norms(results[name].contexts) for name in ("k=256", "full")},
        "median_entropy_nats": {name: _entropies(engine, problems, ARMS[name]) for name in ("k=256", "full")},
    }


def _arm(engine: LatentEngine, problems: Sequence[Item], options: dict[str, Any], max_tokens: int) -> ArmResult:
    def solve(problem: Item) -> tuple[Context, tuple[int, ...], str]:
        context = engine.think(_CODER.format(prompt=problem.reference["prompt"]), **options)
        answer = engine.generate(
            _REVIEWER.format(prompt=problem.reference["prompt"]), context=context, max_tokens=max_tokens
        )
        # what is needed later is the lineage; keys and values would fill the pool
        kept = Context(context.fingerprint, context.dtype, context.lineage, context.readout)
        return kept, answer.token_ids, answer.text

    with ThreadPoolExecutor(16) as pool:
        solved = list(pool.map(solve, problems))
    verdicts = [
        sandboxed(human_eval_program(problem.reference, text)).passed
        for problem, (_, _, text) in zip(problems, solved, strict=True)
    ]
    return ArmResult(tuple(s[0] for s in solved), tuple(s[1] for s in solved), tuple(verdicts))


def _latents(context: Context) -> torch.Tensor:
    """``[steps, hidden]`` float32."""
    segment = context.lineage[-1]
    assert isinstance(segment, LatentSegment)
    return segment.embeddings.float()


def _cosines(one: Sequence[Context], other: Sequence[Context]) -> dict[int, float]:
    pairs = [torch.cosine_similarity(_latents(a), _latents(b), dim=-1) for a, b in zip(one, other, strict=True)]
    return {step: statistics.median(float(pair[step - 1]) for pair in pairs) for step in CURVE}


def _norms(contexts: Sequence[Context]) -> dict[int, float]:
    norms = [_latents(context).norm(dim=-1) for context in contexts]
    return {step: statistics.median(float(norm[step - 1]) for norm in norms) for step in CURVE}


def _entropies(engine: LatentEngine, problems: Sequence[Item], options: dict[str, Any]) -> dict[int, float]:
    """Entropy of the readout after so many steps, over its k tokens and the rest as one more."""

    def entropy(problem: Item, steps: int) -> float:
        shortened: dict[str, Any] = options | {"steps": steps}
        context = engine.think(_CODER.format(prompt=problem.reference["prompt"]), **shortened)
        assert context.readout is not None
        top = context.readout.probabilities.double()
        every = torch.cat([top, (1 - top.sum()).clamp_min(0)[None]])
        return float(torch.special.entr(every).sum())

    with ThreadPoolExecutor(16) as pool:
        return {step: statistics.median(pool.map(lambda p, n=step: entropy(p, n), problems)) for step in CURVE}
