"""The latent step: one documented function f(h) from the last hidden state to the next input embedding.

- ``"soft"``: the expected input embedding under the model's own next-token distribution,
  f(h) = Σ_v p_v E_v with p = softmax(top-k logits / temperature), renormalised over the top k. It stays in the convex
  hull of the input embeddings; the default where head and input embeddings are tied.
- ``"ridge"``: f(h) = hA with A = (EoᵀEo + λI)⁻¹EoᵀEi, the ridge regression from output to input embeddings
  (LatentMAS, arXiv 2511.20639, with λ = 1e-5), then rescaled to the mean norm of the input embeddings.
- ``"rescale"``: f(h) = h, rescaled to the mean norm of the input embeddings.

Eo is the head's weight ``[vocabulary, hidden]``, Ei (rows E_v) the input embeddings *as the model reads them*, with
the scale that some architectures apply. Padding rows of the vocabulary take no part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from avp_agents.context import LatentMethod, LatentRecipe
from avp_agents.errors import ConfigurationError, UnsupportedModelError

RIDGE_LAMBDA = 1e-5
TIED_COSINE = 0.99
DEFAULT_K = 256
READOUT_K = 256
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Vocabulary:
    """The model's way in and out of its hidden space.

    Attributes:
        embed: Token ids ``[...]`` to input embeddings ``[..., hidden]``, the architecture's scale included.
        head: The output head's weight ``[rows, hidden]``, None where it is not a plain matrix.
        size: Rows that stand for tokens; rows past it are padding.
        tied: Whether head and input embeddings are one tensor.
    """

    embed: Callable[[torch.Tensor], torch.Tensor]
    head: torch.Tensor | None
    size: int
    tied: bool
    device: torch.device

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Input embeddings of ids ``start:stop``, ``[stop - start, hidden]``."""
        return self.embed(torch.arange(start, stop, device=self.device))

    def chunks(self) -> list[tuple[int, int]]:
        """Id ranges that keep temporary memory small."""
        return [(i, min(i + _ROWS_AT_ONCE, self.size)) for i in range(0, self.size, _ROWS_AT_ONCE)]


