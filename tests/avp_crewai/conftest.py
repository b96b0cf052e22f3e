"""What the CrewAI integration's tests share: a quiet CrewAI, one engine of the default model, and what crews did."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

# CrewAI reads these when it is imported
os.environ["CREWAI_DISABLE_TELEMETRY"] = "true"
os.environ["CREWAI_TRACING_ENABLED"] = "false"
os.environ["CREWAI_DISABLE_VERSION_CHECK"] = "true"

from crewai.events import crewai_event_bus
from crewai.events.types.llm_events import (
    LLMCallCompletedEvent,
    LLMCallFailedEvent,
    LLMCallStartedEvent,
    LLMStreamChunkEvent,
)
from llm_events import Events
from scripted_crew_engine import ScriptedEngine

from avp_agents import LatentEngine, MemoryStore, Namespace
from avp_agents.store import default_store


@pytest.fixture(scope="session", autouse=True)
def _storage_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CREWAI_STORAGE_DIR", str(tmp_path_factory.mktemp("crewai")))
        yield


@pytest.fixture(scope="session")
def default_model_engine(smollm2_path: Path) -> Iterator[LatentEngine]:
    options = {"dtype": "float32", "device": "cpu", "kv_pool_bytes": 512 * 2**20}
    with LatentEngine.from_pretrained(str(smollm2_path), store=default_store(), **options) as engine:
        yield engine


@pytest.fixture(scope="session")
def random_model_engine(smollm2_path: Path) -> Iterator[LatentEngine]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    store = MemoryStore(namespace=Namespace("random", b"k" * 32))
    model = LlamaForCausalLM(config)
    with LatentEngine.from_model(model, tokenizer, store=store, kv_pool_bytes=64 * 2**20) as engine:
        yield engine


@pytest.fixture
def engine(default_model_engine: LatentEngine) -> Iterator[LatentEngine]:
    """The embedded default model in float32, with an empty store."""
    yield from _emptied(default_model_engine)


@pytest.fixture
def random_engine(random_model_engine: LatentEngine) -> Iterator[LatentEngine]:
    """A tiny model that talks nonsense with the default model's tokenizer, for tests that put words into its mouth."""
    yield from _emptied(random_model_engine)


def _emptied(engine: LatentEngine) -> Iterator[LatentEngine]:
    yield engine
    for handle in engine.store.list():
        engine.store.delete(handle)


@pytest.fixture
def watched(engine: LatentEngine) -> ScriptedEngine:
    """The default model, watched, and with words put into its mouth."""
    return ScriptedEngine(engine)


@pytest.fixture
def scripted(random_engine: LatentEngine) -> ScriptedEngine:
    """The tiny model, watched, and with words put into its mouth."""
    return ScriptedEngine(random_engine)


@pytest.fixture
def events() -> Iterator[Events]:
    seen = Events()
    kinds = (LLMCallStartedEvent, LLMCallCompletedEvent, LLMCallFailedEvent, LLMStreamChunkEvent)
    with crewai_event_bus.scoped_handlers():
        for kind in kinds:
            crewai_event_bus.on(kind)(lambda source, event: seen.all.append(event))
        yield seen
        crewai_event_bus.flush()
