"""Latent steps inside vLLM are those of `LatentEngine`, for every family that the plugin names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plugin_vllm import FAMILIES, build_tokenizer, save_tiny_model, think, thinking_vllm

from avp_agents import LatentEngine, MemoryStore, Namespace
from avp_agents.context import LatentSegment
from avp_agents.vllm.plugin.request import ThoughtRequest

PROMPT = "the quick brown fox jumps over the lazy dog and then it rests under the old tree"


@pytest.mark.parametrize("name", FAMILIES)
def test_thoughts_are_those_of_the_latent_engine(name: str, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / name, FAMILIES[name])
    store = MemoryStore(namespace=Namespace("plugin-tests", b"k" * 32))
    with LatentEngine.from_pretrained(str(path), dtype="float32", device="cpu", store=store) as engine:
        context = engine.think(PROMPT, steps=3)
    latent, readout = context.lineage[-1], context.readout
    assert isinstance(latent, LatentSegment)
    assert readout is not None

    with thinking_vllm(path) as llm:
        [thought] = think(llm, [context.token_ids()], ThoughtRequest(steps=3))

    assert thought.recipe == latent.recipe
    assert thought.recipe.method == ("ridge" if name in ("llama-untied", "qwen3") else "soft")
    torch.testing.assert_close(thought.embeddings, latent.embeddings, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(thought.readout.hidden, readout.hidden, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(thought.readout.probabilities, readout.probabilities, atol=1e-4, rtol=1e-3)
    assert thought.readout.token_ids[0] == readout.token_ids[0]


@pytest.mark.parametrize("name", ["llama", "llama-untied"])
def test_tensor_parallel_ranks_think_the_same(name: str, tmp_path: Path) -> None:
    """Each rank has half of the vocabulary's rows; soft embeddings and the ridge map need all of them."""
    path = save_tiny_model(tmp_path / name, FAMILIES[name])
    prompt = build_tokenizer().encode(PROMPT)
    asked = ThoughtRequest(steps=3, stop_entropy=0.0)
    with thinking_vllm(path) as llm:
        [alone] = think(llm, [prompt], asked)
    with thinking_vllm(path, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        [shared] = think(llm, [prompt], asked)

    torch.testing.assert_close(shared.embeddings, alone.embeddings, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shared.readout.probabilities, alone.readout.probabilities, atol=1e-4, rtol=1e-3)
