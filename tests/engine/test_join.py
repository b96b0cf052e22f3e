"""Joining contexts: replayed as one lineage, spliced from their KV-caches, or as text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import Position, Reference, positions, relative_deviation
from tiny_models import TinyModels
from torch import Tensor
from transformers import DynamicCache

from avp_agents import Context, LatentEngine, LatentSegment, TokenSegment
from avp_agents.context import SplicedSegment, leaves
from avp_agents.errors import ConfigurationError, ContextWindowError, PromptError, UnsupportedModelError
from avp_agents.kv_cache import HostKv

Layers = list[tuple[Tensor, Tensor]]
OpenEngine = Callable[..., LatentEngine]
SYSTEM = {"role": "system", "content": "You plan a park."}
QUESTION = {"role": "user", "content": "What does the park need?"}
TOPICS = ("trees", "water", "money")
END, GAP = "<|im_end|>", "\n"


def think_about(engine: LatentEngine, topic: str, steps: int = 3) -> Context:
    return engine.think([SYSTEM, QUESTION, {"role": "user", "content": f"Think of {topic}."}], steps=steps)


def thoughts_of(engine: LatentEngine) -> list[Context]:
    return [think_about(engine, topic) for topic in TOPICS]


def one_piece(joined: Context) -> Context:
    """The same positions as one lineage that nobody joined, without a KV-cache."""
    lineage = (
        segment if isinstance(segment, TokenSegment) else LatentSegment(segment.embeddings, segment.recipe)
        for segment in leaves(joined.lineage)
    )
    return Context(joined.fingerprint, joined.dtype, tuple(lineage))


def text_of(engine: LatentEngine, context: Context) -> str:
    return Reference(engine.model_path).tokenizer.decode(context.token_ids())


def layers_of(context: Context) -> Layers:
    assert context.kv is not None
    return list(context.kv.to_host().layers)


class HandSplice:
    """Splices by transformers alone: rotates keys with sines and cosines of its own, and goes on from that cache."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        config = reference.model.config
        dim = (
            config.hidden_size // config.num_attention_heads
            if not getattr(config, "head_dim", None)
            else config.head_dim
        )
        theta = config.rope_parameters["rope_theta"]
        self.frequencies = theta ** -(torch.arange(0, dim, 2).double() / dim)

    def rotated(self, keys: Tensor, by: int) -> Tensor:
        """``[heads, positions, dim]``, `by` positions forward."""
        cos, sin = (by * self.frequencies).cos(), (by * self.frequencies).sin()
        one, two = keys.double().chunk(2, dim=-1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1).to(keys.dtype)

    def made(self, lineage: Sequence[Position]) -> Layers:
        return self.reference.teacher_forced(lineage).layers

    def then(self, layers: Layers, other: Layers, prefix: int, *, rotate: bool = True) -> Layers:
        """`other` without its first `prefix` positions behind `layers`."""
        by = layers[0][0].shape[1] - prefix if rotate else 0
        pairs = zip(layers, other, strict=True)
        return [
            (torch.cat([k, self.rotated(k2[:, prefix:], by)], 1), torch.cat([v, v2[:, prefix:]], 1))
            for (k, v), (k2, v2) in pairs
        ]

    @torch.no_grad()
    def fed(self, layers: Layers, ids: Sequence[int]) -> tuple[Layers, Tensor]:
        """The cache with `ids` behind it, which see all of it; and the last position's logits."""
        cache = DynamicCache()
        for index, (keys, values) in enumerate(layers):
            cache.update(keys[None], values[None], index)
        start = layers[0][0].shape[1]
        at = torch.arange(start, start + len(ids))[None]
        out = self.reference.model(input_ids=torch.tensor([list(ids)]), position_ids=at, cache=cache, use_cache=True)
        grown: list[Any] = list(cache.layers)
        return [(layer.keys[0], layer.values[0]) for layer in grown], out.logits[0, -1]

    def answer(self, layers: Layers, ids: Sequence[int], count: int) -> tuple[int, ...]:
        """`count` greedy tokens behind `ids`."""
        answer: list[int] = []
        for _ in range(count):
            layers, logits = self.fed(layers, ids)
            logits[list(self.reference.stop_ids)] = -torch.inf
            ids = [int(logits[: self.reference.vocabulary].argmax())]
            answer += ids
        return tuple(answer)


@pytest.fixture(scope="module")
def invariant(smollm2_path: Path, open_module_engine: OpenEngine) -> LatentEngine:
    return open_module_engine(str(smollm2_path), kv_pool_bytes=2**27, batch_invariant=True)


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> Reference:
    return Reference(str(smollm2_path))


