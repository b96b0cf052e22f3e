"""What is known of a model that vLLM runs: its tokenizer, its prompts, and which weights they are."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AutoConfig

from avp_agents.answer.grammar import GrammarCompiler
from avp_agents.context import Context
from avp_agents.crossing.checks import check_fingerprint, check_lineage
from avp_agents.engine.loading.load import TokenizerFiles, load_tokenizer
from avp_agents.errors import UnsupportedModelError
from avp_agents.prompt.plan import PromptRenderer
from avp_agents.vllm.checkpoint import checkpoint_fingerprint, checkpoint_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelSettings:
    """How a model is found and prompted.

    Attributes:
        name: Hub name or folder of the checkpoint that vLLM runs.
        hub: Where its files come from: ``revision``, ``token``, ...
        fingerprint: Which model it is, where its weights are not at hand; None computes it from them.
        chat_template_kwargs: Options of the chat template.
    """

    name: str
    hub: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


class ServedModel:
    """A model as its callers see it. Nothing is loaded before it is needed; thread-safe.

    Args:
        settings: See `ModelSettings`.
    """

    def __init__(self, settings: ModelSettings) -> None:
        self.settings = settings
        self._lock = threading.RLock()

    @cached_property
    def _files(self) -> TokenizerFiles:
        with self._lock:
            return load_tokenizer(self.settings.name, self.settings.hub)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self._files.tokenizer

    @property
    def window(self) -> int:
        """Positions that the model supports; vLLM may be set to fewer."""
        return self._files.window

    @cached_property
    def renderer(self) -> PromptRenderer:
        """Prompts to ids."""
        with self._lock:
            options = self.settings.chat_template_kwargs
            return PromptRenderer(self.tokenizer, chat_template_kwargs=options, eos_token_ids=self._files.eos_ids)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """What answers may be, for this tokenizer."""
        with self._lock:
            backend = cast("Any", self.tokenizer).backend_tokenizer
            return GrammarCompiler(backend, end_ids=self.renderer.stop_ids, control_ids=self.renderer.control_ids)

    @cached_property
    def config(self) -> Any:
        """Its text configuration."""
        return AutoConfig.from_pretrained(self.settings.name, **self.settings.hub).get_text_config()

    @cached_property
    def vocabulary_size(self) -> int:
        """Ids that stand for tokens; rows of the head past them are padding."""
        return min(len(self.tokenizer), int(self.config.vocab_size))

    @cached_property
    def fingerprint(self) -> str:
        """Which weights, architecture and tokenizer: the same as that of a `LatentEngine` on this checkpoint.

        Raises:
            ModelNotFoundError: The weights are not at hand, and no fingerprint was given.
        """
        with self._lock:
            settings = self.settings
            return settings.fingerprint or checkpoint_fingerprint(settings.name, settings.hub, self.tokenizer)

    @cached_property
    def _embedding_table(self) -> torch.Tensor:
        embedding = checkpoint_model(self.settings.name, self.settings.hub).get_input_embeddings()
        if type(embedding) is not nn.Embedding or embedding.weight.is_meta:
            raise UnsupportedModelError(f"{self.settings.name} computes its input embeddings, they are no plain table.")
        return embedding.weight.detach()

    def embeddings_of(self, token_ids: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Input embeddings of tokens, ``[tokens, hidden]``, as the model looks them up.

        Raises:
            ModelNotFoundError: The weights are not at hand.
            UnsupportedModelError: The model does more than look them up.
        """
        with self._lock:
            return self._embedding_table[list(token_ids)].to(dtype)

    def control_id(self, text: str) -> int | None:
        """The id of a control token; None where the text is not one."""
        token_id = cast("Any", self.tokenizer).backend_tokenizer.token_to_id(text)
        return token_id if token_id in self.renderer.control_ids else None

    def token_text(self, token_id: int) -> str:
        """A token's text, for log-probabilities."""
        return str(self.tokenizer.decode([token_id]))

    def check(self, context: Context) -> None:
        """Refuse a context that this model cannot have made.

        Raises:
            FingerprintMismatchError: It belongs to another model.
            IntegrityError: It holds values that are none of this model's.
        """
        check_fingerprint(context, self.fingerprint, self.settings.name)
        hidden, tokens = int(self.config.hidden_size), self.vocabulary_size
        check_lineage(context, tokens=tokens, hidden=hidden, dtype=context.dtype)
