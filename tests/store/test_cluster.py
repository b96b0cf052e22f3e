"""Agents in several processes over one Redis: what is left when a process, a KV-cache or the Redis itself goes away."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from langchain_core.messages import HumanMessage
from servers import Server, redis_server

from avp_agents import LatentEngine
from avp_agents.store import MemoryStore, Namespace, RedisStore, TieredStore

WORKER = Path(__file__).parents[2] / "recipes" / "cluster" / "worker.py"
KEY = "ab" * 32
QUESTION = HumanMessage("A shop sells pens at 3 dollars each. How much do 14 pens cost?")
TIMEOUT, STEPS, TOKENS = 1.0, 3, 4


@pytest.fixture(scope="module")
def recipe() -> SimpleNamespace:
    """The recipe's names; nothing runs."""
    return SimpleNamespace(**runpy.run_path(str(WORKER)))


@pytest.fixture(scope="module")
def engine(smollm2_path: Path) -> Iterator[LatentEngine]:
    """One model for this module; tests ask it with stores of their own."""
    store = MemoryStore(namespace=Namespace("unused", b"u" * 32))
    with LatentEngine.from_pretrained(
        str(smollm2_path), store=store, dtype="float32", device="cpu", kv_pool_bytes=2**27
    ) as engine:
        yield engine


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("AVP_STORE_KEY", KEY)
    with redis_server(tmp_path) as server:
        monkeypatch.setenv("AVP_STORE_URL", f"redis://127.0.0.1:{server.port}/0")
        yield server


def worker_engine(engine: LatentEngine) -> LatentEngine:
    """The engine as another worker would have it: its own memory, over the Redis that all share."""
    lower = RedisStore(os.environ["AVP_STORE_URL"], timeout=TIMEOUT)
    return engine.for_store(TieredStore(MemoryStore(), lower))


def invoke(graph: Any, messages: list[Any]) -> list[Any]:
    return graph.invoke({"messages": messages}, {"configurable": {"thread_id": "a"}})["messages"]


def handoff_of(message: Any) -> dict[str, Any]:
    return message.response_metadata["avp"]


def test_the_solver_replays_what_a_process_thought_that_is_gone(
    server: Server, recipe: SimpleNamespace, engine: LatentEngine, smollm2_path: Path
) -> None:
    queue = redis.Redis.from_url(os.environ["AVP_STORE_URL"], decode_responses=True)
    recipe.push(queue, "research", "a", [QUESTION])
    environment = os.environ | {"AVP_MODEL": str(smollm2_path), "AVP_DTYPE": "float32"}
    subprocess.run([sys.executable, WORKER, "research", "--jobs", "1"], env=environment, check=True, timeout=120)
    assert list(queue.scan_iter("*payload*")) == [], "the KV-cache went with the process"

    recipe.work("solve", recipe.build_graph("solve", worker_engine(engine), max_tokens=TOKENS), queue)

    thread, [question, thought, answer] = recipe.pop(queue, "answered:a")
    assert (thread, question.text, answer.text != "") == ("a", QUESTION.text, True)
    assert handoff_of(thought)["latent_steps"] == 20
    assert handoff_of(answer)["mode"] == "replay"
    assert "KV" in handoff_of(answer)["reason"]


def test_a_redis_that_goes_away_mid_run_costs_no_answer(
    server: Server, recipe: SimpleNamespace, engine: LatentEngine
) -> None:
    researcher, elsewhere = worker_engine(engine), worker_engine(engine)
    messages = invoke(recipe.build_graph("research", researcher, latent_steps=STEPS), [QUESTION])
    server.kill()

    *_, here = invoke(recipe.build_graph("solve", researcher, max_tokens=TOKENS), messages)
    *_, there = invoke(recipe.build_graph("solve", elsewhere, max_tokens=TOKENS), messages)

    assert handoff_of(here)["mode"] == "kv", "what is in memory needs no Redis"
    assert handoff_of(there)["mode"] == "rethink", "what is not is thought again"
    assert "cannot be used" in handoff_of(there)["reason"] or "did not answer" in handoff_of(there)["reason"]

    *_, text = invoke(
        recipe.build_graph("solve", worker_engine(engine), max_tokens=TOKENS), [QUESTION, here, HumanMessage("And 15?")]
    )
    assert handoff_of(text)["mode"] == "text", "of an answer, the text is read"


def test_a_redis_that_answers_nothing_any_more_is_waited_for_once(
    server: Server, recipe: SimpleNamespace, engine: LatentEngine
) -> None:
    researcher = worker_engine(engine)
    messages = invoke(recipe.build_graph("research", researcher, latent_steps=STEPS), [QUESTION])
    server.freeze()
    store = researcher.store

    asked = time.monotonic()
    for message in messages[1:] * 5:
        assert store.get(message.response_metadata["avp_context"], scope=None) is not None
    assert time.monotonic() - asked < TIMEOUT + 1
