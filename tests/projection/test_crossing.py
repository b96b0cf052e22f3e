"""A context of one model, given to another: what arrives, and what is said about how."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engines_of_two_models import Engines

from avp_agents import LatentEngine
from avp_agents.context import Context, LatentSegment, TokenSegment
from avp_agents.crossing import ByteDistribution, SpokenMessage, Thought
from avp_agents.crossing.thought import TELL
from avp_agents.errors import ConfigurationError, FingerprintMismatchError, ProjectionError
from avp_agents.protocol import handshake as handshake_module

FACT = "the lazy dog rests under the old tree"
QUESTION = "where is the dog?"
TOKENS = 4


@pytest.fixture(scope="module")
def thought(engines: Engines) -> Context:
    """What the source thinks about a fact, under a system prompt of its own."""
    messages = [{"role": "system", "content": "secret"}, {"role": "user", "content": FACT}]
    return engines.source.think(messages, steps=3)


@pytest.fixture(scope="module")
def plain_thought(engines: Engines) -> Context:
    """The same without a system prompt."""
    return engines.source.think(FACT, steps=3)


def text_of(engine: LatentEngine, context: Context) -> str:
    """The tokens of a lineage as text."""
    return engine._runtime.tokenizer.decode(list(context.token_ids()))  # pyright: ignore[reportReturnType]


def test_the_text_is_read_again_by_default(engines: Engines, thought: Context) -> None:
    """No flag: what the user said arrives, the system prompt does not, and the handoff says what was done."""
    answer = engines.target.generate(QUESTION, context=thought, max_tokens=TOKENS)

    assert answer.handoff.mode == "reread"
    assert "100% of the smaller vocabulary is shared" in answer.handoff.reason
    assert 0 < answer.handoff.bytes < 500
    told = text_of(engines.target, answer.context)
    assert told.startswith(f"<|im_start|>user\n{FACT}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n")
    assert "secret" not in told
    assert answer.context.is_text


def test_a_thought_enters_as_a_vector_where_asked_for(engines: Engines, thought: Context) -> None:
    """Behind the text, in an open assistant turn, at the mean norm of the target's embeddings."""
    answer = engines.projecting.generate(QUESTION, context=thought, max_tokens=TOKENS)

    assert answer.handoff.mode == "projection"
    assert "of what it was about to say" in answer.handoff.reason
    opening, latents, behind = answer.context.lineage[:3]
    assert isinstance(opening, TokenSegment)
    assert isinstance(latents, LatentSegment)
    assert isinstance(behind, TokenSegment)
    assert (latents.recipe.method, latents.origin, len(latents)) == ("projection", thought.recipe_id, 1)
    mean_norm = engines.projecting._runtime.latent_step.mean_norm
    assert float(latents.embeddings.norm()) == pytest.approx(mean_norm, rel=1e-4)
    assert text_of(engines.projecting, answer.context).startswith(f"<|im_start|>user\n{FACT}<|im_end|>")


def test_the_vector_changes_the_answer(engines: Engines, plain_thought: Context) -> None:
    """It is not merely reported: without it, the distribution of the first token is another one."""
    expressed = engines.source.crossing.express(plain_thought)
    crossing = engines.target.crossing
    with_vector, without = (
        engines.target.generate(QUESTION, context=crossing.project(thought), max_tokens=1, logprobs=5).logprobs
        for thought in (expressed, replace(expressed, distributions=()))
    )

    assert with_vector != without


def test_two_thoughts_on_one_text_are_two_contexts(engines: Engines, plain_thought: Context) -> None:
    """A store that has one of them must not hand it out for the other."""
    longer = engines.source.think(FACT, steps=4)
    projected = [
        engines.target.crossing.project(engines.source.crossing.express(one)) for one in (plain_thought, longer)
    ]

    assert projected[0].recipe_ids[0] == projected[1].recipe_ids[0]
    assert projected[0].recipe_id != projected[1].recipe_id


def test_a_projected_context_is_stored_like_any_other(engines: Engines, plain_thought: Context) -> None:
    """What comes out of the store goes on as what was put in."""
    engine = engines.target
    projected = engine.crossing.project(engines.source.crossing.express(plain_thought))
    found = engine.resolve(engine.store.put(projected))

    assert found.recipe_id == projected.recipe_id
    answers = [engine.generate(QUESTION, context=one, max_tokens=TOKENS).text for one in (projected, found)]
    assert answers[0] == answers[1]