class LatentStep:
    """f(h) for one model, with everything it needs resident on the model's device.

    Args:
        vocabulary: The model's embeddings and head.
        cache_file: Where the ridge map is kept between processes; named by fingerprint, None keeps it in memory only.
    """

    def __init__(self, vocabulary: Vocabulary, cache_file: Path | None = None) -> None:
        self._vocabulary = vocabulary
        self._cache_file = cache_file

    @cached_property
    def mean_norm(self) -> float:
        """Mean norm of the input embeddings, padding rows excluded."""
        v = self._vocabulary
        total = sum(float(v.rows(i, j).float().norm(dim=-1).double().sum()) for i, j in v.chunks())
        return total / v.size

    @cached_property
    def tied(self) -> bool:
        """Whether head and input embeddings are the same, or the same but for rounding (mean row cosine > 0.99)."""
        v = self._vocabulary
        if v.tied or v.head is None:
            return v.tied
        total = 0.0
        for i, j in v.chunks():
            head = v.head[i:j].float()
            total += float(nn.functional.cosine_similarity(head, v.rows(i, j).float().to(head.device)).sum())
        return total / v.size > TIED_COSINE

    def recipe(
        self,
        steps: int,
        *,
        method: LatentMethod | None = None,
        k: int | None = DEFAULT_K,
        temperature: float = 1.0,
        renormalise: bool | None = None,
        stop_cosine: float | None = None,
        stop_entropy: float | None = None,
    ) -> LatentRecipe:
        """Validate options and fill in this model's defaults.

        Raises:
            ConfigurationError: An option is unknown or out of range.
        """
        method = method or ("soft" if self.tied else "ridge")
        if method not in ("soft", "ridge", "rescale"):
            raise ConfigurationError(f"Unknown latent method {method!r}; choose 'soft', 'ridge' or 'rescale'.")
        if steps < 0:
            raise ConfigurationError(f"steps must be 0 or more, not {steps}.")
        if k is not None and k < 1:
            raise ConfigurationError(f"k must be at least 1, or None for the whole vocabulary, not {k}.")
        if not 0 < temperature < float("inf"):
            raise ConfigurationError(f"The latent temperature must be positive and finite, not {temperature}.")
        if stop_cosine is not None and not -1 <= stop_cosine <= 1:
            raise ConfigurationError(f"stop_cosine lies between -1 and 1, not {stop_cosine}.")
        if stop_entropy is not None and stop_entropy < 0:
            raise ConfigurationError(f"stop_entropy is at least 0 nats, not {stop_entropy}.")
        if method != "soft":
            k, temperature = None, 1.0
        elif k is not None:
            k = min(k, self._vocabulary.size)
        renormalise = method != "soft" if renormalise is None else renormalise
        return LatentRecipe(method, k, temperature, renormalise, steps, stop_cosine, stop_entropy)

    def is_prepared(self, recipe: LatentRecipe) -> bool:
        """Whether `prepare` has nothing to do."""
        has_map = recipe.method != "ridge" or "ridge_map" in self.__dict__
        return has_map and (not recipe.renormalise or "mean_norm" in self.__dict__)

    @torch.inference_mode()
    def prepare(self, recipe: LatentRecipe) -> None:
        """Compute what f needs once per model, before the scheduler's thread needs it.

        Raises:
            UnsupportedModelError: The method needs a head that this model does not have.
        """
        if recipe.method == "ridge":
            self.ridge_map  # noqa: B018  (cached)
        if recipe.renormalise:
            self.mean_norm  # noqa: B018  (cached)

    def needs_logits(self, recipe: LatentRecipe) -> bool:
        """Whether f or a stopping rule looks at the next-token distribution."""
        return recipe.method == "soft" or recipe.stop_entropy is not None

    def __call__(self, hidden: torch.Tensor, logits: torch.Tensor | None, recipe: LatentRecipe) -> torch.Tensor:
        """The next input embeddings.

        Args:
            hidden: ``[n, hidden]``, last hidden states after the final norm.
            logits: ``[n, rows]`` of the model's own head path; needed for ``"soft"``.
            recipe: Method and options.

        Returns:
            ``[n, hidden]`` in hidden's dtype.
        """
        if recipe.method == "soft":
            assert logits is not None
            mixed = self._soft(logits, recipe)
        elif recipe.method == "ridge":
            mixed = hidden.float() @ self.ridge_map
        else:
            mixed = hidden.float()
        if recipe.renormalise:
            mixed = mixed * (self.mean_norm / mixed.norm(dim=-1, keepdim=True).clamp_min(1e-6))
        return mixed.to(hidden.dtype)

    def readout(self, logits: torch.Tensor, k: int = READOUT_K) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids ``[n, k]`` and probabilities ``[n, k]`` float32 (of the whole distribution) of the likeliest tokens."""
        probabilities = torch.softmax(logits[:, : self._vocabulary.size].float(), dim=-1)
        top = probabilities.topk(min(k, self._vocabulary.size), dim=-1)
        return top.indices, top.values

    def entropy(self, logits: torch.Tensor) -> torch.Tensor:
        """Entropy in nats of each next-token distribution, ``[n]`` float32."""
        logp = torch.log_softmax(logits[:, : self._vocabulary.size].float(), dim=-1)
        return -(logp.exp() * logp).sum(dim=-1)

    def _soft(self, logits: torch.Tensor, recipe: LatentRecipe) -> torch.Tensor:
        v = self._vocabulary
        logits = logits[:, : v.size]
        if recipe.k is None or recipe.k >= v.size:
            weights = torch.softmax(logits.float() / recipe.temperature, dim=-1)
            parts = [weights[:, i:j].to(v.device) @ v.rows(i, j).float() for i, j in v.chunks()]
            return torch.stack(parts).sum(dim=0).to(logits.device)
        top = logits.topk(recipe.k, dim=-1)
        weights = torch.softmax(top.values.float() / recipe.temperature, dim=-1)
        rows = v.embed(top.indices.to(v.device)).to(logits.device)
        return torch.bmm(weights[:, None], rows.float())[:, 0]

    @cached_property
    def ridge_map(self) -> torch.Tensor:
        """A, ``[hidden, hidden]`` float32 on the head's device; solved in float64, kept in the cache file."""
        head = self._vocabulary.head
        if head is None:
            raise UnsupportedModelError("This model's head is not a plain matrix; use method='soft' or 'rescale'.")
        if self._cache_file is not None and self._cache_file.exists():
            return load_file(self._cache_file)["ridge"].to(head.device)
        ridge = self._solve_ridge(head)
        if self._cache_file is not None:
            self._cache_file.parent.mkdir(parents=True, exist_ok=True)
            partial = self._cache_file.with_suffix(f".{id(self):x}.part")
            save_file({"ridge": ridge.cpu()}, partial)
            partial.replace(self._cache_file)
        return ridge

    def _solve_ridge(self, head: torch.Tensor) -> torch.Tensor:
        """Gram matrices are accumulated in chunks of rows, so that no float64 copy of a table is made."""
        v, hidden = self._vocabulary, head.shape[1]
        gram = torch.zeros(hidden, hidden, dtype=torch.float64, device=head.device)
        cross = torch.zeros_like(gram)
        for i, j in v.chunks():
            out, into = head[i:j].double(), v.rows(i, j).double().to(head.device)
            gram += out.T @ out
            cross += out.T @ into
        gram.diagonal().add_(RIDGE_LAMBDA)
        return torch.linalg.solve(gram, cross).float().contiguous()
