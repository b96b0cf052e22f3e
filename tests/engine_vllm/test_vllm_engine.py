"""The engine around vLLM: prompts, options, stops, grammars, handoffs and errors, with a stand-in for vLLM itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest
import torch
from fake_vllm import WINDOW, FakeBackend
from vllm_cases import FINGERPRINT, thought_behind

from avp_agents import Context, Engine, LatentSegment, MemoryStore, TokenSegment
from avp_agents.answer.grammar import Grammar
from avp_agents.context import SplicedSegment
from avp_agents.errors import (
    AvpError,
    ConfigurationError,
    ContextWindowError,
    EngineClosedError,
    EngineError,
    FingerprintMismatchError,
    IntegrityError,
    RequestTimeoutError,
    UnsupportedModelError,
)
from avp_agents.kv_cache import HostKv
from avp_agents.vllm import VllmEngine
from avp_agents.vllm.plugin.kv_request import KvRequest
from avp_agents.vllm.served_model import ServedModel


class Vllm:
    """An engine on a stand-in, and the stand-in."""

    def __init__(self, model: ServedModel, store: MemoryStore) -> None:
        self.backend = FakeBackend()
        self.engine = VllmEngine(model, self.backend, store)
        self._model = model

    def says(self, text: str, *, ends: bool = True) -> None:
        """What the model decodes next."""
        end = [min(self._model.renderer.stop_ids)] if ends else []
        self.backend.says = self._model.renderer.encode(text) + end


@pytest.fixture
def vllm(served_model: ServedModel, store: MemoryStore) -> Iterator[Vllm]:
    made = Vllm(served_model, store)
    with made.engine:
        yield made


def test_it_is_an_engine(vllm: Vllm) -> None:
    assert isinstance(vllm.engine, Engine)
    assert (vllm.engine.fingerprint, vllm.engine.dtype) == (FINGERPRINT, "float32")
    assert vllm.engine.context_window == WINDOW
    assert vllm.engine.count_tokens("Hello") > len(vllm.engine.encode("Hello"))


def test_an_answer_extends_the_context_it_was_given(vllm: Vllm, thought: Context) -> None:
    vllm.says("About 384 400 km.")

    answer = vllm.engine.generate("How far?", context=thought, max_tokens=32)

    assert answer.text == "About 384 400 km."
    assert answer.finish_reason == "stop"
    assert answer.context.extends(thought)
    assert answer.context.token_ids()[-len(answer.token_ids) :] == answer.token_ids
    [(prompt, decoding)] = vllm.backend.asked
    assert len(prompt) == len(answer.context) - len(answer.token_ids) == answer.usage.prompt_tokens
    assert any(isinstance(segment, LatentSegment) for segment in prompt.segments)
    assert decoding.sampling["temperature"] == 0.0
    assert "seed" not in decoding.sampling


def test_options_are_vllms_own(vllm: Vllm) -> None:
    vllm.says("yes")
    options: dict[str, Any] = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.2, "seed": 7,
        "max_tokens": 9, "min_tokens": 1,
    }  # fmt: skip

    vllm.engine.generate("Well?", **options, stop_token_ids=[5], logprobs=1)

    _, decoding = vllm.backend.asked[0]
    assert {name: decoding.sampling[name] for name in options} == options
    assert 5 in decoding.sampling["stop_token_ids"]
    assert decoding.logprobs == 1


def test_logprobs_have_one_entry_per_token(vllm: Vllm) -> None:
    vllm.says("one two")

    answer = vllm.engine.generate("Count.", logprobs=1)

    assert answer.logprobs is not None
    assert [entry.token_id for entry in answer.logprobs] == list(answer.token_ids)
    assert answer.logprobs[0].text == "one"
    assert answer.logprobs[0].top == ((answer.token_ids[0], -0.5),)


def test_a_stop_string_is_cut_and_aborts_the_request(vllm: Vllm, served_model: ServedModel) -> None:
    vllm.says("one, two, three, four", ends=False)

    answer = vllm.engine.generate("Count.", stop=[", three"])

    assert (answer.text, answer.finish_reason) == ("one, two", "stop")
    assert vllm.backend.left == 1
    assert "three" not in str(served_model.tokenizer.decode(list(answer.context.token_ids())))


def test_the_limit_ends_an_answer(vllm: Vllm) -> None:
    vllm.says("one two three four")

    answer = vllm.engine.generate("Count.", max_tokens=2)

    assert (answer.text, answer.finish_reason, len(answer.token_ids)) == ("one two", "length", 2)
    assert vllm.backend.left == 0


def test_a_grammar_is_vllms_and_its_ending_is_written_here(vllm: Vllm) -> None:
    pytest.importorskip("llguidance", reason="needs the extra `tools`")
    grammar = Grammar.json_schema({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]})
    vllm.says('{"city": "Paris, which is on the Seine and has many bridges and', ends=False)

    answer = vllm.engine.generate("Where?", grammar=grammar, max_tokens=12)

    assert answer.text.startswith('{"city": "Paris')
    assert answer.text.endswith('"}')
    assert answer.finish_reason == "length"
    _, decoding = vllm.backend.asked[0]
    assert decoding.structured is not None
    assert decoding.structured["grammar"].startswith("start: %json {")


def test_a_server_that_does_not_keep_to_the_grammar_is_found_out(vllm: Vllm) -> None:
    pytest.importorskip("llguidance", reason="needs the extra `tools`")
    vllm.says("Paris")

    with pytest.raises(EngineError, match="guidance"):
        vllm.engine.generate("Where?", grammar=Grammar.regex("[0-9]+"))


def test_streams_give_text_as_it_comes_and_end_with_the_generation(vllm: Vllm) -> None:
    vllm.says("one two three")

    chunks = list(vllm.engine.stream("Count."))

    assert "".join(chunk.text for chunk in chunks) == "one two three"
    assert [chunk.generation is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_closing_a_stream_aborts_the_request(vllm: Vllm) -> None:
    vllm.says("one two three", ends=False)
    stream = vllm.engine.stream("Count.")
    next(stream)

    stream.close()

    vllm.says("done")
    assert vllm.engine.generate("And?").text == "done"
    assert vllm.backend.left == 1


async def test_cancelling_a_task_aborts_the_request(vllm: Vllm) -> None:
    vllm.says("one two three", ends=False)
    task = asyncio.create_task(vllm.engine.agenerate("Count."))
    while not vllm.backend.asked:
        await asyncio.sleep(0.01)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    vllm.says("done")
    async with aclosing(vllm.engine.astream("And?")) as chunks:
        assert "".join([chunk.text async for chunk in chunks]) == "done"
    assert vllm.backend.left == 1


def test_a_request_that_takes_too_long_is_aborted(vllm: Vllm) -> None:
    vllm.says("one", ends=False)

    with pytest.raises(RequestTimeoutError, match=r"within 0\.1 s"):
        vllm.engine.generate("Count.", timeout=0.1)
    assert vllm.backend.left == 1


@pytest.mark.parametrize(
    ("cached", "mode", "reused"), [(None, "replay", 0), (16, "replay", 16), (10**6, "kv", None)], ids=str
)
def test_the_handoff_says_what_the_prefix_cache_held(
    vllm: Vllm, thought: Context, cached: int | None, mode: str, reused: int | None
) -> None:
    vllm.backend.cached = cached
    vllm.says("yes")

    handoff = vllm.engine.generate("Well?", context=thought).handoff

    assert handoff.mode == mode
    assert handoff.positions_reused == (len(thought) if reused is None else reused)
    assert handoff.positions_reused + handoff.positions_replayed == len(thought)
    assert handoff.bytes == thought.nbytes


def test_contexts_go_through_the_store_and_come_back(vllm: Vllm, thought: Context) -> None:
    handle = vllm.engine.store.put(thought, scope="thread-1")

    assert vllm.engine.resolve(handle, scope="thread-1").recipe_id == thought.recipe_id
    vllm.says("anything")
    replayed = vllm.engine.replay(thought)
    assert replayed.recipe_id == thought.recipe_id
    assert vllm.backend.asked[0][1].sampling["max_tokens"] == 1


def test_a_context_in_another_dtype_is_cast(vllm: Vllm, thought: Context) -> None:
    vllm.says("yes")
    narrow = thought_behind(thought.token_ids(), dtype="bfloat16")

    answer = vllm.engine.generate([{"role": "user", "content": "Well?"}], context=narrow)

    latents = next(s for s in answer.context.lineage if isinstance(s, LatentSegment))
    assert str(latents.embeddings.dtype) == "torch.float32"
    assert answer.context.dtype == "float32"


def test_contexts_are_joined_without_work(vllm: Vllm, thought: Context) -> None:
    vllm.says("384 400 km")
    answered = vllm.engine.generate("How far is the moon?").context
    vllm.backend.asked.clear()

    joined = vllm.engine.join([thought, answered])

    assert joined.latent_steps == 3
    assert joined.handoff is not None
    assert joined.handoff.mode == "replay"
    assert not vllm.backend.asked
    with pytest.raises(UnsupportedModelError, match="strategy='replay'"):
        vllm.engine.join([thought, answered], strategy="splice")


def _spliced(thought: Context) -> Context:
    spliced = SplicedSegment((TokenSegment((4, 5)),), prefix=1)
    return Context(thought.fingerprint, thought.dtype, (*thought.lineage, spliced, TokenSegment((7,))))


def _of_another_model(thought: Context) -> Context:
    return Context("cd" * 32, thought.dtype, thought.lineage)


def _with_unknown_tokens(thought: Context) -> Context:
    return Context(thought.fingerprint, thought.dtype, (TokenSegment((10**6,)),))


@pytest.mark.parametrize(
    ("made", "error"),
    [
        (_spliced, UnsupportedModelError),
        (_of_another_model, FingerprintMismatchError),
        (_with_unknown_tokens, IntegrityError),
    ],
)
def test_contexts_that_vllm_cannot_go_on_with_are_refused(
    vllm: Vllm, thought: Context, made: Any, error: type[AvpError]
) -> None:
    with pytest.raises(error):
        vllm.engine.generate("Well?", context=made(thought))
    assert not vllm.backend.asked


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_tokens": 3 * WINDOW}, ContextWindowError),
        ({"temperature": -1}, ConfigurationError),
        ({"colour": "red"}, ConfigurationError),
        ({"timeout": 0}, ConfigurationError),
        ({"grammar": Grammar.regex("a"), "min_tokens": 3}, ConfigurationError),
    ],
    ids=str,
)
def test_options_are_checked_before_vllm_is_asked(vllm: Vllm, options: Any, error: type[AvpError]) -> None:
    with pytest.raises(error):
        vllm.engine.generate("Well?", **options)
    assert not vllm.backend.asked


def _stored_with_kv(store: MemoryStore, thought: Context, positions: int) -> Context:
    """A context as it comes from a store that has keys and values for its first positions."""
    keys = torch.zeros(3, positions, 64)
    stored = Context(thought.fingerprint, thought.dtype, thought.lineage)
    stored.attach(kv=HostKv(((keys, keys),)))
    return store.get(store.put(stored))


def test_vllm_loads_what_the_store_has_and_is_told_its_salt(
    served_model: ServedModel, store: MemoryStore, thought: Context
) -> None:
    backend = FakeBackend([57])
    with VllmEngine(served_model, backend, store, loads_kv=True) as engine:
        stored = _stored_with_kv(store, thought, positions=8)
        engine.generate("Well?", context=stored, max_tokens=1)
        engine.replay(stored)
        engine.generate("Well?", context=thought, max_tokens=1)

    loading, replaying, computing = (decoding for _, decoding in backend.asked)
    kv = KvRequest(load=stored.to_handle().id, positions=8)
    assert loading.transfer == replaying.transfer == kv.transfer_params()
    assert loading.salt == replaying.salt == kv.salt
    assert (computing.transfer, computing.salt) == (None, None)


def test_vllm_is_told_of_no_store_that_it_does_not_know(
    served_model: ServedModel, store: MemoryStore, thought: Context
) -> None:
    backend = FakeBackend([57])
    with VllmEngine(served_model, backend, store) as engine:
        stored = _stored_with_kv(store, thought, positions=8)
        engine.generate("Well?", context=stored, max_tokens=1)
        with pytest.raises(ConfigurationError, match="kv_store"):
            engine.save_kv(store.get(store.put(thought, kv=False)))

    [(_, decoding)] = backend.asked
    assert (decoding.transfer, decoding.salt) == (None, None)


def test_saving_waits_for_the_store_and_not_for_ever(
    served_model: ServedModel, store: MemoryStore, thought: Context
) -> None:
    backend = FakeBackend([57])
    with VllmEngine(served_model, backend, store, loads_kv=True) as engine:
        handle = store.put(thought)
        with pytest.raises(RequestTimeoutError, match=r"within 0\.2 s"):
            engine.save_kv(thought, timeout=0.2)

    [(_, decoding)] = backend.asked
    assert decoding.transfer == KvRequest(save=handle.id).transfer_params()


def test_thinking_needs_the_plugin(vllm: Vllm) -> None:
    with pytest.raises(UnsupportedModelError, match="latent_steps=True"):
        vllm.engine.think("How far is the moon?")
    with pytest.raises(ConfigurationError, match="colour"):
        vllm.engine.think("How far is the moon?", colour="red")  # pyright: ignore[reportCallIssue]


def test_closing_ends_what_runs(vllm: Vllm) -> None:
    vllm.says("one", ends=False)
    stream = vllm.engine.stream("Count.")
    next(stream)

    vllm.engine.close()

    with pytest.raises(EngineClosedError):
        next(stream)
    with pytest.raises(EngineClosedError):
        vllm.engine.generate("Well?")
    assert vllm.backend.closed