@pytest.fixture(scope="module")
def thoughts(invariant: LatentEngine) -> list[Context]:
    return thoughts_of(invariant)


class TestOnTheDefaultModel:
    """Three researchers and a join: SmolLM2-135M in float32."""

    def answer(self, invariant: LatentEngine, context: Context) -> Any:
        return invariant.generate("Name one thing.", context=context, max_tokens=6, min_tokens=6, logprobs=3)

    def test_a_replayed_join_is_one_call_on_the_concatenated_lineage(
        self, invariant: LatentEngine, thoughts: list[Context]
    ) -> None:
        joined = invariant.join(thoughts, strategy="replay")
        answer = self.answer(invariant, joined)
        replayed = self.answer(invariant, invariant.replay(one_piece(joined)))
        alone = self.answer(invariant, one_piece(joined))

        assert answer.token_ids == alone.token_ids
        assert answer.logprobs == replayed.logprobs
        assert answer.token_ids != self.answer(invariant, invariant.join(thoughts[::-1])).token_ids

    def test_a_spliced_join_is_the_caches_rotated_by_hand(
        self, invariant: LatentEngine, thoughts: list[Context], reference: Reference
    ) -> None:
        by_hand = HandSplice(reference)
        joined = invariant.join(thoughts, strategy="splice")
        end, gap = (reference.tokenizer.encode(text) for text in (END, GAP))
        prefix = next(s.prefix for s in joined.lineage if isinstance(s, SplicedSegment))
        first, *others = (by_hand.made(positions(thought.lineage)) for thought in thoughts)
        layers, straight = first, first
        for other in others:
            layers = by_hand.then(by_hand.fed(layers, end + gap)[0], other, prefix)
            straight = by_hand.then(by_hand.fed(straight, end + gap)[0], other, prefix, rotate=False)
        layers, straight = by_hand.fed(layers, end)[0], by_hand.fed(straight, end)[0]
        answer = self.answer(invariant, joined)
        asked = positions(answer.context.lineage[len(joined.lineage) : -1])

        for (keys, values), (expected_keys, expected_values) in zip(layers_of(joined), layers, strict=True):
            assert relative_deviation(keys, expected_keys) < 1e-3
            assert relative_deviation(values, expected_values) < 1e-3
        assert answer.token_ids == by_hand.answer(layers, asked, 6)  # pyright: ignore[reportArgumentType]
        # without the rotation it is another cache
        assert max(relative_deviation(a, b) for (a, _), (b, _) in zip(layers_of(joined), straight, strict=True)) > 0.1

    def test_a_splice_is_not_a_replay(self, invariant: LatentEngine, thoughts: list[Context]) -> None:
        replayed, spliced = (invariant.join(thoughts, strategy=strategy) for strategy in ("replay", "splice"))
        last = relative_deviation(layers_of(spliced)[-1][0][:, -20:], layers_of(replayed)[-1][0][:, -20:])

        assert positions(one_piece(spliced).lineage)[:5] == positions(one_piece(replayed).lineage)[:5]
        assert len(spliced) == len(replayed)
        assert spliced.recipe_id != replayed.recipe_id
        assert last > 1e-2

    def test_text_hands_over_what_was_said(self, invariant: LatentEngine) -> None:
        answers = [
            invariant.generate([SYSTEM, QUESTION], max_tokens=6, temperature=1.0, seed=seed) for seed in range(2)
        ]
        joined = invariant.join([*(answer.context for answer in answers), think_about(invariant, "x")], strategy="text")
        text = text_of(invariant, joined)

        assert joined.is_text
        assert text.endswith(f"Result 1:\n{answers[0].text.strip()}\n\nResult 2:\n{answers[1].text.strip()}{END}")
        assert text.count(SYSTEM["content"]) == text.count(QUESTION["content"]) == 1
        assert joined.handoff is not None
        assert joined.handoff.mode == "text"
        assert joined.handoff.notes == ("Result 3 is left out: it has no text, only latent steps (or a prompt)",)


@pytest.fixture(scope="module")
def engine(tiny: TinyModels, open_module_engine: OpenEngine) -> LatentEngine:
    return open_module_engine(tiny.path("llama"))


@pytest.mark.parametrize("strategy", ["replay", "splice"])
def test_a_joined_context_is_a_conversation_of_whole_turns(engine: LatentEngine, strategy: Any) -> None:
    joined = engine.join(thoughts_of(engine), strategy=strategy)
    turns = "".join(f"<|im_start|>user\nThink of {topic}.{END}\n<|im_start|>assistant\n{END}\n" for topic in TOPICS)
    opening = "".join(f"<|im_start|>{m['role']}\n{m['content']}{END}\n" for m in (SYSTEM, QUESTION))

    assert text_of(engine, joined) == (opening + turns).removesuffix(GAP)
    assert engine.generate("And?", context=joined, max_tokens=1).context.lineage[-2].token_ids[:2] == (  # pyright: ignore
        *Reference(engine.model_path).tokenizer.encode(GAP + "<|im_start|>"),
    )


