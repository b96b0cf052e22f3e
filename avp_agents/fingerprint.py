"""Which model a context belongs to.

The fingerprint is a digest over sampled weights (adapters and quantisation included), the part of the configuration
that changes what a forward pass computes, and the tokenizer's vocabulary. It does not depend on the path the model
was loaded from, on library versions or on the dtype it is held in; the dtype stands beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from avp_agents.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES_PER_TENSOR = 256

_CONFIG_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "n_embd", "intermediate_size", "n_inner", "num_hidden_layers", "n_layer",
    "num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "hidden_act", "activation_function",
    "hidden_activation", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_scaling",
    "rope_parameters", "partial_rotary_factor", "max_position_embeddings", "n_positions", "tie_word_embeddings",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "attn_logit_softcapping",
    "final_logit_softcapping", "query_pre_attn_scalar", "embedding_multiplier", "residual_multiplier",
    "attention_multiplier", "logits_scaling", "logit_scale", "num_experts", "num_local_experts", "num_experts_per_tok",
)  # fmt: skip


def model_fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of a loaded model and its tokenizer.

    Args:
        model: The model with its final weights: adapters attached, quantisation applied, nothing repacked.
        tokenizer: Its tokenizer.

    Returns:
        64 hexadecimal digits.

    Raises:
        UnsupportedModelError: Some weights are not in memory (offloaded to disk), so that they cannot be sampled.
    """
    digest = hashlib.blake2b(b"avp-fingerprint-1", digest_size=32)
    config = model.config.get_text_config().to_dict()
    described = {name: config[name] for name in _CONFIG_FIELDS if config.get(name) is not None}
    digest.update(_canonical_json(described))
    digest.update(_canonical_json(_quantisation(model)))
    digest.update(_canonical_json(sorted(tokenizer.get_vocab().items())))
    for name, tensor in sorted(model.named_parameters(remove_duplicate=True)):
        digest.update(f"{name}|{tuple(tensor.shape)}|".encode())
        digest.update(_sample(name, tensor))
    return digest.hexdigest()


def _quantisation(model: PreTrainedModel) -> dict[str, Any]:
    quantisation = getattr(model.config, "quantization_config", None)
    if quantisation is None:
        return {}
    return dict(quantisation) if isinstance(quantisation, Mapping) else quantisation.to_dict()


def _canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()


def _sample(name: str, tensor: torch.Tensor) -> bytes:
    """Evenly spaced values, as bfloat16 so that the dtype a checkpoint is held in makes no difference."""
    import torch

    if tensor.is_meta:
        raise UnsupportedModelError(
            f"The weights of {name!r} are offloaded, so they cannot be sampled; choose a device_map that keeps all in "
            "memory."
        )
    flat = tensor.detach().reshape(-1)
    where = torch.linspace(0, flat.numel() - 1, min(SAMPLES_PER_TENSOR, flat.numel()), dtype=torch.float64).long()
    values = flat[where.to(flat.device)].cpu()
    if values.is_floating_point():
        values = values.to(torch.bfloat16)
    return values.contiguous().view(torch.uint8).numpy().tobytes()
