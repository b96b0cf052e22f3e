"""LangChain's standard integration tests, as they run on a LatentEngine, on AvpChatModel(engine=VllmEngine(...))."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: see docs/vllm.md")
pytest.importorskip("langchain_tests", reason="needs langchain-tests")

sys.path.append(str(Path(__file__).parents[1] / "standard"))

import test_chat_model_integration as standard
from langchain_core.messages import AIMessage, HumanMessage

from avp_agents import MemoryStore, Namespace
from avp_agents.vllm import VllmEngine
from avp_langgraph import AvpChatModel

LONG_QUESTION = HumanMessage(" ".join(f"Spider {n} has eight legs." for n in range(1, 25)) + " How many are that?")
"""Of more positions than one of vLLM's KV blocks, which is what its prefix cache keeps."""


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Iterator[VllmEngine]:
    with _open(smollm2_path, "float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def qwen(qwen_path: Path) -> Iterator[VllmEngine]:
    with _open(qwen_path, "bfloat16") as engine:
        yield engine


def _open(path: Path, dtype: str) -> VllmEngine:
    store = MemoryStore(namespace=Namespace("standard-tests", b"k" * 32))
    options: dict[str, Any] = {"enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 4}
    return VllmEngine.from_pretrained(str(path), dtype=dtype, latent_steps=True, store=store, **options)


class TestAvpChatModelOnVllm(standard.TestAvpChatModelIntegration):
    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        """The second turn of a conversation that is long enough for vLLM's prefix cache."""
        model = AvpChatModel(**self.chat_model_params)
        turns = [LONG_QUESTION, model.invoke([LONG_QUESTION]), HumanMessage("And without spider 3?")]
        answer = standard.answer_of(model, turns, stream=stream)
        assert answer.usage_metadata is not None
        assert answer.usage_metadata.get("input_token_details", {}).get("cache_read", 0) > 0
        return answer
