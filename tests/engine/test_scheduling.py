"""Many callers, one model: batching, fairness, cancellation, limits, and memory that comes back. On a tiny model."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from reference import Reference, before_answer
from tiny_models import MAX_POSITIONS, TinyModels

from avp_agents import Context, Generation, LatentEngine
from avp_agents.errors import (
    EngineBusyError,
    EngineClosedError,
    KvMemoryError,
    RequestTimeoutError,
)

CALLERS = 64
TOKENS = 12
PROMPTS = [f"What is the sum of {n} and {2 * n + 1}?" for n in range(CALLERS)]
POSITION_BYTES = 3 * 2 * 2 * 8 * 4
"""Layers, keys and values, heads, elements and bytes of one position of the tiny Llama."""
LONG = MAX_POSITIONS - 100
"""Tokens of an answer that nobody waits for."""


@pytest.fixture(scope="module")
def path(tiny: TinyModels) -> str:
    return tiny.path("llama")


@pytest.fixture(scope="module")
def engine(path: str, open_module_engine: Callable[..., LatentEngine]) -> LatentEngine:
    return open_module_engine(path, max_queue=2 * CALLERS)


@pytest.fixture(scope="module")
def alone(path: str, tiny_reference: Callable[[str], Reference]) -> list[tuple[int, ...]]:
    """What each prompt's answer is when nobody else asks."""
    reference = tiny_reference("llama")
    return [reference.generate(reference.render(prompt), TOKENS).token_ids for prompt in PROMPTS]


@pytest.fixture
def memory_returns(engine: LatentEngine) -> Iterator[None]:
    """Positions in use, and requests in the engine, are after the test what they were before."""
    before = settled(engine)
    yield
    assert settled(engine) == before
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)


def settled(engine: LatentEngine) -> int:
    """Positions in use once the scheduler has put the last request away and dropped contexts are collected."""
    deadline = time.monotonic() + 10
    while engine.stats().running or engine.stats().waiting:
        assert time.monotonic() < deadline, f"requests never end: {engine.stats()}"
        time.sleep(0.01)
    gc.collect()
    return engine.stats().kv_positions_used


@pytest.mark.usefixtures("memory_returns")
def test_64_threads_half_of_which_give_up(engine: LatentEngine, alone: list[tuple[int, ...]]) -> None:
    """Every other caller closes its stream in the middle; the rest get the answer they would get alone."""
    together = threading.Barrier(CALLERS)

    def ask(caller: int) -> tuple[int, ...] | None:
        together.wait()
        if caller % 2:
            stream: Any = engine.stream(PROMPTS[caller], max_tokens=LONG, min_tokens=LONG, timeout=30)
            next(stream)
            stream.close()
            return None
        return engine.generate(PROMPTS[caller], max_tokens=TOKENS, timeout=30).token_ids

    with ThreadPoolExecutor(CALLERS) as pool:
        answers = list(pool.map(ask, range(CALLERS)))

    assert answers == [None if caller % 2 else alone[caller] for caller in range(CALLERS)]


@pytest.mark.usefixtures("memory_returns")
async def test_64_tasks_half_of_which_are_cancelled(engine: LatentEngine, alone: list[tuple[int, ...]]) -> None:
    """Cancelling a task frees its sequence; the other tasks get the answer they would get alone."""
    given_up = [
        asyncio.create_task(engine.agenerate(prompt, max_tokens=LONG, min_tokens=LONG)) for prompt in PROMPTS[1::2]
    ]
    kept = [asyncio.create_task(engine.agenerate(prompt, max_tokens=TOKENS)) for prompt in PROMPTS[::2]]
    await asyncio.sleep(0.1)
    for task in given_up:
        task.cancel()

    cancelled = await asyncio.gather(*given_up, return_exceptions=True)
    answers = await asyncio.gather(*kept)

    assert all(isinstance(result, asyncio.CancelledError) for result in cancelled)
    assert [answer.token_ids for answer in answers] == alone[::2]


@pytest.mark.usefixtures("memory_returns")
async def test_leaving_an_asynchronous_stream_frees_its_sequence(engine: LatentEngine) -> None:
    """`aclose` (what leaving an `async for` under `aclosing` does) ends the request."""
    stream = engine.astream(PROMPTS[0], max_tokens=LONG, min_tokens=LONG)
    received = [await anext(stream) for _ in range(3)]
    await stream.aclose()

    assert all(chunk.generation is None for chunk in received)


@pytest.mark.usefixtures("memory_returns")
def test_a_stream_nobody_holds_any_more_ends(engine: LatentEngine) -> None:
    """A caller that drops its stream without closing it does not leave a sequence running."""
    stream = engine.stream(PROMPTS[0], max_tokens=LONG, min_tokens=LONG)
    next(stream)
    del stream


