"""Every family of decoder-only models runs exactly, on tiny random models, or is refused at load.

Judged by `reference.Reference`: plain transformers, no cache, the whole sequence run again for every position.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from reference import ROUNDING, Method, Reference, before_answer, fed_latents, positions, relative_deviation
from tiny_models import REFUSED, SLIDING, SUPPORTED, UNUSUAL, WINDOW, TinyModels

from avp_agents import Context, LatentEngine
from avp_agents.errors import ContextWindowError, FingerprintMismatchError, UnsupportedModelError

STEPS, TOKENS = 5, 16
ANALYSE = "What is the sum of 24 and 17? Think before you answer."
ANSWER = "Answer the question step by step."


@pytest.fixture(scope="module", params=SUPPORTED)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(family: str, tiny: TinyModels, open_module_engine: Callable[..., LatentEngine]) -> LatentEngine:
    return open_module_engine(tiny.path(family))


@pytest.fixture
def reference(family: str, tiny_reference: Callable[[str], Reference]) -> Reference:
    return tiny_reference(family)


@pytest.fixture
def method(family: str) -> Method:
    """The latent step that suits the family."""
    return "ridge" if family == "llama-untied" else "soft"


def test_thinking_and_answering_is_the_uncached_run(engine: LatentEngine, reference: Reference, method: Method) -> None:
    """Five latent steps, then sixteen tokens on top of them: the reference, token for token, from the same prompt."""
    context = engine.think(ANALYSE, steps=STEPS)
    answer = engine.generate(ANSWER, context=context, max_tokens=TOKENS)

    prompt = reference.render(ANALYSE)
    thought = reference.think(prompt, STEPS, method=method)
    boundary = before_answer(answer)[len(context) :]
    expected = reference.generate([*prompt, *thought.embeddings, *boundary], TOKENS)
    assert context.token_ids() == tuple(prompt)
    assert answer.token_ids == expected.token_ids


def test_thinking_on_a_thought(engine: LatentEngine, reference: Reference, method: Method) -> None:
    """A second agent thinks on top of the first one's context: tokens, latents, tokens, latents, then text."""
    first = engine.think(ANALYSE, steps=STEPS)
    second = engine.think("Why?", steps=STEPS, context=first)
    answer = engine.generate(ANSWER, context=second, max_tokens=TOKENS)

    assert second.extends(first)
    fed = positions(second.lineage)
    assert (
        relative_deviation(fed_latents(second), reference.think(fed[:-STEPS], STEPS, method=method).embeddings) < 1e-4
    )
    assert answer.token_ids == reference.generate(before_answer(answer), TOKENS).token_ids


async def test_a_ragged_mixture_runs_in_one_batch(engine: LatentEngine, reference: Reference, method: Method) -> None:
    """Prompts of many lengths that think, answer and answer on a context at the same time do not touch each other."""
    context = await engine.athink(ANALYSE, steps=3)
    prompts = ["Why?", ANALYSE, "the quick brown fox jumps over the lazy dog " * 4, "Solve this."]

    thoughts, answers, onward = await asyncio.gather(
        asyncio.gather(*(engine.athink(p, steps=i + 2) for i, p in enumerate(prompts))),
        asyncio.gather(*(engine.agenerate(p, max_tokens=6 + i) for i, p in enumerate(prompts))),
        asyncio.gather(*(engine.agenerate(p, context=context, max_tokens=5) for p in prompts)),
    )

    for steps, (prompt, thought) in enumerate(zip(prompts, thoughts, strict=True), start=2):
        expected = reference.think(reference.render(prompt), steps, method=method).embeddings
        assert relative_deviation(fed_latents(thought), expected) < ROUNDING
    for length, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=6):
        assert answer.token_ids == reference.generate(reference.render(prompt), length).token_ids
    for answer in onward:
        assert answer.token_ids == reference.generate(before_answer(answer), 5).token_ids


async def test_long_prompts_are_prefilled_in_pieces(engine: LatentEngine, reference: Reference) -> None:
    """Two prompts that no single round takes in, and a short one beside them, are read as they are alone."""
    prompts = ["the quick brown fox jumps over the lazy dog " * 55, "why is it? " * 120, "Why?"]
    assert all(engine.count_tokens(prompt) > 512 for prompt in prompts[:2])

    answers = await asyncio.gather(*(engine.agenerate(prompt, max_tokens=4) for prompt in prompts))

    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids == reference.generate(reference.render(prompt), 4).token_ids


def test_a_fork_from_the_middle_continues_from_there(engine: LatentEngine, reference: Reference) -> None:
    """A context cut back into its parent's answer continues as if nothing had ever followed the cut."""
    context = engine.think(ANALYSE, steps=STEPS)
    answer = engine.generate(ANSWER, context=context, max_tokens=TOKENS)
    cut = len(answer.context) - len(answer.token_ids) + 3
    middle = answer.context.prefix(cut)

    fork = engine.generate("Why?", context=middle, max_tokens=8)

    assert fork.context.extends(middle)
    assert fork.token_ids == reference.generate(before_answer(fork), 8).token_ids


