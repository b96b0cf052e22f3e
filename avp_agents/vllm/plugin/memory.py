"""The latent embeddings that are alive in one vLLM worker, by row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from platformdirs import user_cache_path
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from avp_agents.context import LatentRecipe
from avp_agents.engine.core.latent_step import READOUT_K, LatentStep, Vocabulary
from avp_agents.errors import ConfigurationError

_SAMPLED_ROWS = 256


class RemembersLatents(Protocol):
    """A model that can think."""

    @property
    def latent_memory(self) -> LatentMemory:
        """Its memory; asked for when the weights are loaded."""
        ...


_models: WeakValueDictionary[str, RemembersLatents] = WeakValueDictionary()


def announce(instance_id: str, model: RemembersLatents) -> None:
    """Say which model a vLLM instance runs in this process."""
    _models[instance_id] = model


def memory_of(instance_id: str) -> LatentMemory:
    """The memory of a vLLM instance's model.

    Raises:
        ConfigurationError: The model cannot think.
    """
    model = _models.get(instance_id)
    if model is None:
        raise ConfigurationError("The model of this vLLM cannot think; start it with plugin_options(thinks_as=...).")
    return model.latent_memory


class LatentMemory:
    """A table of latent embeddings, and what is read out with each of them.

    Ids from `vocabulary_size` on name its rows. Which request a row belongs to is the scheduler's business
    (`avp_agents.vllm.plugin.connector`).

    Attributes:
        vocabulary_size: Width of the model's logits.
        last_hidden: ``[n, hidden]``, the hidden states after the final norm that the newest logits were computed from.
        step: f(h).

    Args:
        rows: Rows of the table.
        vocabulary: The model's embeddings and head.
        vocabulary_size: See above.
        hidden_size: Of the model.
        dtype: Of the model.
    """

    def __init__(
        self, rows: int, vocabulary: Vocabulary, vocabulary_size: int, hidden_size: int, dtype: torch.dtype
    ) -> None:
        device = vocabulary.device
        self.vocabulary_size = vocabulary_size
        self.last_hidden: torch.Tensor | None = None
        self.step = LatentStep(vocabulary, _ridge_file(vocabulary))
        readouts = min(READOUT_K, vocabulary.size)
        self._embeddings = torch.zeros(rows, hidden_size, dtype=dtype, device=device)
        self._hidden = torch.zeros_like(self._embeddings)
        self._token_ids = torch.zeros(rows, readouts, dtype=torch.int32, device=device)
        self._probabilities = torch.zeros(rows, readouts, dtype=torch.float32, device=device)
        self._entropy = torch.zeros(rows, dtype=torch.float32, device=device)

    def is_latent(self, ids: torch.Tensor) -> torch.Tensor:
        """Which of the ids ``[n]`` name rows; ``[n]`` bool."""
        return ids >= self.vocabulary_size

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows that ids ``[n]`` name, ``[n, hidden]``; anything for ids that name none."""
        return self._embeddings[(ids - self.vocabulary_size).clamp_min(0)]

    def write(self, rows: torch.Tensor, hidden: torch.Tensor, logits: torch.Tensor, recipe: LatentRecipe) -> None:
        """Write f(h) into rows ``[n]`` int64, of hidden states ``[n, hidden]`` and their logits."""
        self._embeddings[rows] = self.step(hidden, logits, recipe).to(self._embeddings.dtype)
        self._hidden[rows] = hidden.to(self._hidden.dtype)

    def write_readout(self, rows: torch.Tensor, logits: torch.Tensor) -> None:
        """Note for rows ``[n]`` int64 what the model was about to say, by logits ``[n, vocabulary_size]``."""
        token_ids, probabilities = self.step.readout(logits)
        self._token_ids[rows] = token_ids.int()
        self._probabilities[rows] = probabilities
        self._entropy[rows] = self.step.entropy(logits)

    def collect(self, rows: Sequence[int], every_step: bool) -> dict[str, torch.Tensor]:
        """A finished thought, on the CPU.

        Args:
            rows: Its rows in order; the last one's embedding was not fed.
            every_step: Whether hidden states and readouts are wanted of every row, or of the last one.

        Returns:
            ``embeddings [n, hidden]``; ``hidden [m, hidden]``, ``token_ids [m, k]``, ``probabilities [m, k]`` and
            ``entropy [m]`` with m = n + 1 or 1.
        """
        where = torch.tensor(rows, device=self._embeddings.device)
        read = where if every_step else where[-1:]
        return {
            "embeddings": self._embeddings[where[:-1]].cpu(),
            "hidden": self._hidden[read].cpu(),
            "token_ids": self._token_ids[read].cpu(),
            "probabilities": self._probabilities[read].cpu(),
            "entropy": self._entropy[read].cpu(),
        }


class ShardedHead:
    """The rows of an output head that tensor parallelism spreads over several devices, read like one matrix's.

    Every rank must ask for the same rows at the same time.
    """

    def __init__(self, head: VocabParallelEmbedding, weight: torch.Tensor) -> None:
        self._head = head
        self.shape = (head.org_vocab_size, head.embedding_dim)
        self.device = weight.device

    def __getitem__(self, rows: slice) -> torch.Tensor:
        ids = torch.arange(rows.start, rows.stop, device=self.device)
        # a head is an embedding whose own forward refuses to look anything up
        return VocabParallelEmbedding.forward(self._head, ids)


def head_rows(head: nn.Module) -> torch.Tensor | ShardedHead:
    """A head's weight, ``[rows, hidden]``."""
    assert isinstance(head, VocabParallelEmbedding)
    weight = head.weight
    assert isinstance(weight, torch.Tensor)
    return ShardedHead(head, weight) if get_tensor_model_parallel_world_size() > 1 else weight.detach()


def _ridge_file(vocabulary: Vocabulary) -> Path | None:
    """Where the ridge map is kept between processes: named by a digest of sampled rows of the two tables.

    Ranks of a tensor-parallel group compute it together, so that none of them may find a file that another one lacks.
    """
    if vocabulary.tied or not isinstance(vocabulary.head, torch.Tensor):
        return None
    where = torch.linspace(0, vocabulary.size - 1, min(_SAMPLED_ROWS, vocabulary.size), dtype=torch.float64).long()
    where = where.to(vocabulary.device)
    digest = hashlib.blake2b(str((vocabulary.size, *vocabulary.head.shape)).encode(), digest_size=16)
    for rows in (vocabulary.embed(where), vocabulary.head[where.to(vocabulary.head.device)]):
        digest.update(rows.detach().to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return user_cache_path("avp-agents") / "ridge" / f"vllm-{digest.hexdigest()}.safetensors"
