"""The engine computes what the model computes: SmolLM2-135M in float32 against plain transformers without a cache.

Each test prints what it measured; run with ``-rP`` to read it.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import Decoded, Reference, Thought, before_answer, fed_latents, positions, relative_deviation

from avp_agents import Context, DiskStore, Generation, LatentEngine, LatentSegment, TokenSegment
from avp_agents.answer.options import GenerateOptions
from avp_agents.engine.extras.invariant import INVARIANT_CHUNK

STEPS, TOKENS = 20, 32
ANSWER: GenerateOptions = {"max_tokens": TOKENS, "min_tokens": TOKENS, "logprobs": 20}
SHORT_ANSWER: GenerateOptions = {"max_tokens": 12, "min_tokens": 12}
HANDOVERS = [
    ("Analyze: 24 * 17 + 3", "Solve step by step: 24 * 17 + 3"),
    ("List facts about the river Nile.", "Write a short text about the river Nile."),
    ("How many apples are left if I eat 3 of 11?", "I had 11 apples and ate 3. How many are left?"),
]
QUESTIONS = [
    "Name three rivers in Europe.", "What is 12 * 12?", "Who wrote Hamlet, and when was it first played?",
    "Write a haiku about the sea.", "How does a bicycle stay upright?", "List the primes below twenty.",
    "Translate 'good morning' into French, Spanish and Italian.", "Why?",
]  # fmt: skip


@dataclass(frozen=True)
class Handover:
    """A researcher's context and a solver's answer on it, by the engine and by the reference.

    Attributes:
        context, answer: What the engine made.
        prompt: The researcher's prompt, as ids.
        boundary: What the engine put between the context and the answer, as ids.
        thought, expected: What the reference makes of prompt and boundary.
    """

    context: Context
    answer: Generation
    prompt: list[int]
    boundary: list[Any]
    thought: Thought
    expected: Decoded


@pytest.fixture(scope="module")
def path(smollm2_path: Path) -> str:
    return str(smollm2_path)


@pytest.fixture(scope="module")
def reference(path: str) -> Reference:
    return Reference(path)


@pytest.fixture(scope="module")
def engine(path: str, open_module_engine: Callable[..., LatentEngine]) -> LatentEngine:
    return open_module_engine(path, kv_pool_bytes=2**28)


@pytest.fixture(scope="module")
def invariant(path: str, open_module_engine: Callable[..., LatentEngine]) -> LatentEngine:
    return open_module_engine(path, kv_pool_bytes=2**28, batch_invariant=True)


@pytest.fixture(scope="module")
def other_invariant(path: str, open_module_engine: Callable[..., LatentEngine]) -> LatentEngine:
    """A second one, which shares no memory with the first."""
    return open_module_engine(path, kv_pool_bytes=2**28, batch_invariant=True)


@pytest.fixture(scope="module")
def handovers(engine: LatentEngine, reference: Reference) -> list[Handover]:
    return [hand_over(engine, reference, *prompts) for prompts in HANDOVERS]


def hand_over(engine: LatentEngine, reference: Reference, analyse: str, solve: str) -> Handover:
    context = engine.think(analyse, steps=STEPS)
    answer = engine.generate(solve, context=context, **ANSWER)
    prompt = reference.render(analyse)
    boundary = before_answer(answer)[len(context) :]
    thought = reference.think(prompt, STEPS)
    expected = reference.generate([*prompt, *thought.embeddings, *boundary], TOKENS, minimum=TOKENS)
    return Handover(context, answer, prompt, boundary, thought, expected)


def first_token(generation: Generation) -> dict[int, float]:
    """Log-probabilities of the likeliest first tokens."""
    assert generation.logprobs is not None
    return dict(generation.logprobs[0].top)


def thought_context(like: Context, ids: Iterable[int], embeddings: torch.Tensor) -> Context:
    """A context of the same model without a KV-cache: a prompt and what latent steps fed."""
    segment = like.lineage[-1]
    assert isinstance(segment, LatentSegment)
    lineage = (TokenSegment(tuple(ids)), replace(segment, embeddings=embeddings))
    return Context(like.fingerprint, like.dtype, lineage)


# (a) token for token


def test_a_handover_is_the_uncached_model_token_for_token(handovers: list[Handover]) -> None:
    """Batch 1: 20 latent steps and 32 tokens on top of them, each side making its own latents from the same prompt."""
    for handover in handovers:
        deviation = relative_deviation(fed_latents(handover.context), handover.thought.embeddings)
        print(f"latents deviate by {deviation:.1e}; smallest top-2 gap {min(handover.expected.gaps):.4f}")
    for handover in handovers:
        assert handover.context.token_ids() == tuple(handover.prompt)
        assert handover.answer.token_ids == handover.expected.token_ids


# (b) teacher-forced


@pytest.fixture(scope="module")
def contexts(handovers: list[Handover]) -> list[Context]:
    """Eight lineages of different lengths, of the reference's latents, without KV-caches."""
    return [
        thought_context(
            handover.context,
            handover.prompt[: len(handover.prompt) - 3 * n],
            handover.thought.embeddings[: STEPS - 2 * n],
        )
        for n in range(3)
        for handover in handovers
    ][:8]


