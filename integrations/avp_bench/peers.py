"""What the engine is measured against: transformers' own generation loops, in a process of their own.

A process of its own, because torch slows all its worker threads down where a process has more of them than cores, and
each thread that computes brings its own.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

_loaded: dict[str, Any] = {}


class TransformersPeer:
    """`model.generate` and `model.generate_batch`, greedy, fixed lengths. A context manager.

    Args:
        name_or_path: The model.
        dtype: Of its weights.
        device: Where it runs.
    """

    def __init__(self, name_or_path: str, dtype: torch.dtype, device: torch.device) -> None:
        self._process = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_load, initargs=(name_or_path, dtype, device)
        )

    def generate(self, prompts: Sequence[str], tokens: int) -> float:
        """Seconds for one left-padded batch through `model.generate`."""
        return self._run(_generate, list(prompts), tokens)

    def generate_batch_rate(self, prompts: Sequence[str], tokens: int) -> tuple[float | None, str]:
        """Tokens per second of `model.generate_batch` (continuous batching), and a note; None where it does not run."""
        try:
            seconds = self._run(_generate_batch, list(prompts), tokens)
        except (RuntimeError, ValueError, ImportError, AttributeError, NotImplementedError) as error:
            return None, f"does not run here: {type(error).__name__}"
        return len(prompts) * tokens / seconds, "one run, start-up included"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.shutdown()

    def _run(self, work: Callable[[list[str], int], float], prompts: list[str], tokens: int) -> float:
        return self._process.submit(work, prompts, tokens).result()


def load_with_transformers(name_or_path: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """The model as transformers loads it, and its tokenizer, which pads on the left."""
    model: Any = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype).eval()
    torch.nn.Module.to(model, device)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def padded_batch(tokenizer: Any, prompts: Sequence[str]) -> Any:
    """Each prompt as a conversation of one message, in one left-padded batch of tensors."""
    return tokenizer.apply_chat_template(
        _conversations(prompts), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )


def _load(name_or_path: str, dtype: torch.dtype, device: torch.device) -> None:
    _loaded["model"], _loaded["tokenizer"] = load_with_transformers(name_or_path, dtype, device)


def _conversations(prompts: Sequence[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def _generate(prompts: list[str], tokens: int) -> float:
    started = time.perf_counter()
    encoded = padded_batch(_loaded["tokenizer"], prompts).to(_loaded["model"].device)
    _loaded["model"].generate(**encoded, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return time.perf_counter() - started


def _generate_batch(prompts: list[str], tokens: int) -> float:
    conversations = _conversations(prompts)
    ids = _loaded["tokenizer"].apply_chat_template(conversations, add_generation_prompt=True, return_dict=False)
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1)
    started = time.perf_counter()
    _loaded["model"].generate_batch(inputs=ids, generation_config=config, progress_bar=False)
    return time.perf_counter() - started
