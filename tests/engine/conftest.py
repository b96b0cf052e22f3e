"""What the engine's tests share: tiny models, their references, and engines that are closed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
from reference import Reference
from tiny_models import TinyModels

from avp_agents import LatentEngine, MemoryStore, Namespace

OpenEngine = Callable[..., LatentEngine]
POOL_BYTES = 8 * 2**20
TENANT = Namespace("engine-tests", b"k" * 32)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Tiny random models, saved as Hugging Face folders."""
    return TinyModels(tmp_path_factory.mktemp("tiny-models"))


@pytest.fixture(scope="session")
def tiny_reference(tiny: TinyModels) -> Callable[[str], Reference]:
    """The float32 reference of a tiny model; made once."""
    return cache(lambda name: Reference(tiny.path(name)))


@pytest.fixture
def open_engine() -> Iterator[OpenEngine]:
    """Opens float32 engines, each with a memory store of its own, and closes them after the test."""
    with ExitStack() as engines:
        yield engine_opener(engines)


@pytest.fixture(scope="module")
def open_module_engine() -> Iterator[OpenEngine]:
    """`open_engine` for engines that a module's tests share."""
    with ExitStack() as engines:
        yield engine_opener(engines)


def engine_opener(engines: ExitStack) -> OpenEngine:
    """Open engines that `engines` closes."""

    def open_engine(path: str, **options: Any) -> LatentEngine:
        settings = {"dtype": "float32", "device": "cpu", "kv_pool_bytes": POOL_BYTES} | options
        settings.setdefault("store", MemoryStore(namespace=TENANT))
        return engines.enter_context(LatentEngine.from_pretrained(path, **settings))

    return open_engine