@pytest.mark.parametrize("strategy", ["replay", "splice"])
def test_it_says_what_ran_and_what_was_reused(engine: LatentEngine, strategy: Any) -> None:
    thoughts = thoughts_of(engine)
    joined = engine.join(thoughts, strategy=strategy)
    assert joined.handoff is not None
    assert joined.usage is not None
    new = len(joined) - len(thoughts[0]) - sum(len(s) for s in joined.lineage if isinstance(s, SplicedSegment))

    assert joined.handoff.reason == f"3 contexts joined by {strategy}"
    if strategy == "splice":
        assert (joined.handoff.mode, joined.handoff.positions_replayed) == ("kv", 0)
        assert joined.usage.positions_reused == len(joined) - new
    else:
        assert joined.handoff.mode == "replay"
        assert joined.usage.positions_reused >= len(thoughts[0])


def test_answers_are_joined_as_well(engine: LatentEngine) -> None:
    answers = [engine.generate([SYSTEM, {"role": "user", "content": t}], max_tokens=5).context for t in TOPICS]
    for strategy in ("replay", "splice"):
        joined = engine.join(answers, strategy=strategy)
        text = text_of(engine, joined)

        assert text.count("<|im_start|>user") == text.count(f"{END}\n<|im_start|>assistant") == 3
        assert f"{END}{END}" not in text


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-sliding", "gemma2", "gemma3", "no-rope-layers"])
def test_copied_splices_are_what_the_model_computes_at_those_positions(
    name: str, tiny: TinyModels, tiny_reference: Callable[[str], Reference], open_engine: OpenEngine
) -> None:
    """Rotary positions are relative: a lineage that starts `by` positions later has the keys of the moved one."""
    engine = open_engine(tiny.path(name))
    thoughts = thoughts_of(engine)[:2]
    joined = engine.join(thoughts, strategy="splice")
    splice = next(s for s in joined.lineage if isinstance(s, SplicedSegment))
    start = len(joined) - 1 - len(splice)
    shifted = shifted_keys(tiny_reference(name), positions(thoughts[1].lineage), start - splice.prefix)

    for (keys, _), expected in zip(layers_of(joined), shifted, strict=True):
        assert relative_deviation(keys[:, start : start + len(splice)], expected[:, splice.prefix :]) < 1e-3


@torch.no_grad()
def shifted_keys(reference: Reference, lineage: Sequence[Position], by: int) -> list[Tensor]:
    """Per layer the keys ``[kv_heads, positions, dim]`` of a lineage whose first position is `by`."""
    cache = DynamicCache()
    at = torch.arange(by, by + len(lineage))[None]
    reference.model(inputs_embeds=reference.embed(lineage)[None], position_ids=at, cache=cache, use_cache=True)
    layers: list[Any] = list(cache.layers)
    return [layer.keys[0] for layer in layers]


@pytest.mark.parametrize("name", ["gpt2", "offset-positions", "rope-scaled-by-length", "rope-switched-by-length"])
def test_keys_that_cannot_be_moved_exactly_are_refused(name: str, tiny: TinyModels, open_engine: OpenEngine) -> None:
    engine = open_engine(tiny.path(name))
    thoughts = [Context(engine.fingerprint, engine.dtype, (TokenSegment((5, 6, 7 + i)),)) for i in range(2)]
    with pytest.raises(UnsupportedModelError, match="strategy='replay'"):
        engine.join(thoughts, strategy="splice")

    assert len(engine.join(thoughts)) > sum(map(len, thoughts))