@pytest.mark.parametrize("company", ["alone", "batched"])
async def test_teacher_forced_keys_and_values_agree(
    company: str, engine: LatentEngine, reference: Reference, contexts: list[Context]
) -> None:
    """Fed the same tokens and latents, keys and values of all layers are the uncached model's to 1e-4."""
    replayed = await replay_all(engine, contexts, together=company == "batched")

    deviations = []
    for context in replayed:
        assert context.kv is not None
        assert context.kv_len == len(context)
        found, expected = context.kv.to_host().layers, reference.teacher_forced(positions(context.lineage)).layers
        for (keys, values), (expected_keys, expected_values) in zip(found, expected, strict=True):
            deviations.append(relative_deviation(keys, expected_keys))
            deviations.append(relative_deviation(values, expected_values))
    print(f"{company}: largest relative deviation of keys and values {max(deviations):.1e}")
    assert max(deviations) < 1e-4


async def replay_all(engine: LatentEngine, contexts: list[Context], *, together: bool) -> list[Context]:
    if together:
        return list(await asyncio.gather(*(engine.areplay(context) for context in contexts)))
    return [await engine.areplay(context) for context in contexts]


@pytest.mark.parametrize("company", ["alone", "batched"])
async def test_teacher_forced_logits_agree(
    company: str, engine: LatentEngine, reference: Reference, contexts: list[Context]
) -> None:
    """On replayed contexts, the log-probabilities of what is decoded are the uncached model's to 1e-4."""

    async def answer(context: Context) -> Generation:
        return await engine.agenerate("Go on.", context=context, max_tokens=4, logprobs=20)

    if company == "batched":
        answers = await asyncio.gather(*(answer(context) for context in contexts))
    else:
        answers = [await answer(context) for context in contexts]

    deviations = [logprob_deviation(generation, reference) for generation in answers]
    print(f"{company}: largest relative deviation of log-probabilities {max(deviations):.1e}")
    assert max(deviations) < 1e-4


def test_the_solver_s_logits_agree(handovers: list[Handover], reference: Reference) -> None:
    """The same for the 32 tokens of each handover, decoded one by one on the engine's own KV-cache."""
    deviations = [logprob_deviation(handover.answer, reference) for handover in handovers]
    print(f"largest relative deviation of log-probabilities per handover: {[f'{d:.1e}' for d in deviations]}")
    assert max(deviations) < 1e-4


