"""Bodies of SDK messages as tensors and back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from avp_agents.errors import ConfigurationError, ForeignMessageError
from avp_agents.kv_cache import HostKv
from avp_agents.protocol.limits import Limits
from avp_agents.protocol.sdk.message import DTYPE_BYTES, DTYPES, KV_HEADER, SDK_LIMITS, SdkMessage, kv_shape
from avp_agents.protocol.tensor_bytes import bytes_of, tensor_from

if TYPE_CHECKING:
    import torch


def kv_of(message: SdkMessage, *, limits: Limits = SDK_LIMITS) -> HostKv:
    """The KV-cache in a message: per layer keys and values ``[kv_heads, positions, head_dim]``.

    The tensors are views of the body where it is writable memory.

    Raises:
        ForeignMessageError: The message holds none, or its body is not exactly as long as its header says.
        FrameLimitError: It is larger than `limits` allow.
    """
    if message.payload_type != "kv_cache":
        raise ForeignMessageError("The message holds hidden states, no KV-cache.")
    body = memoryview(message.body)
    layers, heads, width, positions, dtype, size = kv_shape(body[: KV_HEADER.size], limits)
    if len(body) != size:
        raise ForeignMessageError(f"The KV-cache's header describes {size} bytes, but the body has {len(body)}.")
    shape = (heads, positions, width)
    # the 17-byte header leaves the values unaligned
    values = memoryview(bytearray(body[KV_HEADER.size :]))
    step = math.prod(shape) * DTYPE_BYTES[dtype]
    tensors = [tensor_from(values[i * step : (i + 1) * step], dtype, shape) for i in range(2 * layers)]
    return HostKv(tuple(zip(tensors[::2], tensors[1::2], strict=True)))


def kv_message(kv: HostKv) -> SdkMessage:
    """A KV-cache as a message.

    Raises:
        ConfigurationError: The SDK's format cannot hold it: batched tensors, layers of different shapes or dtypes, a
            dtype it does not know, or no layers at all.
    """
    tensors = [tensor for pair in kv.layers for tensor in pair]
    if not tensors or not kv.length:
        raise ConfigurationError("An empty KV-cache cannot be sent.")
    first = tensors[0]
    dtype = _dtype(first)
    for tensor in tensors:
        if tensor.dim() != 3:
            raise ConfigurationError(
                f"The SDK's format holds one sequence, [kv_heads, positions, head_dim], not {list(tensor.shape)}."
            )
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            raise ConfigurationError(
                "The SDK's format has one shape and dtype for all layers; this KV-cache has several, as models with "
                "sliding windows do. Send a frame instead."
            )
    heads, positions, width = first.shape
    header = KV_HEADER.pack(len(kv.layers), heads, width, positions, DTYPES.index(dtype))
    body = b"".join([header, *(bytes_of(tensor) for tensor in tensors)])
    return SdkMessage("kv_cache", body, dtype, num_layers=len(kv.layers))


def hidden_states_of(message: SdkMessage) -> torch.Tensor:
    """The hidden states in a message, of the shape that it says.

    Raises:
        ForeignMessageError: The message holds none, or its body is not exactly as long as its shape says.
    """
    if message.payload_type != "hidden_state" or message.mode != "latent":
        raise ForeignMessageError("The message holds no hidden states.")
    size = math.prod(message.shape) * DTYPE_BYTES[message.dtype]
    if len(message.body) != size or not message.shape:
        raise ForeignMessageError(
            f"Hidden states of the shape {list(message.shape)} have {size} bytes, but the body has {len(message.body)}."
        )
    return tensor_from(memoryview(bytes(message.body)), message.dtype, message.shape)


def hidden_message(states: torch.Tensor) -> SdkMessage:
    """Hidden states as a message; their last dimension is the model's width.

    Raises:
        ConfigurationError: The SDK does not know their dtype.
    """
    dtype = _dtype(states)
    shape = tuple(states.shape)
    if not states.numel():
        raise ConfigurationError("Empty hidden states cannot be sent.")
    return SdkMessage("hidden_state", bytes(bytes_of(states)), dtype, shape=shape, hidden_dim=shape[-1])


def _dtype(tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigurationError(f"The SDK's format has no {dtype}; use one of {', '.join(DTYPES)}.")
    return dtype
