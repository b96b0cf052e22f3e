"""What the engine is measured against: transformers' own generation loops on a second copy of the model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


class TransformersPeer:
    """`model.generate` and `model.generate_batch`, greedy, fixed lengths.

    Args:
        name_or_path: The model.
        dtype: Of its weights.
        device: Where it runs.
    """

    def __init__(self, name_or_path: str, dtype: torch.dtype, device: torch.device) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype).eval()
        torch.nn.Module.to(self._model, device)
        self._tokenizer = AutoTokenizer.from_pretrained(name_or_path, padding_side="left")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def generate(self, prompts: Sequence[str], tokens: int) -> None:
        """One left-padded batch through `model.generate`."""
        encoded = self._tokenizer.apply_chat_template(
            [[{"role": "user", "content": prompt}] for prompt in prompts],
            add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True,
        ).to(self._model.device)  # fmt: skip
        self._model.generate(**encoded, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    def generate_batch_rate(self, prompts: Sequence[str], tokens: int) -> tuple[float | None, str]:
        """Tokens per second of `model.generate_batch` (continuous batching), and a note; None where it does not run."""
        ids = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": p}], add_generation_prompt=True, return_dict=False
            )
            for p in prompts
        ]
        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1)
        started = time.perf_counter()
        try:
            self._model.generate_batch(inputs=ids, generation_config=config, progress_bar=False)
        except (RuntimeError, ValueError, ImportError, AttributeError, NotImplementedError) as error:
            return None, f"does not run here: {type(error).__name__}"
        return len(prompts) * tokens / (time.perf_counter() - started), "one run, start-up included"
