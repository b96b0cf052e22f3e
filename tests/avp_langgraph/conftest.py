"""What the LangGraph integration's tests share: an engine without weights, and the default model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_engine import FakeEngine

from avp_agents import LatentEngine, MemoryStore, Namespace


@pytest.fixture
def engine() -> FakeEngine:
    """An engine without weights."""
    return FakeEngine()


@pytest.fixture(scope="session")
def real_engine() -> Iterator[LatentEngine]:
    """The embedded default model in float32."""
    store = MemoryStore(namespace=Namespace("langgraph-tests", b"k" * 32))
    with LatentEngine.from_pretrained(dtype="float32", device="cpu", store=store, kv_pool_bytes=512 * 2**20) as engine:
        yield engine
