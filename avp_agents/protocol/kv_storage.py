"""How keys and values are stored in a frame: as they are, as int8 with scales, compressed, or both.

int8 rounds each channel of each head to 255 levels of its own: ``scale = max|x| / 127`` over the positions, and a value
comes back as ``level * scale``. The scales, float32 ``[heads, head_dim]``, come first and are padded to 64 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from avp_agents.errors import ConfigurationError, FrameError, FrameLimitError
from avp_agents.protocol.frame_encoding import Payload
from avp_agents.protocol.frame_metadata import FLOAT_BYTES, QuantisationError, Section, SectionKind, aligned
from avp_agents.protocol.tensor_bytes import bytes_of, pieces_of, tensor_from

if TYPE_CHECKING:
    import torch

_ZSTD_LEVEL = 1
_LEVELS = 127


def store_tensor(tensor: torch.Tensor, kind: SectionKind, layer: int, *, compress: bool, quantise: bool) -> Payload:
    """Keys or values of one layer, ready for a frame.

    As they are, they stay views of the tensor. Rounding and compression take their result's memory at once, since
    sizes and errors stand at the frame's front.

    Raises:
        ConfigurationError: The tensor is not ``[heads, positions, head_dim]`` of a known dtype, not finite where it is
            to be rounded, or zstandard is missing.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.dim() != 3 or dtype not in FLOAT_BYTES:
        raise ConfigurationError(
            f"Keys and values are [heads, positions, head_dim] in {', '.join(FLOAT_BYTES)}, not "
            f"{list(tensor.shape)} in {dtype}."
        )
    plain = Section(kind, dtype, tuple(tensor.shape), 0, layer)
    if quantise:
        scales, levels, error = _quantised(tensor)
        section = replace(plain, int8=error)
        pieces = [bytes_of(scales), memoryview(bytes(-4 * scales.numel() % 64)), bytes_of(levels)]
    else:
        section, pieces = plain, None
    section = replace(section, stored_bytes=section.plain_bytes)
    if compress:
        packed = _compressed(pieces if pieces is not None else pieces_of(tensor), section.plain_bytes)
        return Payload(replace(section, stored_bytes=len(packed), compression="zstd"), lambda: (memoryview(packed),))
    if pieces is not None:
        return Payload(section, lambda: pieces)
    return Payload(section, lambda: pieces_of(tensor))


def load_tensor(section: Section, stored: memoryview) -> torch.Tensor:
    """The tensor that a section of keys or values holds.

    Raises:
        FrameError: The stored bytes are not what the section says.
        ConfigurationError: They are compressed, and zstandard is missing.
    """
    plain = stored if section.compression is None else _decompressed(section, stored)
    if section.int8 is None:
        return tensor_from(plain, section.dtype, section.shape)
    return _restored(section, plain)


def _quantised(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, QuantisationError]:
    """Scales, levels and the error, one head at a time."""
    import torch

    heads, positions, width = tensor.shape
    scales = torch.zeros(heads, width)
    levels = torch.zeros(heads, positions, width, dtype=torch.int8)
    largest = error_square = square = 0.0
    for head in range(heads if positions else 0):
        values = tensor[head].detach().cpu().float()
        if not values.isfinite().all():
            raise ConfigurationError("Keys and values that are not finite cannot be rounded to int8.")
        scales[head] = values.abs().amax(dim=0) / _LEVELS
        steps = scales[head].clamp(min=torch.finfo(torch.float32).tiny)
        levels[head] = (values / steps).round().clamp(-_LEVELS, _LEVELS).to(torch.int8)
        error = (levels[head].float() * scales[head]).to(tensor.dtype).float() - values
        largest = max(largest, error.abs().max().item())
        error_square += error.double().square().sum().item()
        square += values.double().square().sum().item()
    return scales, levels, QuantisationError(largest, math.sqrt(error_square / square) if square else 0.0)


def _restored(section: Section, plain: memoryview) -> torch.Tensor:
    import torch

    heads, _, width = section.shape
    end = heads * width * FLOAT_BYTES["float32"]
    if any(plain[end : aligned(end)]):
        raise FrameError("The bytes between int8 scales and levels must be zero.")
    scales = tensor_from(plain[:end], "float32", (heads, width))
    if not scales.isfinite().all():
        raise FrameError("int8 scales must be finite.")
    levels = tensor_from(plain[aligned(end) :], "int8", section.shape)
    values = torch.empty(section.shape, dtype=getattr(torch, section.dtype))
    for head in range(heads):
        values[head] = levels[head].float().mul_(scales[head])
    return values


def _compressed(pieces: Iterable[memoryview], size: int) -> bytes:
    compressor = _zstandard().ZstdCompressor(level=_ZSTD_LEVEL).compressobj(size=size)
    return b"".join([*(compressor.compress(piece) for piece in pieces), compressor.flush()])


def _decompressed(section: Section, stored: memoryview) -> memoryview:
    """The plain bytes; never more than the section's shape says, which is within the limits."""
    zstandard = _zstandard()
    try:
        announced = zstandard.get_frame_parameters(stored).content_size
        if announced != section.plain_bytes:
            raise FrameError(f"A compressed section announces {announced} bytes, its shape says {section.plain_bytes}.")
        plain = zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FrameError(f"A section of {section.kind} is not one whole zstd frame: {error}.") from error
    except MemoryError as error:
        raise FrameLimitError(f"There is no memory for {section.plain_bytes} bytes of a section.") from error
    if len(plain) != section.plain_bytes:
        raise FrameError(f"A section of {section.kind} is shorter than its shape says.")
    return memoryview(plain)


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigurationError("Compressed frames need zstandard: pip install 'avp-agents[interop]'.") from error
    return zstandard


def stored_layers(sections: Iterator[tuple[Section, memoryview]]) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Pairs of keys and values, layer by layer, out of a frame's sections."""
    tensors = [load_tensor(section, stored) for section, stored in sections if section.is_kv]
    return tuple(zip(tensors[::2], tensors[1::2], strict=True))