class TestLostCaches:
    """A spliced lineage is enough to make the splice again."""

    def test_a_splice_is_replayed_as_a_splice(self, tiny: TinyModels, open_engine: OpenEngine) -> None:
        here, elsewhere = open_engine(tiny.path("qwen3")), open_engine(tiny.path("qwen3"))
        joined = here.join(thoughts_of(here), strategy="splice")
        answer = here.generate("And?", context=joined, max_tokens=6, min_tokens=6)
        bare = Context(joined.fingerprint, joined.dtype, joined.lineage)
        again = elsewhere.replay(bare)
        longer = Context(joined.fingerprint, joined.dtype, answer.context.lineage)
        both = zip(layers_of(again), layers_of(joined), strict=True)

        assert max(relative_deviation(a, b) for ours, theirs in both for a, b in zip(ours, theirs, strict=True)) < 1e-4
        assert elsewhere.generate("And?", context=bare, max_tokens=6, min_tokens=6).token_ids == answer.token_ids
        assert here.generate("More?", context=answer.context, max_tokens=4).token_ids == (
            elsewhere.generate("More?", context=longer, max_tokens=4).token_ids
        )

    def test_any_part_of_a_cache_may_be_left(self, tiny: TinyModels, open_engine: OpenEngine) -> None:
        here, elsewhere = open_engine(tiny.path("llama")), open_engine(tiny.path("llama"))
        joined = here.join(thoughts_of(here), strategy="splice")
        expected = here.generate("And?", context=joined, max_tokens=6, min_tokens=6).token_ids
        assert joined.kv is not None
        for left in range(1, len(joined), 7):
            rest = Context(joined.fingerprint, joined.dtype, joined.lineage)
            kept = HostKv(tuple((k[:, :left], v[:, :left]) for k, v in layers_of(joined)))
            answer = elsewhere.generate("And?", context=rest.with_kv(kept), max_tokens=6, min_tokens=6)
            assert answer.token_ids == expected
            elsewhere._runtime.scheduler.pool.evict(answer.context.kv)  # pyright: ignore

    def test_joins_are_joined(self, tiny: TinyModels, open_engine: OpenEngine) -> None:
        here, elsewhere = open_engine(tiny.path("llama")), open_engine(tiny.path("llama"))
        four = [think_about(here, topic) for topic in (*TOPICS, "time")]
        halves = [here.join(pair, strategy="splice") for pair in (four[:2], four[2:])]
        whole = here.join(halves, strategy="splice")
        again = elsewhere.replay(Context(whole.fingerprint, whole.dtype, whole.lineage))
        both = zip(layers_of(again), layers_of(whole), strict=True)

        assert max(relative_deviation(a, b) for ours, theirs in both for a, b in zip(ours, theirs, strict=True)) < 1e-4
        assert whole.latent_steps == 12
        dissolved = here.join(halves, strategy="replay")
        assert not any(isinstance(segment, SplicedSegment) for segment in dissolved.lineage)
        assert layers_of(here.replay(one_piece(dissolved)))[0][0].shape[1] == len(dissolved)


def test_moved_thoughts_are_not_those_that_are_made_in_place(engine: LatentEngine) -> None:
    answer = engine.generate([SYSTEM, QUESTION], max_tokens=4, min_tokens=4).context
    joined = engine.join([answer, engine.think("Think.", steps=3)])
    latent = joined.lineage[-2]
    assert isinstance(latent, LatentSegment)
    in_place = Context(
        joined.fingerprint, joined.dtype, (*joined.lineage[:-2], LatentSegment(latent.embeddings, latent.recipe))
    )

    assert latent.origin is not None
    assert len(latent.origin) == 64
    assert in_place.recipe_id not in joined.recipe_ids


def test_what_another_context_holds_is_left_out(engine: LatentEngine) -> None:
    thought = think_about(engine, "trees")
    answer = engine.generate("So?", context=thought, max_tokens=3).context
    joined = engine.join([thought, answer, thought])
    assert joined.handoff is not None

    assert joined.recipe_id == answer.recipe_id
    assert joined.handoff.reason == "one context: nothing to join"
    assert joined.handoff.notes == ("2 of 3 contexts left out: others hold them",)


def test_the_order_is_the_callers(engine: LatentEngine) -> None:
    thoughts = thoughts_of(engine)
    assert engine.join(thoughts).recipe_id == engine.join(thoughts).recipe_id
    assert engine.join(thoughts).recipe_id != engine.join(thoughts[::-1]).recipe_id


def test_event_loops_join_too(engine: LatentEngine) -> None:
    thoughts = thoughts_of(engine)
    assert asyncio.run(engine.ajoin(thoughts, strategy="splice")).recipe_id == (
        engine.join(thoughts, strategy="splice").recipe_id
    )


def test_what_cannot_be_joined_is_said(engine: LatentEngine) -> None:
    thoughts = thoughts_of(engine)
    with pytest.raises(ConfigurationError, match="nothing to join"):
        engine.join([])
    with pytest.raises(ConfigurationError, match="replay, splice, text"):
        engine.join(thoughts, strategy="mix")  # pyright: ignore[reportArgumentType]
    with pytest.raises(PromptError, match="no text to join"):
        engine.join(thoughts, strategy="text")
    with pytest.raises(ContextWindowError):
        engine.join([engine.think(f"{number} " * 300, steps=1) for number in range(2)])
