"""Contexts' keys and values between a LatentEngine, a store and vLLM: the same tokens, and what went where is shown."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: see docs/vllm.md")
pytest.importorskip("obstore", reason="needs the extra `objects`")

from vllm_cases import STEPS, TOKENS, Case, Reference, review, without_kv

from avp_agents import Context, Generation, LatentEngine
from avp_agents.errors import NotStoredError
from avp_agents.kv_cache import HostKv
from avp_agents.store import TieredStore, open_store
from avp_agents.vllm import VllmEngine

TIDES = Case("", "Explain in one sentence why this matters to sailors.")


@pytest.fixture(scope="module")
def engine(references: list[Reference], smollm2_path: Path, kv_store: str) -> Iterator[VllmEngine]:
    """With latent steps and a store; so few positions per step that a prompt is prefilled in chunks."""
    options: dict[str, Any] = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 4}
    options |= {"num_gpu_blocks_override": 24, "max_num_batched_tokens": 48}
    with VllmEngine.from_pretrained(
        str(smollm2_path), dtype="float32", latent_steps=True, kv_store=kv_store, **options
    ) as opened:
        yield opened


@pytest.fixture
def store(kv_store: str) -> TieredStore:
    """The same store, as another process has it."""
    return open_store(kv_store, share_kv=True)


def _solve(engine: VllmEngine | LatentEngine, case: Case, thought: Context) -> Generation:
    return engine.generate(case.solve, context=thought, max_tokens=TOKENS, min_tokens=TOKENS)


def replaced_latents(thought: Context, other: Context) -> Context:
    """A thought's prompt with another one's latents behind it."""
    return Context(thought.fingerprint, thought.dtype, (*thought.lineage[:-1], other.lineage[-1]))


def test_it_loads_what_the_latent_engine_has_stored(
    engine: VllmEngine, store: TieredStore, references: list[Reference]
) -> None:
    """Of lengths that no block ends at."""
    for reference in references:
        handle = store.put(reference.thought, scope="load")

        answer = _solve(engine, reference.case, engine.resolve(handle))

        assert answer.token_ids == reference.answer.token_ids
        assert answer.handoff.mode == "kv"
        assert answer.handoff.positions_reused == len(reference.thought)


def test_the_latent_engine_goes_on_with_what_it_has_saved(
    engine: VllmEngine, latent_engine: LatentEngine, store: TieredStore, references: list[Reference]
) -> None:
    for reference in references:
        answered = _solve(engine, reference.case, reference.thought).context
        handle = engine.store.put(answered, scope="save")

        saved = engine.save_kv(answered)

        assert saved.kv is not None
        assert saved.kv.length == len(answered)
        # the stores differ: it is handed over as it was read from this one
        read = store.get(handle)
        went_on = latent_engine.generate(reference.case.review, context=read, max_tokens=TOKENS, min_tokens=TOKENS)
        assert went_on.token_ids == reference.review.token_ids
        assert went_on.handoff.mode == "kv"


def test_what_is_loaded_is_what_it_goes_on_with_and_nobody_else_does(
    engine: VllmEngine, latent_engine: LatentEngine, store: TieredStore, references: list[Reference]
) -> None:
    """The control: keys of other latents under a thought's handle change the answer, but only of who loads them."""
    thought = latent_engine.think("Write down what matters about tides.", steps=STEPS)
    other = replaced_latents(thought, references[0].thought)
    honest, misleading = (_solve(latent_engine, TIDES, without_kv(each)).token_ids for each in (thought, other))
    claimed, kv = without_kv(thought), latent_engine.replay(other).kv
    assert kv is not None
    claimed.attach(kv=kv.to_host())
    handle = store.put(claimed)

    misled = _solve(engine, TIDES, engine.resolve(handle))

    assert misled.handoff.mode == "kv"
    assert misled.token_ids == misleading != honest
    assert _solve(engine, TIDES, without_kv(thought)).token_ids == honest
    assert _solve(engine, TIDES, engine.resolve(handle)).token_ids == misleading


