"""An independent judge of the engine: plain transformers, no cache, the whole sequence run again for every position.

Nothing is shared with `avp_agents` but the formulas. Slow on purpose; the engine has to agree with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

Method = Literal["soft", "ridge", "rescale"]
Position = int | Tensor
"""What stands at one position of a lineage: a token id, or the embedding ``[hidden]`` that a latent step fed."""

RIDGE_LAMBDA = 1e-5
ROUNDING = 1e-3
"""Relative deviation that a few latent steps may have in float32: the recurrence amplifies rounding."""


@dataclass(frozen=True)
class Thought:
    """Latent steps.

    Attributes:
        embeddings: ``[steps, hidden]``, what was fed at each step.
        hidden: ``[hidden]``, the last hidden state, not fed.
    """

    embeddings: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Decoded:
    """A greedy answer.

    Attributes:
        token_ids: The answer; ends with an end-of-sequence id if it met one.
        gaps: Per token, how far the best logit stood above the second best.
    """

    token_ids: tuple[int, ...]
    gaps: tuple[float, ...]


@dataclass(frozen=True)
class TeacherForced:
    """One forward over a given lineage.

    Attributes:
        logits: ``[positions, vocab]``.
        hidden: ``[positions, hidden]``, after the final norm.
        layers: Per layer keys and values, ``[kv_heads, positions, head_dim]``.
    """

    logits: Tensor
    hidden: Tensor
    layers: list[tuple[Tensor, Tensor]]


def positions(lineage: Iterable[Any]) -> list[Position]:
    """The positions of a `Context`'s segments, in order."""
    found: list[Position] = []
    for segment in lineage:
        found.extend(segment.token_ids if hasattr(segment, "token_ids") else segment.embeddings)
    return found


def fed_latents(context: Any) -> Tensor:
    """``[steps, hidden]``, what the last latent steps of a `Context` fed."""
    return context.lineage[-1].embeddings


def before_answer(generation: Any) -> list[Position]:
    """The positions that a `Generation` was decoded on."""
    return positions(generation.context.lineage)[: -len(generation.token_ids)]


def relative_deviation(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, as a fraction of the largest expected magnitude."""
    if found.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(found.shape)} against {tuple(expected.shape)}")
    return float((found - expected).abs().max() / expected.abs().max())


class Reference:
    """Latent steps and greedy decoding by running the whole sequence again for every position.

    Args:
        path: A Hugging Face folder or name.
        dtype: Of weights and computation.
    """

    def __init__(self, path: str, dtype: torch.dtype = torch.float32) -> None:
        # Eager attention is the one implementation that has every model's softcap and window.
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.vocabulary = min(len(self.tokenizer), self.model.get_input_embeddings().weight.shape[0])
        stops = self.model.generation_config.eos_token_id
        self.stop_ids = {self.tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])}

    def render(self, prompt: str) -> list[int]:
        """A user message as the chat template opens it for an answer."""
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    # The model, run over a whole lineage

    def input_rows(self, token_ids: Sequence[int]) -> Tensor:
        """``[ids, hidden]``, what the model's own embedding module returns (scale included)."""
        with torch.no_grad():
            return self.model.get_input_embeddings()(torch.tensor(token_ids))

    def embed(self, lineage: Sequence[Position]) -> Tensor:
        """``[positions, hidden]``: input embeddings of the ids, latent embeddings as they are."""
        return torch.stack([self.input_rows([p])[0] if isinstance(p, int) else p for p in lineage])

    @torch.no_grad()
    def teacher_forced(self, lineage: Sequence[Position]) -> TeacherForced:
        """Logits, hidden states, keys and values of every position, in one forward."""
        cache = DynamicCache()  # made without a config, it keeps all positions of sliding layers too
        keyword = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        inputs = {"inputs_embeds": self.embed(lineage)[None], keyword: cache}
        out = self.model(**inputs, use_cache=True, output_hidden_states=True)
        layers: list[Any] = list(cache.layers)
        return TeacherForced(out.logits[0], out.hidden_states[-1][0], [(x.keys[0], x.values[0]) for x in layers])

    @torch.no_grad()
    def last(self, lineage: Sequence[Position]) -> tuple[Tensor, Tensor]:
        """Logits ``[vocab]`` and hidden state ``[hidden]`` of the last position, without any cache."""
        inputs = self.embed(lineage)[None]
        out = self.model(inputs_embeds=inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        return out.logits[0, -1], out.hidden_states[-1][0, -1]

    # What the engine is judged by

    def think(
        self,
        lineage: Sequence[Position],
        steps: int,
        *,
        method: Method = "soft",
        k: int | None = 256,
        temperature: float = 1.0,
        renormalise: bool = False,
    ) -> Thought:
        """Latent steps on top of a lineage."""
        fed: list[Tensor] = []
        logits, hidden = self.last(lineage)
        for _ in range(steps):
            if method == "soft":
                fed.append(self.soft(logits, k=k, temperature=temperature, renormalise=renormalise))
            else:
                fed.append(self.ridge(hidden) if method == "ridge" else self.rescaled(hidden))
            logits, hidden = self.last([*lineage, *fed])
        return Thought(torch.stack(fed), hidden)

    def generate(self, lineage: Sequence[Position], n: int, *, minimum: int = 0) -> Decoded:
        """Greedily up to `n` tokens on top of a lineage, up to and including an end-of-sequence id.

        Rows of the head without a token are never chosen, end-of-sequence ids not among the first `minimum` tokens.
        """
        ids: list[int] = []
        gaps: list[float] = []
        while len(ids) < n and not self.stop_ids.intersection(ids):
            scores = self.last([*lineage, *ids])[0][: self.vocabulary]
            if len(ids) < minimum:
                scores[list(self.stop_ids)] = -torch.inf
            best = scores.topk(2)
            ids.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
        return Decoded(tuple(ids), tuple(gaps))

    # The latent step f(h)

    def soft(self, logits: Tensor, *, k: int | None, temperature: float, renormalise: bool) -> Tensor:
        """The expected input embedding under the `k` most likely tokens; rows without a token never count."""
        scores = logits[: self.vocabulary].double() / temperature
        top = scores.topk(min(k or self.vocabulary, self.vocabulary))
        expected = (top.values.softmax(-1) @ self.input_table[top.indices].double()).to(logits.dtype)
        return self.rescaled(expected) if renormalise else expected

    def ridge(self, hidden: Tensor) -> Tensor:
        """The hidden state mapped from output to input space, at the mean norm of an input embedding."""
        return self.rescaled((hidden.double() @ self.ridge_map).to(hidden.dtype))

    def rescaled(self, vector: Tensor) -> Tensor:
        """`vector` at the mean norm of an input embedding."""
        return vector * (self.input_table.norm(dim=-1).mean() / vector.norm())

    @cached_property
    def input_table(self) -> Tensor:
        """``[vocabulary, hidden]``, the input embedding of every token that the tokenizer knows."""
        return self.input_rows(range(self.vocabulary))

    @cached_property
    def ridge_map(self) -> Tensor:
        """``[hidden, hidden]`` float64: the A that minimises ``|Eo A - Ei|² + λ|A|²``."""
        outputs = self.model.get_output_embeddings().weight[: self.vocabulary].detach().double()
        gram = outputs.T @ outputs + RIDGE_LAMBDA * torch.eye(outputs.shape[1], dtype=torch.float64)
        return torch.linalg.solve(gram, outputs.T @ self.input_table.double())
