"""A worker's paged keys and values, read and written by position in the model-neutral layout.

Writing is the attention backend's own operation. Reading has none, so the layout is found out once per kind of layer:
numbered values are written into a block that holds nobody's, and where each of them came to lie is looked up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size, get_tp_group
from vllm.model_executor.models.utils import extract_layer_index

from avp_agents.errors import ConfigurationError, UnsupportedModelError
from avp_agents.kv_cache import HostKv

_NOBODYS_BLOCK = 0
"""vLLM's null block: it stands for positions that nobody looks at."""
_DIGIT = 128
"""Numbers are written digit by digit; up to this base, bfloat16 holds them exactly."""


@dataclass(frozen=True)
class _Layer:
    """An attention layer of this worker.

    Attributes:
        module: vLLM's, with its attention backend.
        cache: Its blocks, ``[blocks, kv_heads, block_size, key_dim + value_dim]``; how a block is filled is the
            backend's business.
    """

    module: Any
    cache: torch.Tensor

    @property
    def kv_heads(self) -> int:
        return int(self.cache.shape[1])

    @property
    def block_size(self) -> int:
        return int(self.cache.shape[2])

    @property
    def head_dim(self) -> int:
        return int(self.cache.shape[3]) // 2

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Keys and values ``[positions, kv_heads, head_dim]`` into slots ``[positions]``."""
        self.module.impl.do_kv_cache_update(self.module, keys, values, self.cache, slots)

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        """Keys and values at slots ``[positions]``, ``[2, kv_heads, positions, head_dim]``."""
        blocks, offsets = slots // self.block_size, slots % self.block_size
        used, inverse = blocks.unique(return_inverse=True)
        held = self.cache[used].flatten(1)[:, self._order]
        held = held.view(len(used), 2, self.kv_heads, self.block_size, self.head_dim)
        return held[inverse, :, :, offsets].permute(1, 2, 0, 3)

    @cached_property
    def _order(self) -> torch.Tensor:
        """Where in a block's memory the elements ``[2, kv_heads, block_size, head_dim]`` lie, flat."""
        half = self.kv_heads * self.block_size * self.head_dim
        device = self.cache.device
        slots = torch.arange(self.block_size, device=device) + _NOBODYS_BLOCK * self.block_size
        numbers = torch.arange(2 * half, device=device)
        found = torch.zeros(2 * half, dtype=torch.long, device=device)
        place = 1
        while place < 2 * half:
            digits = (numbers // place % _DIGIT).to(self.cache.dtype)
            shape = self.kv_heads, self.block_size, self.head_dim
            keys, values = (part.view(shape).transpose(0, 1).contiguous() for part in digits.split(half))
            self.write(keys, values, slots)
            found += self.cache[_NOBODYS_BLOCK].flatten().long() * place
            place *= _DIGIT
        self.cache[_NOBODYS_BLOCK] = 0
        order = torch.zeros_like(found)
        order[found] = numbers
        if not torch.equal(found[order], numbers):
            raise UnsupportedModelError("This attention backend does not keep keys and values as they are.")
        return order


class KvBlocks:
    """All layers' keys and values in this worker.

    Args:
        config: vLLM's.
        caches: vLLM's KV-caches by layer name.

    Raises:
        ConfigurationError: They are no plain keys and values in the model's dtype.
    """

    def __init__(self, config: VllmConfig, caches: Mapping[str, torch.Tensor]) -> None:
        model = config.model_config
        modules = config.compilation_config.static_forward_context
        self._layers = [_Layer(modules[name], caches[name]) for name in sorted(caches, key=extract_layer_index)]
        self._total_heads = int(model.get_total_num_kv_heads())
        self.dtype = model.dtype
        heads, head_dim = model.get_num_kv_heads(config.parallel_config), int(model.get_head_size())
        for layer in self._layers:
            plain = layer.cache.ndim == 4 and layer.cache.dtype == self.dtype
            if not plain or (layer.kv_heads, layer.head_dim) != (heads, head_dim):
                raise ConfigurationError(
                    f"The store connector moves plain keys and values only; this vLLM keeps {layer.cache.dtype} "
                    f"{list(layer.cache.shape[1:])} per block. Serve {model.model} with --kv-cache-dtype auto, or "
                    "without kv_store."
                )
            if not hasattr(layer.module.impl, "do_kv_cache_update"):
                raise ConfigurationError("The store connector needs an attention backend that writes keys by itself.")

    def check(self, kv: HostKv) -> None:
        """Refuse keys and values that this model cannot have made.

        Raises:
            ConfigurationError: Their layers, heads, dimensions or dtype are others.
        """
        found = {(*keys.shape[::2], *values.shape[::2], keys.dtype, values.dtype) for keys, values in kv.layers}
        head_dim = self._layers[0].head_dim
        wanted = (self._total_heads, head_dim, self._total_heads, head_dim, self.dtype, self.dtype)
        if found != {wanted} or len(kv.layers) != len(self._layers):
            raise ConfigurationError(f"The stored keys and values are {found}, this model's are {wanted}.")

    def write(self, kv: HostKv, block_ids: Sequence[int], start: int, stop: int, block_size: int) -> None:
        """Write positions ``start:stop`` of a context into a request's blocks.

        Args:
            kv: From position 0 on; checked.
            block_ids: The request's, of `block_size` positions each.
            start, stop: Positions.
            block_size: As vLLM's scheduler counts.
        """
        heads = self._own_heads()
        slots = self._slots(block_ids, start, stop, block_size)
        for layer, (keys, values) in zip(self._layers, kv.layers, strict=True):
            own_keys, own_values = (
                tensor[heads, start:stop].transpose(0, 1).contiguous().to(slots.device) for tensor in (keys, values)
            )
            layer.write(own_keys, own_values, slots)

    def read(self, block_ids: Sequence[int], length: int, block_size: int) -> HostKv | None:
        """The first positions of a request, as all ranks together hold them; None on ranks after the first."""
        slots = self._slots(block_ids, 0, length, block_size)
        own = torch.stack([layer.read(slots) for layer in self._layers])
        ranks = get_tensor_model_parallel_world_size()
        if ranks > 1:
            own = get_tp_group().all_gather(own, dim=2)
            # where ranks share a head, each of them has it
            own = own[:, :, :: max(1, own.shape[2] // self._total_heads)]
            if get_tensor_model_parallel_rank() > 0:
                return None
        held = own.cpu()
        return HostKv(tuple((keys.contiguous(), values.contiguous()) for keys, values in held))

    def _own_heads(self) -> slice:
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        count = self._layers[0].kv_heads
        first = rank * count if count * ranks == self._total_heads else rank * self._total_heads // ranks
        return slice(first, first + count)

    def _slots(self, block_ids: Sequence[int], start: int, stop: int, block_size: int) -> torch.Tensor:
        positions = torch.arange(start, stop)
        blocks = torch.tensor(block_ids)[positions // block_size]
        return (blocks * block_size + positions % block_size).to(self._layers[0].cache.device)
