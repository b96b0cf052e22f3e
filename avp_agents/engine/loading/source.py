"""Where a runtime gets its model from: a name or folder, or a model that is in memory already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avp_agents.engine.core.model import LoadedModel
from avp_agents.engine.loading.load import TokenizerFiles, eos_ids, load_model, load_tokenizer, prepare, window


class ModelSource(Protocol):
    """Gives the tokenizer first and the weights when they are needed."""

    @property
    def name(self) -> str:
        """What the model is called, for people."""
        ...

    def tokenizer_files(self) -> TokenizerFiles:
        """Everything but the weights."""
        ...

    def load(self, tokenizer: PreTrainedTokenizerBase, *, pack: bool) -> LoadedModel:
        """The model, ready to run."""
        ...


@dataclass(frozen=True)
class Pretrained:
    """A hub name or folder. See `LatentEngine.from_pretrained` for the fields."""

    name: str
    device: str | None
    dtype: str | None
    adapters: tuple[str, ...]
    options: Mapping[str, Any]

    def tokenizer_files(self) -> TokenizerFiles:
        """Everything but the weights."""
        return load_tokenizer(self.name, self.options)

    def load(self, tokenizer: PreTrainedTokenizerBase, *, pack: bool) -> LoadedModel:
        """Load the weights."""
        return load_model(self.name, tokenizer, self.device, self.dtype, self.adapters, self.options, pack=pack)


@dataclass(frozen=True)
class InMemory:
    """A model that somebody built or loaded; the engine takes it over."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def name(self) -> str:
        """What the model calls itself."""
        return self.model.config.name_or_path or type(self.model).__name__

    def tokenizer_files(self) -> TokenizerFiles:
        """Everything but the weights."""
        declared = getattr(self.model.generation_config, "eos_token_id", None)
        return TokenizerFiles(self.tokenizer, window(self.model.config, self.name), eos_ids(declared, self.tokenizer))

    def load(self, tokenizer: PreTrainedTokenizerBase, *, pack: bool) -> LoadedModel:
        """Make it ready to run."""
        return prepare(self.model.eval(), tokenizer, pack=pack)
