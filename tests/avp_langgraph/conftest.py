"""What the LangGraph integration's tests share: an engine without weights, and the default model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine

from avp_agents import LatentEngine, MemoryStore, Namespace


@pytest.fixture
def engine() -> FakeEngine:
    """An engine without weights."""
    return FakeEngine()


@pytest.fixture(scope="session")
def real_engine(smollm2_path: Path) -> Iterator[LatentEngine]:
    """The embedded default model in float32."""
    store = MemoryStore(namespace=Namespace("langgraph-tests", b"k" * 32))
    options = {"dtype": "float32", "device": "cpu", "kv_pool_bytes": 512 * 2**20}
    with LatentEngine.from_pretrained(str(smollm2_path), store=store, **options) as engine:
        yield engine