def test_a_message_that_repeats_the_text_gets_nothing_twice(engines: Engines, plain_thought: Context) -> None:
    """A graph's second agent has the question already; the thought's line for people is not rendered."""
    question = {"role": "user", "content": FACT}
    line = {"role": "assistant", "content": "thought for 3 latent steps", "context": plain_thought}

    answer = engines.target.generate([question, line], max_tokens=TOKENS)

    assert answer.handoff.mode == "reread"
    assert answer.token_ids == engines.target.generate([question], max_tokens=TOKENS).token_ids


def test_a_message_whose_source_read_more_brings_its_text(engines: Engines, thought: Context) -> None:
    """What the source read and this prompt does not hold stands where the thought stood."""
    question = {"role": "user", "content": QUESTION}
    line = {"role": "assistant", "content": "thought for 3 latent steps", "context": thought}

    told = text_of(engines.target, engines.target.generate([line, question], max_tokens=TOKENS).context)

    assert told.index(FACT) < told.index(QUESTION)
    assert "latent steps" not in told


def test_a_message_with_a_vector_is_gone_on_from(engines: Engines, plain_thought: Context) -> None:
    """The prompt's own first message is what the source read, so that the whole is one conversation."""
    question = {"role": "user", "content": FACT}
    line = {"role": "assistant", "content": "thought for 3 latent steps", "context": plain_thought}

    answer = engines.projecting.generate([question, line], max_tokens=TOKENS)

    assert answer.handoff.mode == "projection"
    assert [type(segment).__name__ for segment in answer.context.lineage] == [
        "TokenSegment", "LatentSegment", "TokenSegment",
    ]  # fmt: skip
    assert text_of(engines.projecting, answer.context).count(FACT) == 1


def test_an_answer_of_another_model_is_read_as_text(engines: Engines) -> None:
    """Its message has the words; given explicitly, its text and what it answered arrive."""
    said = engines.source.generate(FACT, max_tokens=TOKENS)
    messages = [
        {"role": "user", "content": FACT},
        {"role": "assistant", "content": said.text, "context": said.context},
        {"role": "user", "content": QUESTION},
    ]
    plain = [{key: value for key, value in message.items() if key != "context"} for message in messages]

    in_message = engines.target.generate(messages, max_tokens=TOKENS)
    explicit = engines.target.generate(QUESTION, context=said.context, max_tokens=TOKENS)

    assert in_message.handoff.mode == "text"
    assert in_message.token_ids == engines.target.generate(plain, max_tokens=TOKENS).token_ids
    assert explicit.handoff.mode == "reread"
    assert said.text.strip() in text_of(engines.target, explicit.context)