def test_what_a_stop_string_cut_off_is_gone(
    engine: LatentEngine, reference: Reference, handovers: list[Handover]
) -> None:
    """Cut inside a token two tokens back, an answer goes on from its kept text: no key or value of the rest remains."""
    whole = handovers[1].answer.text
    answer = engine.generate(HANDOVERS[1][1], context=handovers[1].context, stop="ng, flow", max_tokens=TOKENS)
    onward = engine.generate("Go on.", context=answer.context, max_tokens=4, logprobs=20)

    assert answer.text == whole[: whole.index("ng, flow")]
    assert answer.context.kv_len <= len(answer.context)
    assert onward.context.extends(answer.context)
    assert logprob_deviation(onward, reference) < 1e-4


def logprob_deviation(generation: Generation, reference: Reference) -> float:
    """Of all reported log-probabilities of an answer, relative to the largest."""
    assert generation.logprobs is not None
    lineage = positions(generation.context.lineage)
    expected = reference.teacher_forced(lineage).logits[-len(generation.token_ids) - 1 : -1].log_softmax(-1)
    rows = [torch.tensor(token.top) for token in generation.logprobs]
    found = torch.stack([row[:, 1] for row in rows])
    wanted = torch.stack([line[row[:, 0].long()] for row, line in zip(rows, expected, strict=True)])
    return relative_deviation(found, wanted)


# (c), (d) in company


async def test_answers_in_company_are_those_given_alone(engine: LatentEngine) -> None:
    """Eight requests at once answer like the eight alone, unless two tokens were equally likely to within 1e-3."""
    options: Any = {"max_tokens": 16, "logprobs": 2}
    together = await asyncio.gather(*(engine.agenerate(question, **options) for question in QUESTIONS))
    alone = [await engine.agenerate(question, **options) for question in QUESTIONS]

    for question, one, many in zip(QUESTIONS, alone, together, strict=True):
        if one.token_ids == many.token_ids:
            print(f"{question!r}: {len(one.token_ids)} tokens equal")
            continue
        pairs = zip(one.token_ids, many.token_ids, strict=False)
        at = next(i for i, (a, b) in enumerate(pairs) if a != b)
        assert one.logprobs is not None
        best, second = one.logprobs[at].top
        print(f"{question!r}: first divergence at {at}, top-2 gap {best[1] - second[1]:.1e}")
        assert best[1] - second[1] < 1e-3


async def test_latent_steps_in_company_deviate_by_rounding(engine: LatentEngine) -> None:
    """The recurrence amplifies rounding: reported at steps 1, 5, 10 and 20; the first step must agree to 1e-3."""
    together = await asyncio.gather(*(engine.athink(question, steps=STEPS) for question in QUESTIONS))
    alone = [await engine.athink(question, steps=STEPS) for question in QUESTIONS[:4]]

    for question, one, many in zip(QUESTIONS, alone, together, strict=False):
        a, b = fed_latents(one), fed_latents(many)
        by_step = {step: relative_deviation(b[step - 1], a[step - 1]) for step in (1, 5, 10, 20)}
        print(f"{question!r}: " + ", ".join(f"step {step} {value:.1e}" for step, value in by_step.items()))
        assert by_step[1] < 1e-3


async def test_batch_invariant_results_are_bit_equal_in_company(
    invariant: LatentEngine, other_invariant: LatentEngine
) -> None:
    """With `batch_invariant=True`, latents, keys, values, tokens and log-probabilities do not depend on the company."""
    thoughts, answers = await asyncio.gather(
        asyncio.gather(*(invariant.athink(question, steps=6) for question in QUESTIONS)),
        asyncio.gather(*(invariant.agenerate(q, max_tokens=6, logprobs=5) for q in reversed(QUESTIONS))),
    )

    for question, company, answer in zip(QUESTIONS[:3], thoughts[:3], list(reversed(answers))[:3], strict=True):
        alone = other_invariant.think(question, steps=6)
        assert torch.equal(fed_latents(company), fed_latents(alone))
        assert_same_kv(company, alone)
        assert answer.logprobs == other_invariant.generate(question, max_tokens=6, logprobs=5).logprobs


