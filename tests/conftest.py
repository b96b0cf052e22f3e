"""What all tests share: a quiet environment, folders of their own, and the default model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# torch.compile imports setuptools in an engine's thread, and setuptools replaces distutils for all: better once, here
import setuptools  # noqa: F401
from platformdirs import user_cache_path

from avp_agents.models import default_model

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # worker processes share the cores; two that compute with all of them slow each other down many times over
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["LANGSMITH_TRACING"] = "false"


@pytest.fixture(scope="session", autouse=True)
def _folders_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Stores and keys of tests lie in a temporary folder; only fetched models are shared with the user."""
    models = user_cache_path("avp-agents", appauthor=False) / "models"
    models.mkdir(parents=True, exist_ok=True)
    home = tmp_path_factory.mktemp("home")
    (home / "cache" / "avp-agents").mkdir(parents=True, mode=0o700)
    (home / "cache" / "avp-agents" / "models").symlink_to(models)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(home / "config"))
        patch.delenv("AVP_STORE_KEY", raising=False)
        yield


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched once per user."""
    return default_model()


@pytest.fixture(scope="session")
def qwen_path() -> Path:
    """The folder of Qwen2.5-Coder-0.5B-Instruct: another family, whose head is untied, and which can choose tools."""
    folder = os.environ.get("AVP_TEST_QWEN")
    if not folder or not Path(folder, "config.json").is_file():
        pytest.skip(
            "set AVP_TEST_QWEN to a folder with Qwen2.5-Coder-0.5B-Instruct "
            "(hf download Qwen/Qwen2.5-Coder-0.5B-Instruct --local-dir FOLDER)"
        )
    return Path(folder)
