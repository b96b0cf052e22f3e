"""Tiny random models of many families, saved as Hugging Face folders, with a small real tokenizer.

Weights are random but not tame: attention is sharp enough that what stands far back changes the next token, and windows
are shorter than the tests' prompts. An engine that gets a mask, a position or a scale wrong gives other tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WINDOW = 8
"""Positions a sliding layer sees; every prompt of the tests is longer."""
MAX_POSITIONS = 1024

_TEXT = (
    "the quick brown fox jumps over the lazy dog and then it rests under the old tree. "
    "what is the sum of twenty four and seventeen? the answer is forty one because four and seven make eleven. "
    "user assistant system question context latent steps token prompt please solve this problem step by step. "
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 370 tokens with a ChatML template; any text can be encoded."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=380, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def _llama(**changes: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": MAX_POSITIONS, "tie_word_embeddings": True,
    }  # fmt: skip
    return sizes | changes


def _gpt(**changes: Any) -> dict[str, Any]:
    return {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": MAX_POSITIONS} | changes


def _four_layers(**changes: Any) -> dict[str, Any]:
    """For families that mix sliding and full attention."""
    return _llama(num_hidden_layers=4, sliding_window=WINDOW, **changes)


_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_LATENT_ATTENTION = {
    "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 12, "max_position_embeddings": MAX_POSITIONS,
}  # fmt: skip

Family = tuple[str, dict[str, Any]]
"""A transformers model type and its sizes."""

SUPPORTED: dict[str, Family] = {
    "llama": ("llama", _llama()),
    "llama-untied": ("llama", _llama(tie_word_embeddings=False)),
    "qwen2": ("qwen2", _llama()),
    "qwen3": ("qwen3", _llama()),
    "mistral-sliding": ("mistral", _llama(sliding_window=WINDOW)),
    "gemma2": (
        "gemma2",
        _four_layers(query_pre_attn_scalar=8, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    ),
    "gemma3": ("gemma3_text", _four_layers(query_pre_attn_scalar=8, sliding_window_pattern=2)),
    "gpt2": ("gpt2", _gpt()),
}
"""Families that the engine must run, and exactly."""

SLIDING = ("mistral-sliding", "gemma2", "gemma3")

UNUSUAL: dict[str, Family] = {
    "experts": ("mixtral", _llama(sliding_window=None, **_MOE)),
    "attention-sinks": ("gpt_oss", _llama(sliding_window=WINDOW, tie_word_embeddings=False, **_MOE)),
    "compressed-kv": ("deepseek_v3", _LATENT_ATTENTION),
    "chunked-attention": (
        "llama4_text",
        _llama(num_hidden_layers=4, attention_chunk_size=WINDOW, num_local_experts=2, intermediate_size_mlp=64),
    ),
    "no-rope-layers": ("cohere2", _four_layers(logit_scale=0.5)),
    "differential-attention": ("diffllama", _llama()),
    "scaled-residuals": (
        "granite",
        _llama(embedding_multiplier=3.0, logits_scaling=2.0, attention_multiplier=0.3, residual_multiplier=0.8),
    ),
    "one-kv-head": ("gpt_bigcode", _gpt()),
    "rope-scaled-by-length": (
        "llama",
        _llama(max_position_embeddings=24, rope_parameters={"rope_type": "dynamic", "factor": 16.0, "rope_theta": 1e4}),
    ),
    "rope-switched-by-length": (
        "phi3",
        _llama(
            original_max_position_embeddings=48,
            rope_parameters={
                "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 48,
            },
        ),
    ),
    "old-local-attention": (
        "gpt_neo",
        {
            "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW, "max_position_embeddings": MAX_POSITIONS,
        },
    ),
    "alibi": (
        "falcon",
        {
            "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "alibi": True,
            "max_position_embeddings": MAX_POSITIONS,
        },
    ),
    "offset-positions": (
        "opt",
        {
            "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "max_position_embeddings": MAX_POSITIONS,
        },
    ),
}  # fmt: skip
"""Decoder-only families with something of their own in the attention: the engine runs them exactly or refuses them."""

REFUSED: dict[str, Family] = {
    "state-space": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "recurrent": ("rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}),
    "linear-attention": (
        "qwen3_next",
        _llama(num_hidden_layers=4, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32)
        | _LINEAR_ATTENTION,
    ),
    "hybrid-convolution": ("lfm2", _llama(layer_types=["conv", "full_attention", "conv"])),
    "hybrid-state-space": (
        "jamba",
        _llama(num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4, use_mamba_kernels=False),
    ),
    "per-layer-token-embeddings": (
        "gemma4_text",
        _four_layers(global_head_dim=16, hidden_size_per_layer_input=8, vocab_size_per_layer_input=380),
    ),
    "bidirectional": (
        "bert",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    ),
    "encoder-decoder": ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}),
}
"""What a lineage of tokens and latent embeddings with a KV-cache cannot represent exactly."""

FAMILIES = SUPPORTED | UNUSUAL | REFUSED


class TinyModels:
    """Saves tiny models in a folder, each when it is first asked for.

    Beside the families there are

    - ``"padded"``: a Qwen2 whose tables have rows without a token, which would win every softmax if they counted;
    - ``"rotated"``: an untied Llama whose head is its input table, rotated;
    - ``"twin"``: an untied Llama whose head holds the same numbers as its input table;
    - ``"broken"``: an untied Llama in which the token ``Z`` has an infinite input embedding.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokenizer = build_tokenizer()
        self._special: dict[str, Callable[[], PreTrainedModel]] = {
            "padded": self._padded, "rotated": self._rotated, "twin": self._twin, "broken": self._broken,
        }  # fmt: skip

    def path(self, name: str, *, seed: int = 0) -> str:
        """The Hugging Face folder of a model."""
        folder = self._folder / f"{name}-{seed}"
        if not folder.exists():
            model = self._special[name]() if name in self._special else self._build(FAMILIES[name], seed=seed)
            model.save_pretrained(folder)
            self._tokenizer.save_pretrained(folder)
        return str(folder)

    def _build(self, family: Family, *, padding_rows: int = 0, seed: int = 0) -> PreTrainedModel:
        return build_model(family, len(self._tokenizer) + padding_rows, seed=seed)

    @torch.no_grad()
    def _padded(self) -> PreTrainedModel:
        model = self._build(FAMILIES["qwen2"], padding_rows=37)
        _table(model)[len(self._tokenizer) :].mul_(8)
        return model

    @torch.no_grad()
    def _rotated(self) -> PreTrainedModel:
        model = self._build(FAMILIES["llama-untied"])
        table = _table(model)
        noise = torch.randn(table.shape[1], table.shape[1], generator=torch.Generator().manual_seed(1))
        _head(model).copy_(table @ torch.linalg.qr(noise).Q)
        return model

    @torch.no_grad()
    def _twin(self) -> PreTrainedModel:
        model = self._build(FAMILIES["llama-untied"])
        _head(model).copy_(_table(model))
        return model

    @torch.no_grad()
    def _broken(self) -> PreTrainedModel:
        model = self._build(FAMILIES["llama-untied"])
        _table(model)[self._tokenizer.encode("Z")] = torch.inf
        return model


def build_model(family: Family, vocabulary: int, *, seed: int = 0) -> PreTrainedModel:
    """A random model; its layers outweigh the residual stream, so that every layer and position matters."""
    model_type, sizes = family
    ids = {"bos_token_id": None, "eos_token_id": SPECIAL_TOKENS.index("<|im_end|>"), "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, vocab_size=vocabulary, **ids, **sizes)
    factory = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = factory.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    hidden = config.get_text_config().hidden_size
    table = model.get_input_embeddings()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.6 / hidden**0.5, generator=generator)
            else:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
        if hasattr(table, "embed_scale"):
            table.weight.mul_(1.6 / hidden**0.5)
    return model


def _table(model: PreTrainedModel) -> torch.Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _head(model: PreTrainedModel) -> torch.Tensor:
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    return head.weight
