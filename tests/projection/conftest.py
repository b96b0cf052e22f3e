"""What the projection's tests share: the prompt tests' tokenizers, and engines of other weights in one process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from engines_of_two_models import Engines

from avp_agents import LatentEngine, MemoryStore, Namespace

sys.path.append(str(Path(__file__).parent.parent / "engine"))


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Tiny random models with one tokenizer; all are loaded."""
    from tiny_models import TinyModels

    tiny = TinyModels(tmp_path_factory.mktemp("tiny-models"))
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_pool_bytes": 8 * 2**20}
    options["store"] = MemoryStore(namespace=Namespace("projection-tests", b"k" * 32))
    llama, qwen = tiny.path("llama"), tiny.path("qwen2", seed=1)
    variants: tuple[tuple[str, dict[str, Any]], ...] = (
        (llama, {}),
        (qwen, {}),
        (qwen, {"project_vectors": True}),
        (llama, {"dtype": "bfloat16"}),
    )
    with ExitStack() as opened:
        made = [opened.enter_context(LatentEngine.from_pretrained(path, **options | own)) for path, own in variants]
        for engine in made:
            engine.load()
        yield Engines(*made)