def test_batch_invariant_prompts_share_whole_chunks_without_changing_a_bit(
    invariant: LatentEngine, other_invariant: LatentEngine
) -> None:
    """A prompt that begins like another one takes over its whole chunks; a chunk that differs anywhere is computed."""
    opening = "The lighthouse keeper counts ships, gulls and hours, and writes all of it into a long green book. " * 6
    first = invariant.think(f"{opening} Who reads the book?", steps=1)
    assert first.kv is not None

    second = invariant.think(f"{opening} What is counted?", steps=2)
    alone = other_invariant.think(f"{opening} What is counted?", steps=2)

    assert second.usage is not None
    assert alone.usage is not None
    assert second.usage.positions_reused == INVARIANT_CHUNK * (len(second) // INVARIANT_CHUNK) > 0
    assert alone.usage.positions_reused == 0
    assert torch.equal(fed_latents(second), fed_latents(alone))
    assert_same_kv(second, alone)


def assert_same_kv(one: Context, other: Context) -> None:
    assert one.kv is not None
    assert other.kv is not None
    for pair, other_pair in zip(one.kv.to_host().layers, other.kv.to_host().layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, other_pair, strict=True))


# (e) one context, many consumers


async def test_a_shared_context_serves_each_consumer_like_a_fresh_one(
    invariant: LatentEngine, other_invariant: LatentEngine
) -> None:
    """Four consumers at once on one context get what each gets on a context of its own; the context never changes."""
    analyse = HANDOVERS[0][0]
    shared = await invariant.athink(analyse, steps=5)
    handle, length, lineage = invariant.store.put(shared), len(shared), positions(shared.lineage)

    answers = await asyncio.gather(
        *(invariant.agenerate(q, context=shared, max_tokens=8, logprobs=5) for q in QUESTIONS[:4])
    )

    for question, answer in zip(QUESTIONS, answers, strict=False):
        fresh = other_invariant.think(analyse, steps=5)
        alone = other_invariant.generate(question, context=fresh, max_tokens=8, logprobs=5)
        assert answer.logprobs == alone.logprobs
    assert len(shared) == length
    assert shared.to_handle() == handle
    assert all(
        a is b or torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        for a, b in zip(positions(shared.lineage), lineage, strict=True)
    )


def test_earlier_consumers_leave_no_trace(invariant: LatentEngine, other_invariant: LatentEngine) -> None:
    """What one consumer of an answer added to the memory they share changes no bit of the next one's result."""
    bases = [engine.generate(QUESTIONS[1], max_tokens=3) for engine in (invariant, other_invariant)]
    first = invariant.generate(QUESTIONS[0], context=bases[0].context, max_tokens=3)

    second = invariant.generate(QUESTIONS[2], context=bases[0].context, max_tokens=3, logprobs=5)

    fresh = other_invariant.generate(QUESTIONS[2], context=bases[1].context, max_tokens=3, logprobs=5)
    assert first.context.extends(bases[0].context)
    assert second.logprobs == fresh.logprobs


# (f) replay


def test_after_drop_kv_a_context_is_replayed(engine: LatentEngine, handovers: list[Handover]) -> None:
    """A stored context whose KV-cache was dropped answers with the same tokens; the metadata says it was replayed."""
    analyse, solve = HANDOVERS[0]
    context = engine.think(analyse, steps=STEPS)
    handle = engine.store.put(context)
    del context
    engine.store.drop_kv(handle)
    gc.collect()

    answer = engine.generate(solve, context=engine.resolve(handle), **SHORT_ANSWER)

    assert answer.token_ids == handovers[0].expected.token_ids[:12]
    assert answer.handoff.mode == "replay"
    assert answer.handoff.positions_replayed >= STEPS


