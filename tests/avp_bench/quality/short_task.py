"""A task of few words and a model of no weight, for tests that are about the plumbing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from avp_agents import LatentEngine
from avp_agents.store import MemoryStore
from avp_bench.quality.answering import Bench
from avp_bench.quality.answers import mentions
from avp_bench.quality.arms import Arm
from avp_bench.quality.run import run
from avp_bench.quality.run_folder import Plan, RunFolder
from avp_bench.quality.tasks import Item, Task
from avp_bench.sandbox import sandboxed

SHORT = Task(
    "short", "Answer with one word.", 4, 6, False, None, lambda index, row: Item(str(index), row["q"], row),
    lambda item, answer, run: mentions(answer, item.reference["answers"]), "",
)  # fmt: skip


def items(count: int) -> list[Item]:
    """Sums."""
    return [SHORT.item(i, {"q": f"What is {i} plus {i}?", "answers": [str(2 * i)]}) for i in range(count)]


def random_engine(tokenizer_path: Path, seed: int) -> LatentEngine:
    """A tiny model that talks nonsense; another seed makes another model."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    store = MemoryStore()
    return LatentEngine.from_model(model, tokenizer, store=store, batch_invariant=True, kv_pool_bytes=16 * 2**20)


def go(
    bench: Bench,
    folder: Path,
    arms: list[Arm],
    count: int = 3,
    seeds: tuple[int, ...] = (0,),
    report: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """A run."""
    plan = Plan(arms, items(count), seeds, {"task": "short", "model": "tiny"})
    run(bench, plan, RunFolder(folder, plan), run_program=sandboxed, concurrency=4, report=report)
