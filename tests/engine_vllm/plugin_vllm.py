"""vLLM with the plugin for latent steps, in this process, as its tests use it; and tiny models for it."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "engine"))

from tiny_models import Family, build_model, build_tokenizer

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: see docs/vllm.md")

from vllm import LLM, SamplingParams
from vllm.inputs import EmbedsPrompt, TokensPrompt
from vllm.outputs import RequestOutput

from avp_agents.vllm.plugin import register
from avp_agents.vllm.plugin.options import plugin_options
from avp_agents.vllm.plugin.request import ReturnedThought, ThoughtRequest, read_thought

BLOCK = 128
"""Positions in one of vLLM's KV blocks on a CPU."""


@contextmanager
def thinking_vllm(path: str | Path, **options: Any) -> Iterator[LLM]:
    """A float32 vLLM that can think; stopped at the end."""
    register()
    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8}
    settings |= {"num_gpu_blocks_override": 24}
    architecture = json.loads((Path(path) / "config.json").read_text())["architectures"][0]
    llm = LLM(str(path), **(settings | plugin_options(thinks_as=architecture) | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def think(llm: LLM, prompts: Sequence[Sequence[int]], asked: ThoughtRequest) -> list[ReturnedThought]:
    """Thoughts about prompts of token ids, all at once."""
    params = SamplingParams(**asked.sampling_options())
    outputs = llm.generate([TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts], params, use_tqdm=False)
    return [read_thought(output.kv_transfer_params) for output in outputs]


def replay_prompt(token_ids: Sequence[int], latents: torch.Tensor) -> EmbedsPrompt:
    """A prompt of token ids with latent embeddings ``[n, hidden]`` behind them."""
    embeddings = torch.zeros(len(token_ids) + len(latents), latents.shape[1], dtype=latents.dtype)
    embeddings[len(token_ids) :] = latents
    return EmbedsPrompt(
        prompt_embeds=embeddings,
        prompt_token_ids=[*token_ids, *[0] * len(latents)],
        prompt_is_token_ids=[True] * len(token_ids) + [False] * len(latents),
    )


def greedy(count: int) -> SamplingParams:
    """So many greedy tokens."""
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)


def tokens(output: RequestOutput) -> list[int]:
    """What was decoded."""
    return list(output.outputs[0].token_ids)


_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 16}

FAMILIES: dict[str, Family] = {
    "llama": ("llama", _SIZES),
    "llama-untied": ("llama", _SIZES | {"tie_word_embeddings": False}),
    "mistral": ("mistral", _SIZES | {"sliding_window": 16}),
    "qwen2": ("qwen2", _SIZES),
    "qwen3": ("qwen3", _SIZES | {"tie_word_embeddings": False}),
    "gemma": ("gemma", _SIZES),
    "gemma2": ("gemma2", _SIZES | _GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", _SIZES | _GEMMA | {"sliding_window_pattern": 2}),
}
"""What the plugin can run, with head sizes that vLLM's attention knows."""


def save_tiny_model(folder: Path, family: Family) -> Path:
    """A tiny random model, saved as a Hugging Face folder."""
    tokenizer = build_tokenizer()
    model = build_model(family, len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
