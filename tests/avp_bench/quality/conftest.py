"""What the quality bench's tests share: the default model, and two tiny ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from short_task import SHORT, random_engine

from avp_agents import LatentEngine
from avp_agents.store import MemoryStore
from avp_bench.quality.answering import Bench


@pytest.fixture(scope="session")
def smol_bench(smollm2_path: Path) -> Iterator[Bench]:
    store = MemoryStore()
    with LatentEngine.from_pretrained(str(smollm2_path), dtype="float32", store=store, batch_invariant=True) as engine:
        yield Bench(engine, SHORT)


@pytest.fixture(scope="session")
def tiny_bench(smollm2_path: Path) -> Iterator[Bench]:
    """Two models."""
    with random_engine(smollm2_path, seed=0) as engine, random_engine(smollm2_path, seed=1) as source:
        yield Bench(engine, SHORT, source=source)