@pytest.mark.usefixtures("memory_returns")
def test_a_stream_says_what_generate_says(engine: LatentEngine) -> None:
    """The chunks' ids and texts add up to the `Generation` that the last chunk carries."""
    chunks = list(engine.stream(PROMPTS[0], max_tokens=TOKENS))
    whole = engine.generate(PROMPTS[0], max_tokens=TOKENS)

    last = chunks[-1].generation
    assert last is not None
    assert all(chunk.generation is None for chunk in chunks[:-1])
    assert "".join(chunk.text for chunk in chunks) == last.text == whole.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == last.token_ids == whole.token_ids


@pytest.mark.usefixtures("memory_returns")
def test_memory_returns_when_contexts_are_dropped(engine: LatentEngine) -> None:
    """A context holds its positions while somebody holds it, and a child shares its parent's."""
    before = settled(engine)
    context = engine.think(PROMPTS[0], steps=3)
    held = settled(engine) - before
    child = engine.generate("Why?", context=context, max_tokens=4).context
    both = settled(engine) - before

    assert held >= len(context)
    assert both < held + len(child)
    del context, child
    assert settled(engine) == before


@pytest.mark.usefixtures("memory_returns")
def test_a_timeout_ends_a_request(engine: LatentEngine) -> None:
    """`timeout` counts from submission; what was decoded until then is given up."""
    started = time.monotonic()
    with pytest.raises(RequestTimeoutError):
        engine.generate(PROMPTS[0], max_tokens=LONG, min_tokens=LONG, timeout=0.05)

    assert time.monotonic() - started < 5


@pytest.mark.usefixtures("memory_returns")
def test_a_sampled_answer_depends_on_its_seed_only(engine: LatentEngine) -> None:
    """A request's random stream is its own: the same in company as alone; another seed says something else."""
    options = {"temperature": 1.0, "max_tokens": TOKENS}

    def ask(seed: int) -> tuple[int, ...]:
        return engine.generate(PROMPTS[0], seed=seed, timeout=30, **options).token_ids

    separately = [ask(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(8)))

    assert together == separately
    assert len(set(separately)) > 1


def test_a_full_queue_says_so(path: str, open_engine: Callable[..., LatentEngine]) -> None:
    """More requests than `max_queue` are refused at once, those already waiting are served."""
    engine = open_engine(path, max_queue=2, max_batch=1)

    async def flood() -> list[object]:
        requests = (engine.agenerate(prompt, max_tokens=40, min_tokens=40) for prompt in PROMPTS[:20])
        return await asyncio.gather(*requests, return_exceptions=True)

    results = asyncio.run(flood())

    refused = [result for result in results if isinstance(result, EngineBusyError)]
    served = [result for result in results if not isinstance(result, BaseException)]
    assert len(refused) + len(served) == 20
    assert len(served) >= 2
    assert len(refused) >= 15
    assert "max_queue" in str(refused[0])


def test_admission_is_fair_between_sources(path: str, open_engine: Callable[..., LatentEngine]) -> None:
    """One caller's 30 requests do not stand in front of another caller's first one."""
    engine = open_engine(path, max_batch=1)
    finished: list[str] = []

    async def ask(source: str) -> None:
        await engine.agenerate(PROMPTS[0], max_tokens=8, min_tokens=8, source=source)
        finished.append(source)

    async def crowd() -> None:
        many = [asyncio.create_task(ask("many")) for _ in range(30)]
        await asyncio.sleep(0)
        await asyncio.gather(ask("one"), *many)

    asyncio.run(crowd())

    assert finished.index("one") < 6


def test_a_request_larger_than_the_pool_is_refused(path: str, open_engine: Callable[..., LatentEngine]) -> None:
    """What cannot fit even in an empty pool fails at once and says what to raise; what fits is served."""
    engine = open_engine(path, kv_pool_bytes=100 * POSITION_BYTES)

    with pytest.raises(KvMemoryError, match="kv_pool_bytes"):
        engine.generate("the quick brown fox " * 20, max_tokens=50)

    assert engine.generate("Why?", max_tokens=20, min_tokens=20).usage.completion_tokens == 20


def test_requests_wait_for_memory(
    path: str, open_engine: Callable[..., LatentEngine], alone: list[tuple[int, ...]]
) -> None:
    """Where the pool holds two requests at a time, eight take turns."""
    engine = open_engine(path, kv_pool_bytes=150 * POSITION_BYTES)

    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda prompt: engine.generate(prompt, max_tokens=TOKENS, timeout=30).token_ids, PROMPTS[:8])
        )

    assert answers == alone[:8]


def test_a_fork_that_does_not_fit_beside_its_parent_is_still_answered(
    path: str, open_engine: Callable[..., LatentEngine], tiny_reference: Callable[[str], Reference]
) -> None:
    """Where the pool is too small for a parent and its second child at once, the parent's memory gives way."""
    engine = open_engine(path, kv_pool_bytes=100 * POSITION_BYTES)
    context = engine.think("the quick brown fox " * 8, steps=4)
    assert 50 < len(context) < 70

    answers = [engine.generate("Why?", context=context, max_tokens=8, timeout=20) for _ in range(3)]

    expected = tiny_reference("llama").generate(before_answer(answers[0]), 8).token_ids
    assert [answer.token_ids for answer in answers] == [expected] * 3