def test_it_thinks_on_what_it_has_loaded(
    engine: VllmEngine, latent_engine: LatentEngine, store: TieredStore, references: list[Reference]
) -> None:
    reference = references[2]
    loaded = engine.resolve(store.put(reference.thought))

    further = engine.think("And what else?", context=loaded, steps=STEPS)

    assert further.handoff is not None
    assert further.handoff.mode == "kv"
    expected = latent_engine.think("And what else?", context=reference.thought, steps=STEPS)
    ours, theirs = (_solve(latent_engine, reference.case, without_kv(each)) for each in (further, expected))
    assert ours.token_ids == theirs.token_ids


def test_what_is_not_there_any_more_is_prefilled(
    engine: VllmEngine, latent_engine: LatentEngine, store: TieredStore
) -> None:
    """The caller still sees the keys; vLLM's own view of the store decides."""
    thought = latent_engine.think("Write down what matters about harbours.", steps=STEPS)
    loaded = store.get(store.put(thought))
    store.lower.drop_kv(loaded.to_handle())

    answer = _solve(engine, TIDES, loaded)

    assert answer.token_ids == _solve(latent_engine, TIDES, thought).token_ids
    assert answer.handoff.mode == "replay"


def test_keys_that_are_another_prompts_are_not_taken(
    engine: VllmEngine, latent_engine: LatentEngine, store: TieredStore, references: list[Reference]
) -> None:
    """A context whose latents are other ones than those that are stored under its handle."""
    thought = latent_engine.think("Write down what matters about islands.", steps=STEPS)
    stored = store.get(store.put(thought))
    claimed = replaced_latents(thought, references[0].thought)
    claimed.attach(kv=stored.kv, handle=stored.to_handle())

    answer = _solve(engine, TIDES, claimed)

    assert answer.token_ids == _solve(latent_engine, TIDES, without_kv(claimed)).token_ids
    assert answer.handoff.mode == "replay"


async def test_many_load_and_compute_at_once(
    engine: VllmEngine, store: TieredStore, references: list[Reference]
) -> None:
    handles = [store.put(each.thought, scope="many") for each in references]

    async def solved(index: int) -> tuple[int, ...]:
        reference = references[index % 3]
        loads = index % 2 == 0
        context = await engine.aresolve(handles[index % 3]) if loads else without_kv(reference.thought)
        answer = await engine.agenerate(reference.case.solve, context=context, max_tokens=8, min_tokens=8)
        return answer.token_ids

    answers = await asyncio.gather(*(solved(index) for index in range(12)))

    for index, answer in enumerate(answers):
        assert answer == references[index % 3].answer.token_ids[:8]


def test_only_stored_contexts_are_saved(engine: VllmEngine, references: list[Reference]) -> None:
    with pytest.raises(NotStoredError, match=r"store\.put"):
        engine.save_kv(without_kv(references[0].thought))


def test_what_is_in_the_store_already_is_not_computed_again(
    engine: VllmEngine, store: TieredStore, references: list[Reference]
) -> None:
    thought = engine.resolve(store.put(references[0].thought, scope="there"))

    saved = engine.save_kv(thought)

    assert isinstance(saved.kv, HostKv)
    assert review(engine, references[0].case, references[0].answer.context).token_ids == references[0].review.token_ids


def test_a_store_that_is_gone_costs_a_prefill(
    engine: VllmEngine, store: TieredStore, kv_store: str, references: list[Reference]
) -> None:
    """The last test of this module: nothing is left behind it."""
    reference = references[1]
    loaded = engine.resolve(store.put(reference.thought, scope="gone"))
    shutil.rmtree(kv_store.removeprefix("file://"))

    answer = _solve(engine, reference.case, loaded)

    assert answer.token_ids == reference.answer.token_ids
    assert answer.handoff.mode == "replay"