def test_a_parent_stays_usable_after_its_children(engine: LatentEngine, reference: Reference) -> None:
    """Children of one context, made after each other, see the parent and nothing of each other; nor do theirs."""
    context = engine.think(ANALYSE, steps=STEPS)

    children = [engine.generate(prompt, context=context, max_tokens=8) for prompt in ("Why?", ANSWER, "Why?")]
    grandchildren = [engine.generate("Go on.", context=child.context, max_tokens=8) for child in children]

    assert children[0].token_ids == children[2].token_ids
    for answer in [*children, *grandchildren]:
        assert answer.token_ids == reference.generate(before_answer(answer), 8).token_ids


def test_an_answer_can_be_continued(engine: LatentEngine, reference: Reference) -> None:
    """The last token of an answer has no keys yet; the next turn feeds it first, and nothing is lost or doubled."""
    first = engine.generate(ANALYSE, max_tokens=7)
    assert first.context.kv_len in (len(first.context), len(first.context) - 1)

    second = engine.generate("Why?", context=first.context, max_tokens=8)

    assert second.token_ids == reference.generate(before_answer(second), 8).token_ids


def test_a_replayed_context_has_the_reference_keys_and_values(engine: LatentEngine, reference: Reference) -> None:
    """Rebuilt from its lineage alone, a KV-cache is the uncached model's to 1e-4, and answers are the same."""
    context = engine.think(ANALYSE, steps=STEPS)
    answer = engine.generate(ANSWER, context=context, max_tokens=TOKENS)
    bare = Context(context.fingerprint, context.dtype, context.lineage)

    replayed = engine.replay(bare)
    again = engine.generate(ANSWER, context=replayed, max_tokens=TOKENS)

    assert replayed.kv is not None
    expected = reference.teacher_forced(positions(context.lineage)).layers
    for found, wanted in zip(replayed.kv.to_host().layers, expected, strict=True):
        assert relative_deviation(found[0], wanted[0]) < 1e-4
        assert relative_deviation(found[1], wanted[1]) < 1e-4
    assert again.token_ids == answer.token_ids


@pytest.mark.parametrize("family", SLIDING, scope="module")
def test_answers_cross_their_sliding_window(engine: LatentEngine, reference: Reference, method: Method) -> None:
    """Prompt, latent steps and answer each outgrow the window, one after the other, on one context."""
    context = engine.think("Why?", steps=WINDOW + 3)
    answer = engine.generate("the lazy dog", context=context, max_tokens=2 * WINDOW)

    prompt = reference.render("Why?")
    thought = reference.think(prompt, WINDOW + 3, method=method)
    boundary = before_answer(answer)[len(context) :]
    expected = reference.generate([*prompt, *thought.embeddings, *boundary], 2 * WINDOW)
    assert answer.token_ids == expected.token_ids


def test_a_context_of_other_weights_is_refused(tiny: TinyModels, open_engine: Callable[..., LatentEngine]) -> None:
    """Same architecture and tokenizer, other weights or another dtype: never used as the model's own."""
    # weights that no other engine of the test run has: what one of them runs can be received
    weights = tiny.path("llama", seed=7)
    source = open_engine(weights)
    context = source.think(ANALYSE, steps=2)
    source.close()

    with pytest.raises(FingerprintMismatchError):
        open_engine(tiny.path("llama", seed=1)).generate(ANSWER, context=context)
    for other in (open_engine(tiny.path("llama", seed=1)), open_engine(weights, dtype="bfloat16")):
        with pytest.raises(FingerprintMismatchError):
            other.replay(context)


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_attention_runs_exactly_or_is_refused(
    name: str, tiny: TinyModels, tiny_reference: Callable[[str], Reference], open_engine: Callable[..., LatentEngine]
) -> None:
    """An architecture with something of its own in the attention is never run approximately."""
    try:
        engine = open_engine(tiny.path(name))
        context = engine.think(ANALYSE, steps=STEPS, method="soft")
    except (UnsupportedModelError, ContextWindowError) as refusal:
        print(f"{name}: refused. {refusal}")
        return
    answer = engine.generate(ANSWER, context=context, max_tokens=TOKENS)

    reference = tiny_reference(name)
    thought = reference.think(reference.render(ANALYSE), STEPS)
    # differential attention subtracts two maps that nearly cancel, which magnifies rounding at every step
    rounding = 10 * ROUNDING if name == "differential-attention" else ROUNDING
    assert relative_deviation(fed_latents(context), thought.embeddings) < rounding
    assert answer.token_ids == reference.generate(before_answer(answer), TOKENS).token_ids


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_represented_is_refused_at_load(
    name: str, tiny: TinyModels, open_engine: Callable[..., LatentEngine]
) -> None:
    """Recurrent states, bidirectional attention, encoders, per-layer token embeddings: none is loaded."""
    with pytest.raises(UnsupportedModelError):
        _ = open_engine(tiny.path(name)).fingerprint
