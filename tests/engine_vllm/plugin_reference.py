"""What `LatentEngine` and transformers say, and how a vLLM that can think is held against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from plugin_vllm import greedy, replay_prompt, tokens
from transformers import AutoModelForCausalLM
from vllm import LLM

from avp_agents import LatentEngine, MemoryStore, Namespace
from avp_agents.context import LatentSegment, Readout
from avp_agents.vllm.plugin.request import ReturnedThought, ThoughtRequest

STEPS, TOKENS = 20, 32
ASKED = ThoughtRequest(steps=STEPS)
TOLERANCE = 2e-3
"""Of latent embeddings, as a fraction of the largest value: twenty steps amplify rounding, 5e-6 after the first one."""


@dataclass(frozen=True)
class Expected:
    """What `LatentEngine` thinks about a prompt of token ids, and what transformers answer behind that thought.

    Attributes:
        others: ``[STEPS, hidden]``, embeddings that are no thought about it.
    """

    token_ids: tuple[int, ...]
    latents: torch.Tensor
    readout: Readout
    answer: list[int]
    others: torch.Tensor


def expectations(path: str | Path, prompts: Sequence[str], asked: ThoughtRequest = ASKED) -> list[Expected]:
    """By `LatentEngine` at batch 1, and transformers with a cache, both in float32."""
    store = MemoryStore(namespace=Namespace("plugin-tests", b"k" * 32))
    with LatentEngine.from_pretrained(
        str(path), dtype="float32", device="cpu", store=store, kv_pool_bytes=2**28
    ) as engine:
        contexts = [engine.think(prompt, steps=STEPS, method=asked.method) for prompt in prompts]
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    some = torch.randint(1000, (STEPS,), generator=torch.Generator().manual_seed(1))
    others = model.get_input_embeddings().weight[some].detach()
    found = []
    for context in contexts:
        latent, ids = context.lineage[-1], context.token_ids()
        assert isinstance(latent, LatentSegment)
        assert context.readout is not None
        answer = _answer(model, ids, latent.embeddings)
        found.append(Expected(ids, latent.embeddings, context.readout, answer, others))
    return found


@torch.inference_mode()
def _answer(model: Any, token_ids: tuple[int, ...], latents: torch.Tensor) -> list[int]:
    """`TOKENS` greedy tokens behind ids and latents."""
    prompt = torch.cat([model.get_input_embeddings()(torch.tensor(token_ids)), latents])[None]
    output = model(inputs_embeds=prompt, use_cache=True)
    found: list[int] = []
    while len(found) < TOKENS:
        found.append(int(output.logits[0, -1].argmax()))
        output = model(torch.tensor([found[-1:]]), past_key_values=output.past_key_values, use_cache=True)
    return found


def assert_same(thought: ReturnedThought, reference: Expected) -> None:
    """A thought and its readout are those of `LatentEngine`."""
    scale = float(reference.latents.abs().max())
    torch.testing.assert_close(thought.embeddings[0], reference.latents[0], atol=2e-5 * scale, rtol=0)
    torch.testing.assert_close(thought.embeddings, reference.latents, atol=TOLERANCE * scale, rtol=0)
    torch.testing.assert_close(thought.readout.probabilities, reference.readout.probabilities, atol=1e-3, rtol=0)
    assert thought.readout.token_ids[0] == reference.readout.token_ids[0]


def answers(llm: LLM, references: Sequence[Expected], latents: Sequence[torch.Tensor]) -> list[list[int]]:
    """What vLLM answers behind prompts with latents."""
    prompts = [replay_prompt(reference.token_ids, rows) for reference, rows in zip(references, latents, strict=True)]
    return [tokens(output) for output in llm.generate(prompts, greedy(TOKENS), use_tqdm=False)]
