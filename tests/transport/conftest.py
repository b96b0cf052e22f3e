"""What the transport's tests share: one tiny engine, and one server for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "engine"))

from serving import serving
from tiny_models import TinyModels

from avp_agents import LatentEngine, MemoryStore, Namespace
from avp_agents.transport import RemoteEngine

OWN = Namespace("transport-tests", b"k" * 32)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Tiny random models, saved as Hugging Face folders."""
    return TinyModels(tmp_path_factory.mktemp("served-models"))


@pytest.fixture(scope="session")
def engine(models: TinyModels) -> Iterator[LatentEngine]:
    """The engine that is served."""
    with open_engine(models.path("llama")) as engine:
        yield engine


@pytest.fixture(scope="session")
def url(engine: LatentEngine) -> Iterator[str]:
    """A server with tokens for the namespaces ``one`` and ``two``."""
    with serving(engine) as url:
        yield url


@pytest.fixture
def remote(url: str) -> Iterator[RemoteEngine]:
    """The served engine, as the namespace ``one`` sees it."""
    with RemoteEngine(url, token="token-of-one", seconds=60) as remote:
        yield remote


def open_engine(folder: str) -> LatentEngine:
    """A float32 engine with a small pool and a memory store."""
    store = MemoryStore(namespace=OWN)
    return LatentEngine.from_pretrained(folder, dtype="float32", device="cpu", kv_pool_bytes=8 << 20, store=store)