RESEARCHER = """
import sys
from avp_agents import DiskStore, LatentEngine
path, folder, prompt, steps = sys.argv[1:]
with LatentEngine.from_pretrained(path, dtype="float32", device="cpu") as engine:
    context = engine.think(prompt, steps=int(steps))
    for kind in ("replay", "kv"):
        DiskStore(f"{folder}/{kind}").put(context, kv=kind == "kv")
"""


@pytest.fixture(scope="module")
def researchers_disk(path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores, each with one context: its lineage alone, or its KV-cache too. Their writer has ended."""
    folder = tmp_path_factory.mktemp("researcher")
    command = [sys.executable, "-c", RESEARCHER, path, str(folder), HANDOVERS[1][0], str(STEPS)]
    subprocess.run(command, check=True)
    return folder


@pytest.mark.parametrize("mode", ["replay", "kv"])
def test_after_a_restart_a_context_answers_the_same(
    mode: str,
    researchers_disk: Path,
    path: str,
    open_engine: Callable[..., LatentEngine],
    handovers: list[Handover],
) -> None:
    """A context that another process stored, lineage alone or with its KV-cache, is gone on with by a new engine."""
    engine = open_engine(path, store=DiskStore(researchers_disk / mode))
    (handle,) = engine.store.list()

    answer = engine.generate(HANDOVERS[1][1], context=engine.resolve(handle), **SHORT_ANSWER)

    assert answer.handoff.mode == mode
    assert answer.token_ids == handovers[1].expected.token_ids[:12]


def test_under_a_budget_for_one_of_four_contexts_all_answer_the_same(
    path: str, engine: LatentEngine, open_engine: Callable[..., LatentEngine], handovers: list[Handover]
) -> None:
    """The pool holds one context and its answer; the others come back by themselves, with the same tokens."""
    prompts = [*HANDOVERS, (QUESTIONS[2], "Go on.")]
    fourth = engine.generate(prompts[3][1], context=engine.think(prompts[3][0], steps=STEPS), **SHORT_ANSWER)
    expected = [*(handover.expected.token_ids[:12] for handover in handovers), fourth.token_ids]
    positions_needed = max(len(g.context) for g in [*(h.answer for h in handovers), fourth])
    small = open_engine(path, kv_pool_bytes=positions_needed * engine.stats().kv_bytes_per_position)

    contexts = [small.think(analyse, steps=STEPS) for analyse, _ in prompts]
    resident = [context for context in contexts if context.kv is not None]
    answers = [
        small.generate(solve, context=context, **SHORT_ANSWER)
        for context, (_, solve) in zip(contexts, prompts, strict=True)
    ]

    assert len(resident) == 1
    print([f"{a.handoff.mode}, {a.handoff.positions_replayed} positions replayed" for a in answers])
    assert [answer.token_ids for answer in answers] == expected


# negative controls


def test_what_the_context_says_matters(engine: LatentEngine, handovers: list[Handover]) -> None:
    """Another context, no context, and the same context with its latents zeroed: other logits each time."""
    solve = HANDOVERS[0][1]
    context, prompt, fed = handovers[0].context, handovers[0].prompt, fed_latents(handovers[0].context)
    replayed, zeroed = (thought_context(context, prompt, latents) for latents in (fed, torch.zeros_like(fed)))

    def ask(context: Context | None) -> dict[int, float]:
        return first_token(engine.generate(solve, context=context, max_tokens=1, logprobs=20))

    right = first_token(handovers[0].answer)
    changes = {
        "itself, replayed": change(right, ask(replayed)),
        "another context": change(right, ask(handovers[1].context)),
        "no context": change(right, ask(None)),
        "latents zeroed": change(right, ask(zeroed)),
    }
    print(changes)
    assert changes.pop("itself, replayed") < 1e-2
    assert min(changes.values()) > 0.1


def change(one: dict[int, float], other: dict[int, float]) -> float:
    """Largest change of a log-probability that both report."""
    shared: Iterable[int] = one.keys() & other.keys()
    return max((abs(one[token] - other[token]) for token in shared), default=float("inf"))
