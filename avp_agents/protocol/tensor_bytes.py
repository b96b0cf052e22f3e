"""Tensors as bytes and back, without a copy where their memory allows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    import torch


def empty_buffer(size: int) -> memoryview:
    """Writable memory whose pages are only taken when they are written to.

    Raises:
        MemoryError: There is not that much.
    """
    return memoryview(cast(Any, np.empty(size, dtype=np.uint8)))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in C order: a view where it is contiguous and on the CPU, else a copy."""
    import torch

    return memoryview(cast(Any, tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))


def pieces_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, one view if it is contiguous, else piece by piece along its first axis.

    Keys and values that are cut out of a longer cache are contiguous per head, so that they are not copied either.
    """
    if tensor.is_contiguous():
        yield bytes_of(tensor)
    else:
        for part in tensor:
            yield bytes_of(part)


def tensor_from(stored: memoryview, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over `stored`: a view where that is writable, else a copy, since tensors cannot be made read-only."""
    import torch

    floats = getattr(torch, dtype)
    if not math.prod(shape):
        return torch.empty(shape, dtype=floats)
    return torch.frombuffer(bytearray(stored) if stored.readonly else stored, dtype=floats).reshape(shape)