def test_without_a_common_vocabulary_the_source_tells_in_words(
    engines: Engines, thought: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source is asked what it found, and its words travel."""
    monkeypatch.setattr(handshake_module, "MIN_OVERLAP", 1.01)
    words = engines.source.generate(TELL, context=thought).text.strip()

    answer = engines.target.generate(QUESTION, context=thought, max_tokens=TOKENS)

    assert answer.handoff.mode == "text"
    assert "of the smaller vocabulary is shared" in answer.handoff.reason
    told = text_of(engines.target, answer.context)
    assert told.startswith(f"<|im_start|>assistant\n{words[:8]}")


def test_a_thought_that_is_of_no_use_is_noted_and_told_in_words(
    engines: Engines, thought: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for contexts that come from other processes."""

    def unusable(*_: object, **__: object) -> None:
        raise ProjectionError("it is too large")

    monkeypatch.setattr(engines.source.crossing, "express", unusable)
    answer = engines.target.generate(QUESTION, context=thought, max_tokens=TOKENS)

    assert answer.handoff.mode == "text"
    assert "projection: it is too large" in answer.handoff.notes


def test_the_same_weights_in_another_dtype_replay(engines: Engines, thought: Context) -> None:
    """Nothing is lost but precision: all segments arrive, the system prompt included."""
    answer = engines.other_dtype.generate(QUESTION, context=thought, max_tokens=TOKENS)

    assert (answer.handoff.mode, answer.handoff.reason) == ("replay", "same weights in another dtype")
    kept = answer.context.lineage[:2]
    assert kept[0] == thought.lineage[0]
    assert isinstance(kept[1], LatentSegment)
    assert kept[1].embeddings.dtype is torch.bfloat16


async def test_thinking_and_async_calls_receive_too(engines: Engines, thought: Context) -> None:
    """The same path behind every call."""
    further = await engines.target.athink(QUESTION, context=thought, steps=2)
    answer = await engines.target.agenerate(QUESTION, context=thought, max_tokens=TOKENS)

    assert further.handoff is not None
    assert (further.handoff.mode, answer.handoff.mode) == ("reread", "reread")


def test_a_handle_of_another_model_can_be_resolved_and_joined(engines: Engines, plain_thought: Context) -> None:
    """As long as an engine of the process runs that model."""
    handle = engines.source.store.put(plain_thought)
    found = engines.target.resolve(handle)
    own = engines.target.think("seventeen and four", steps=2)

    joined = engines.target.join([found, own])

    assert found.fingerprint == engines.source.fingerprint
    assert joined.fingerprint == engines.target.fingerprint
    assert FACT in text_of(engines.target, joined)
    assert joined.handoff is not None
    assert any(note.startswith("reread: ") for note in joined.handoff.notes)


def test_a_model_that_no_engine_runs_is_refused(engines: Engines, plain_thought: Context) -> None:
    """Nothing of it can be read; the message says what to do."""
    unknown = Context("0" * 64, plain_thought.dtype, plain_thought.lineage, plain_thought.readout)
    handle = engines.target.store.put(unknown)

    for use in (lambda: engines.target.generate("?", context=unknown), lambda: engines.target.resolve(handle)):
        with pytest.raises(FingerprintMismatchError, match="Load it here"):
            use()


@pytest.mark.parametrize(
    ("reread", "expected"),
    [
        (True, [("user", FACT)]),
        ("all", [("system", "secret"), ("user", FACT)]),
        (False, []),
    ],
)
def test_what_travels_can_be_chosen(
    engines: Engines, thought: Context, reread: bool, expected: list[tuple[str, str]]
) -> None:
    """The system prompt only where everything was asked for."""
    expressed = engines.source.crossing.express(thought, reread=reread)

    assert [(said.role, said.content) for said in expressed.messages] == expected
    assert expressed.origin == thought.recipe_id


def test_several_thoughts_are_several_vectors(engines: Engines, thought: Context, plain_thought: Context) -> None:
    """Oldest first; it crosses a wire unchanged."""
    expressed = Thought.decode(engines.source.crossing.express([plain_thought, thought]).encode())
    projected = engines.target.crossing.project(expressed)

    latents = projected.lineage[-1]
    assert isinstance(latents, LatentSegment)
    single = engines.target.crossing.embeddings_of(engines.source.crossing.express(plain_thought))
    assert latents.embeddings.shape[0] == 2
    assert torch.allclose(latents.embeddings[:1], single.embeddings, rtol=1e-2)


def test_a_vector_without_text_stands_behind_a_first_position(engines: Engines, thought: Context) -> None:
    """Attention rests on the first position, which is never a vector."""
    projected = engines.target.crossing.project(engines.source.crossing.express(thought, reread=False))

    assert isinstance(projected.lineage[0], TokenSegment)
    assert len(projected.lineage[0]) > 0
    assert engines.target.generate(QUESTION, context=projected, max_tokens=TOKENS).finish_reason


def test_a_vector_of_hardly_shared_tokens_stays_out(engines: Engines) -> None:
    """Below half of the probability the text alone is read, and the reason says so."""
    pieces = (b"the", b"\xff\xfe no such token")
    message = (SpokenMessage("user", FACT),)
    poor = Thought("a" * 64, "b" * 64, (ByteDistribution(pieces, (0.2, 0.7)),), message)

    choice = engines.projecting.crossing.choose(poor)

    assert choice.mode == "reread"
    assert choice.reason == "only 20% of what it was about to say is in this vocabulary"
    assert choice.thought.distributions == ()


def test_mistakes_are_named(engines: Engines, thought: Context) -> None:
    """No contexts, another model's contexts, and an unknown choice of text."""
    with pytest.raises(ConfigurationError, match="no context"):
        engines.source.crossing.express([])
    with pytest.raises(FingerprintMismatchError):
        engines.target.crossing.express(thought)
    with pytest.raises(ConfigurationError, match="reread"):
        LatentEngine.from_pretrained(engines.source.model_path, reread="some")  # pyright: ignore[reportArgumentType]
