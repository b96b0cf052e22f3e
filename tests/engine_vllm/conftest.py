"""What the vLLM engine's tests share: contexts without any weights, and what a `LatentEngine` makes of some cases."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_cases import CASES, FINGERPRINT, OTHER, STEPS, Case, Reference, review, solve, thought_behind

from avp_agents import Context, LatentEngine, MemoryStore, Namespace
from avp_agents.vllm.served_model import ModelSettings, ServedModel

os.environ |= {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@pytest.fixture(scope="session")
def served_model(smollm2_path: Path) -> ServedModel:
    """SmolLM2, of which only tokenizer and configuration are looked at."""
    return ServedModel(ModelSettings(str(smollm2_path), {}, FINGERPRINT))


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(namespace=Namespace("vllm-tests", b"k" * 32))


@pytest.fixture(scope="module")
def kv_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a store that vLLM and its callers share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AVP_STORE_KEY", "11" * 32)
        yield f"file://{tmp_path_factory.mktemp('contexts')}"


@pytest.fixture(scope="session")
def thought(served_model: ServedModel) -> Context:
    """A prompt with three latent steps behind it."""
    prompt = served_model.renderer.plan("How far is the moon?").token_ids
    return thought_behind(prompt)


@pytest.fixture(scope="session")
def latent_engine(smollm2_path: Path) -> Iterator[LatentEngine]:
    """SmolLM2 in float32."""
    store = MemoryStore(namespace=Namespace("vllm-tests", b"k" * 32))
    options = {"dtype": "float32", "device": "cpu", "kv_pool_bytes": 2**27}
    with LatentEngine.from_pretrained(str(smollm2_path), store=store, **options) as engine:
        yield engine


@pytest.fixture(scope="session")
def references(latent_engine: LatentEngine) -> list[Reference]:
    """What vLLM has to come to, for a short prompt and two that are longer than one of its KV blocks."""
    elsewhere = latent_engine.think(OTHER.research, steps=STEPS)

    def made(case: Case) -> Reference:
        thought = latent_engine.think(case.research, steps=STEPS)
        other = Context(thought.fingerprint, thought.dtype, (*thought.lineage[:-1], elsewhere.lineage[-1]))
        answer = solve(latent_engine, case, thought)
        return Reference(
            case, thought, answer, review(latent_engine, case, answer.context), solve(latent_engine, case, other), other
        )

    return [made(CASES[index]) for index in (0, 2, 5)]
