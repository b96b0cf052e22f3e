"""vLLM's models, with a table of latent embeddings beside the embedding matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.models.gemma import GemmaForCausalLM
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.tokenizers import cached_tokenizer_from_config

from avp_agents.engine.core.latent_step import Vocabulary
from avp_agents.errors import ConfigurationError, UnsupportedModelError
from avp_agents.vllm.plugin.connector import latent_rows
from avp_agents.vllm.plugin.memory import LatentMemory, announce, head_rows
from avp_agents.vllm.plugin.request import LOGITS_PROCESSOR

if TYPE_CHECKING:
    _Model = LlamaForCausalLM
else:
    _Model = object


class LatentModel(_Model):
    """Looks ids beyond the vocabulary up in the latent memory. A mixin for one of vLLM's causal language models.

    Nothing of the forward pass changes: with prompt embeddings enabled, vLLM looks all ids up before it.

    Raises:
        ConfigurationError: vLLM was started without what latent requests need, or with what excludes them.
        UnsupportedModelError: The output head is quantised.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
        _refuse(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)
        if not isinstance(self._head.quant_method, UnquantizedEmbeddingMethod):
            name = vllm_config.model_config.model
            raise UnsupportedModelError(f"The output head of {name} is quantised; latent steps need a plain one.")
        self._vllm_config = vllm_config
        self._memory: LatentMemory | None = None
        announce(vllm_config.instance_id, self)

    @property
    def latent_memory(self) -> LatentMemory:
        """The table; made when the weights have their final values."""
        if self._memory is None:
            self._memory = self._make_memory()
        return self._memory

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings ``[n, hidden]`` of ids ``[n]``, latent ones included."""
        memory = self.latent_memory
        latent = memory.is_latent(input_ids)
        tokens = super().embed_input_ids(input_ids.masked_fill(latent, 0))
        return torch.where(latent[:, None], memory.look_up(input_ids), tokens)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits ``[n, vocabulary]``; their hidden states are kept for the latent rows among them."""
        self.latent_memory.last_hidden = hidden_states
        return super().compute_logits(hidden_states)

    @property
    def _embedding(self) -> Any:
        return self.model.embed_tokens

    @property
    def _head(self) -> Any:
        return getattr(self, "lm_head", self._embedding)

    def _make_memory(self) -> LatentMemory:
        config = self._vllm_config
        model = config.model_config
        tokenizer = cached_tokenizer_from_config(model)
        assert tokenizer is not None
        size, head, table = model.get_vocab_size(), self._head, self._embedding.weight
        vocabulary = Vocabulary(
            embed=super().embed_input_ids,
            head=head_rows(head),  # type: ignore[arg-type]
            size=min(len(tokenizer), size),
            tied=head is self._embedding or head.weight is table,
            device=table.device,
        )
        hidden_size = model.get_hidden_size()
        return LatentMemory(latent_rows(config), vocabulary, size, hidden_size, model.dtype)


class LatentLlamaForCausalLM(LatentModel, LlamaForCausalLM):
    """Llama."""


class LatentMistralForCausalLM(LatentModel, MistralForCausalLM):
    """Mistral."""


class LatentQwen2ForCausalLM(LatentModel, Qwen2ForCausalLM):
    """Qwen2."""


class LatentQwen3ForCausalLM(LatentModel, Qwen3ForCausalLM):
    """Qwen3."""


class LatentGemmaForCausalLM(LatentModel, GemmaForCausalLM):
    """Gemma."""


class LatentGemma2ForCausalLM(LatentModel, Gemma2ForCausalLM):
    """Gemma 2."""


class LatentGemma3ForCausalLM(LatentModel, Gemma3ForCausalLM):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Gemma 3, text only."""


def _refuse(config: VllmConfig) -> None:
    """What latent steps cannot run with, each with what to do about it."""
    latent_rows(config)
    processors = config.model_config.logits_processors or []
    named = {p if isinstance(p, str) else f"{p.__module__}:{p.__qualname__}" for p in processors}
    problems = {
        "enable_prompt_embeds is off; switch it on": not config.model_config.enable_prompt_embeds,
        f"the logits processor {LOGITS_PROCESSOR} is missing; name it": LOGITS_PROCESSOR not in named,
        "vLLM's second model runner is in use; set VLLM_USE_V2_MODEL_RUNNER=0": config.use_v2_model_runner,
        "pipeline parallelism is on; use tensor parallelism": config.parallel_config.pipeline_parallel_size > 1,
        "speculative decoding is on; switch it off": config.speculative_config is not None,
        "LoRA adapters are enabled; merge the adapter into the weights": config.lora_config is not None,
        "the tokenizer is not loaded; drop skip_tokenizer_init": config.model_config.skip_tokenizer_init,
        "it is a pooling model; serve it for generation": config.model_config.runner_type != "generate",
    }
    found = [problem for problem, holds in problems.items() if holds]
    if found:
        raise ConfigurationError(f"Latent steps cannot run in this vLLM: {'; '.join(found)}. See plugin_options().")
