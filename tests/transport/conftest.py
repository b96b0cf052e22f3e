"""What the transport's tests share: one tiny engine, and one server for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "engine"))

from serving import open_engine, serving
from tiny_models import TinyModels

from avp_agents import LatentEngine
from avp_agents.transport import RemoteEngine


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


@pytest.fixture(scope="session")
def same(models: TinyModels) -> Iterator[LatentEngine]:
    """The served model, in an engine of this process."""
    with open_engine(models.path("llama"), "same-model-here") as engine:
        yield engine


@pytest.fixture(scope="session")
def other(models: TinyModels) -> Iterator[LatentEngine]:
    """Another model."""
    with open_engine(models.path("qwen2", seed=1), "other-model-here") as engine:
        yield engine
