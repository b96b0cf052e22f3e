"""The model that the engine runs, and its one forward call."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from avp_agents.engine.core.attention import Layout, PoolCache
from avp_agents.engine.core.kv_pool import LayerShape
from avp_agents.engine.core.latent_step import Vocabulary
from avp_agents.errors import UnsupportedModelError


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run, and what the engine knows about it.

    Attributes:
        model: Transformers' own model, attention set to the pool's.
        tokenizer: Its tokenizer.
        fingerprint: See `avp_agents.fingerprint`.
        dtype: Of weights, hidden states and KV-cache.
        device: Where input embeddings go in.
        shapes: What each layer stores per position.
        vocabulary: Input embeddings and head.
        weight_bytes: Bytes of all weights.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    dtype: torch.dtype
    device: torch.device
    shapes: tuple[LayerShape, ...]
    vocabulary: Vocabulary
    weight_bytes: int

    @cached_property
    def dtype_name(self) -> str:
        """``"float32"``, ``"bfloat16"`` or ``"float16"``."""
        return str(self.dtype).removeprefix("torch.")


class Forward:
    """One forward pass: embeddings in, hidden states and the wanted logits out.

    The head's own path runs (scale and soft cap included); hidden states are caught on their way out of the decoder.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._decoder = decoder_of(model)
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._keeps = "logits_to_keep" in parameters

    def __call__(
        self,
        embeddings: torch.Tensor,
        positions: torch.Tensor,
        logits_at: torch.Tensor | None,
        cache: PoolCache | Cache | None,
        layout: Layout | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run T positions.

        Args:
            embeddings: ``[T, hidden]``.
            positions: ``[T]`` int64, each within its own row.
            logits_at: ``[n]`` int64, which of the T positions need logits; None for none.
            cache: The pool, or None for a plain uncached pass.
            layout: Where the positions belong; None with a plain pass.

        Returns:
            Hidden states after the final norm ``[T, hidden]``; logits ``[n, vocabulary]`` or None.
        """
        inputs: dict[str, Any] = {"inputs_embeds": embeddings[None], "position_ids": positions[None]}
        inputs |= {self._cache_name: cache, "use_cache": cache is not None}
        if layout is not None:
            inputs["avp_layout"] = layout
            if isinstance(cache, PoolCache):
                cache.place(layout.slots)
        if logits_at is None:
            return last_hidden(self._decoder(**inputs))[0], None
        if self._keeps:
            inputs["logits_to_keep"] = logits_at
        caught: list[torch.Tensor] = []
        hook = self._decoder.register_forward_hook(lambda _m, _i, output: caught.append(last_hidden(output)))
        try:
            logits = self._model(**inputs).logits[0]
        finally:
            hook.remove()
        return caught[0][0], logits if self._keeps else logits[logits_at]


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head.

    Raises:
        UnsupportedModelError: It has none.
    """
    decoder = model.get_decoder()
    if decoder is None or decoder is model:
        raise UnsupportedModelError(f"{type(model).__name__} has no decoder to read hidden states from.")
    return decoder


def last_hidden(output: Any) -> torch.Tensor:
    """A decoder's hidden states after the final norm, ``[1, T, hidden]``."""
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
