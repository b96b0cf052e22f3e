"""The KV-cache of a lineage, as a value: its length, its bytes, and its tensors when somebody asks for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class KvCache(ABC):
    """The KV-cache of a lineage's first `length` positions, wherever it lies.

    A value: `length` positions never change. An implementation may lose its memory (eviction); then `available` turns
    False and `to_host` raises `KvMemoryError`.
    """

    length: int

    @property
    @abstractmethod
    def available(self) -> bool:
        """Whether the tensors can still be read."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of keys and values."""

    @property
    @abstractmethod
    def on_device(self) -> bool:
        """Whether the tensors lie in an engine's own KV pool (and count against its budget, not a store's)."""

    @abstractmethod
    def to_host(self, start: int = 0, stop: int | None = None) -> HostKv:
        """Positions ``start:stop`` as host tensors. Copies when the cache is on a device, else returns views."""


@dataclass(frozen=True, eq=False)
class HostKv(KvCache):
    """A KV-cache in host memory (or memory-mapped), in the model-neutral layout.

    Attributes:
        layers: One ``(keys, values)`` pair per layer, each ``[kv_heads, length, head_dim]``; keys carry their rotation.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @property
    def length(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Positions held."""
        return int(self.layers[0][0].shape[1]) if self.layers else 0

    @property
    def available(self) -> bool:
        """Always: host tensors are owned by this object."""
        return True

    @property
    def on_device(self) -> bool:
        """Never."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(t.numel() * t.element_size() for pair in self.layers for t in pair)

    def to_host(self, start: int = 0, stop: int | None = None) -> HostKv:
        """Views of positions ``start:stop``."""
        if start == 0 and stop in (None, self.length):
            return self
        return HostKv(tuple((k[:, start:stop], v[:, start:stop]) for k, v in self.layers))