def test_an_evicted_kv_cache_comes_back_from_the_store(path: str, open_engine: Callable[..., LatentEngine]) -> None:
    """A stored context that had to leave the pool is uploaded again instead of replayed, with the same answer."""
    engine = open_engine(path, kv_pool_bytes=150 * POSITION_BYTES)
    context = engine.think(PROMPTS[0], steps=3)
    first = engine.generate("Why?", context=context, max_tokens=6).token_ids
    handle = engine.store.put(context, kv=False)

    engine.generate("Why?", max_tokens=120)
    assert context.kv is None
    wait_until(lambda: engine.store.get(handle).kv is not None)
    again = engine.generate("Why?", context=context, max_tokens=6)

    assert again.token_ids == first
    assert again.handoff.mode == "kv"
    assert again.handoff.bytes >= len(context) * POSITION_BYTES


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_storm_of_forks_in_a_small_pool(
    path: str, open_engine: Callable[..., LatentEngine], tiny_reference: Callable[[str], Reference]
) -> None:
    """Threads think and answer on each other's contexts while most of these do not fit: every answer is exact."""
    engine = open_engine(path, kv_pool_bytes=400 * POSITION_BYTES)
    contexts: deque[Context] = deque([engine.think(prompt, steps=2) for prompt in PROMPTS[:4]], maxlen=8)

    def caller(number: int) -> list[Generation]:
        choice, answers = random.Random(number), []
        for _ in range(5):
            base, prompt = choice.choice([None, *contexts]), choice.choice(PROMPTS)
            base = base if base is not None and len(base) < 120 else None
            if choice.random() < 0.4:
                contexts.append(engine.think(prompt, context=base, steps=choice.randrange(4), timeout=30))
            else:
                answers.append(engine.generate(prompt, context=base, max_tokens=choice.randrange(1, 6), timeout=30))
                contexts.append(answers[-1].context)
        return answers

    with ThreadPoolExecutor(12) as pool:
        answers = [answer for answers in pool.map(caller, range(12)) for answer in answers]

    modes = Counter(answer.handoff.mode for answer in answers)
    print(f"{len(answers)} answers; handoffs: {dict(modes)}")
    assert modes["replay"] > 0
    for answer in answers:
        expected = tiny_reference("llama").generate(before_answer(answer), len(answer.token_ids))
        assert answer.token_ids == expected.token_ids


def test_closing_ends_what_runs_and_what_comes(path: str, open_engine: Callable[..., LatentEngine]) -> None:
    """Running requests end with `EngineClosedError`, and so does every later one; closing twice does no harm."""
    engine = open_engine(path)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine.generate, PROMPTS[0], max_tokens=LONG, min_tokens=LONG)
        while not engine.stats().running:
            time.sleep(0.005)
        engine.close()
        with pytest.raises(EngineClosedError):
            running.result(timeout=10)

    with pytest.raises(EngineClosedError):
        engine.generate(PROMPTS[0], max_tokens=1)
    engine.close()


def test_a_context_outlives_its_engine(path: str, open_engine: Callable[..., LatentEngine]) -> None:
    """When an engine closes, its contexts keep their lineage, and another engine goes on with them."""
    first = open_engine(path)
    context = first.think(PROMPTS[0], steps=3)
    expected = first.generate("Why?", context=context, max_tokens=8).token_ids
    first.close()

    answer = open_engine(path).generate("Why?", context=context, max_tokens=8)

    assert answer.token_ids == expected
    assert answer.handoff.mode == "replay"


def test_a_fork_of_the_process_does_not_use_the_parent_s_engine(engine: LatentEngine) -> None:
    """The scheduler's thread does not exist in a forked child: it is told so at once, and the parent goes on."""
    engine.generate("Why?", max_tokens=2)
    child = os.fork()
    if child == 0:
        try:
            engine.generate("Why?", max_tokens=2)
        except EngineClosedError:
            os._exit(0)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        assert time.monotonic() < deadline, "the child hangs"
        time.sleep(0.02)

    assert os.waitstatus_to_exitcode(ended[1]) == 0
    assert engine.generate("Why?", max_tokens=2).usage.completion_tokens == 2


def test_one_context_is_used_by_many_at_once(engine: LatentEngine, tiny_reference: Callable[[str], Reference]) -> None:
    """Sixteen consumers of one context at the same time get what each gets alone."""
    reference = tiny_reference("llama")
    context = engine.think(PROMPTS[0], steps=3)
    questions = PROMPTS[1:17]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda q: engine.generate(q, context=context, max_tokens=6, timeout=30), questions))

    for answer in answers:
        assert answer.token_ids == reference.generate(before_answer(answer), 6).token_ids
