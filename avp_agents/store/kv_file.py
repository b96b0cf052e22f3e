"""One segment's share of a KV-cache in a file: the positions it adds to what its ancestors' files hold.

The file is a plain safetensors file with the tensors ``layers.N.keys`` and ``layers.N.values``, each
``[kv_heads, positions, head_dim]`` in its own dtype. Its metadata names the first and last position, the lineage values
that the cache was computed from, and a MAC over the whole file with the MAC's own digits left out. They stand at a
fixed offset, so that the file is written in one pass and checked before anything in it is parsed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from typing_extensions import override

from avp_agents.errors import ConfigurationError, IntegrityError
from avp_agents.kv_cache import HostKv
from avp_agents.store.namespace import MAC_BYTES, Namespace

if TYPE_CHECKING:
    import torch

FORMAT = "avp-kv-1"
_LENGTH_BYTES = 8
_HEAD = b'{"__metadata__":{"mac":"'
_MAC_DIGITS = 2 * MAC_BYTES
_MAC_OFFSET = _LENGTH_BYTES + len(_HEAD)
_ALIGNMENT = 64
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_TORCH_NAMES = {code: name for name, code in _DTYPES.items()}

Signature = tuple[int, int, int]
"""Inode, size and time of writing of a file."""


@dataclass(frozen=True)
class Extent(ABC):
    """Where a segment's share of a KV-cache lies in the lineage.

    Attributes:
        start, stop: Which positions of the lineage.
        content: Digest of the lineage values up to this segment that the cache was computed from.
    """

    start: int
    stop: int
    content: str

    @abstractmethod
    def load(self) -> KvPart | None:
        """The share itself; None where it is gone, or not authentic."""

    def covers(self, other: Extent) -> bool:
        """Whether it holds all positions that the other does, computed from the same values."""
        return self.content == other.content and self.start <= other.start and other.stop <= self.stop


@dataclass(frozen=True)
class KvPart(Extent):
    """Positions ``start:stop`` of a KV-cache.

    Attributes:
        kv: The tensors, memory-mapped when they come from a file.
    """

    kv: HostKv

    @override
    def load(self) -> KvPart:
        return self

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Each tensor's dtype, heads and head dimension, the same in all parts of one cache."""
        return tuple((t.dtype, t.shape[0], t.shape[2]) for pair in self.kv.layers for t in pair)


def write_kv(file: BinaryIO, part: KvPart, segment_id: str, namespace: Namespace) -> None:
    """Write a part, one tensor in memory at a time.

    Raises:
        ConfigurationError: A tensor's dtype cannot be stored.
    """
    header = _header(part)
    mac = _mac(header, segment_id, namespace)
    file.write(header)
    for tensor in _tensors(part.kv):
        data = memoryview(_bytes_of(tensor))
        mac.update(data)
        file.write(data)
    file.seek(_MAC_OFFSET)
    file.write(mac.hexdigest().encode())


def kv_chunks(part: KvPart, segment_id: str, namespace: Namespace) -> Iterator[memoryview]:
    """The bytes that `write_kv` writes, in order, for where nothing can be written after what follows it.

    Raises:
        ConfigurationError: A tensor's dtype cannot be stored.
    """
    header = _header(part)
    mac = _mac(header, segment_id, namespace)
    for tensor in _tensors(part.kv):
        mac.update(memoryview(_bytes_of(tensor)))
    yield memoryview(header[:_MAC_OFFSET] + mac.hexdigest().encode() + header[_MAC_OFFSET + _MAC_DIGITS :])
    for tensor in _tensors(part.kv):
        yield memoryview(_bytes_of(tensor))


def kv_bytes(part: KvPart) -> int:
    """How many bytes `write_kv` writes."""
    return len(_header(part)) + part.kv.nbytes


def parse_kv(data: mmap.mmap | bytearray, segment_id: str, namespace: Namespace, *, trusted: bool = False) -> KvPart:
    """The part that `data` holds, as views of it.

    Args:
        data: The bytes.
        segment_id: Whose part it must be.
        namespace: Whose key its MAC must be made with.
        trusted: Leave out the MAC, which was checked before.

    Raises:
        IntegrityError: The bytes are torn, altered, or another segment's.
    """
    start = _tensors_start(data)
    if not trusted:
        _check_mac(data, segment_id, namespace)
    return _parse(json.loads(bytes(data[_LENGTH_BYTES:start])), data, start)


def read_kv(
    path: Path, segment_id: str, namespace: Namespace, *, trusted: Signature | None
) -> tuple[KvPart, Signature]:
    """Map a part into memory. It stays readable after the file was removed or replaced.

    Args:
        path: The file.
        segment_id, namespace: As for `parse_kv`.
        trusted: Signature of a file whose MAC this process has checked; the same file is not read through again.

    Returns:
        The part, and the signature of the file it is mapped from.

    Raises:
        FileNotFoundError: There is none.
        IntegrityError: The file is torn, altered, or another segment's.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size == 0:
            raise IntegrityError("an empty file is no KV file")
        try:
            # a private mapping: what a reader writes into these tensors never reaches the file
            mapped = mmap.mmap(file.fileno(), status.st_size, access=mmap.ACCESS_COPY)
        except ValueError as error:
            raise IntegrityError("shrank while it was opened") from error
    found = signature(status)
    return parse_kv(mapped, segment_id, namespace, trusted=found == trusted), found


def signature(status: os.stat_result) -> Signature:
    """The signature that tells a file from its replacement."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def join(pieces: Sequence[HostKv]) -> HostKv:
    """Consecutive pieces as one cache: a single one as it is, several copied."""
    import torch

    if len(pieces) == 1:
        return pieces[0]
    tensors = [torch.cat(same, dim=1) for same in zip(*(_tensors(piece) for piece in pieces), strict=True)]
    return HostKv(tuple(zip(tensors[::2], tensors[1::2], strict=True)))


def check_layers(kv: HostKv) -> None:
    """Refuse a cache that no file can represent.

    Raises:
        ConfigurationError: A tensor is not ``[kv_heads, length, head_dim]``, lengths differ, or a dtype is unknown.
    """
    for tensor in _tensors(kv):
        if tensor.dim() != 3 or tensor.shape[1] != kv.length:
            raise ConfigurationError(
                f"KV tensors are [kv_heads, {kv.length}, head_dim] in every layer, not {list(tensor.shape)}."
            )
        _dtype_code(tensor)


def _header(part: KvPart) -> bytes:
    """The safetensors header: metadata first, the MAC's digits still zero, padded so that tensors are aligned."""
    metadata = {
        "mac": "0" * _MAC_DIGITS,
        "format": FORMAT,
        "start": str(part.start),
        "stop": str(part.stop),
        "content": part.content,
    }
    entries: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in zip(_names(len(part.kv.layers)), _tensors(part.kv), strict=True):
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _dtype_code(tensor), "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _names(layers: int) -> Iterator[str]:
    for index in range(layers):
        yield f"layers.{index}.keys"
        yield f"layers.{index}.values"


def _tensors(kv: HostKv) -> Iterator[torch.Tensor]:
    for keys, values in kv.layers:
        yield keys
        yield values


def _dtype_code(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigurationError(f"A KV-cache of dtype {name} cannot be stored; use one of {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def _bytes_of(tensor: torch.Tensor) -> Any:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _tensors_start(data: mmap.mmap | bytearray) -> int:
    """Where the tensors begin in the bytes of a KV file, judged by its form alone."""
    if len(data) <= _MAC_OFFSET + _MAC_DIGITS:
        raise IntegrityError(f"{len(data)} bytes are too few for a KV file")
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    if start > len(data) or data[_LENGTH_BYTES:_MAC_OFFSET] != _HEAD:
        raise IntegrityError("not a KV file")
    return start


def _mac(begun: bytes | memoryview, segment_id: str, namespace: Namespace) -> hashlib.blake2b:
    """Over a file as far as it is there, but for the place of the MAC itself."""
    mac = namespace.mac("kv:" + segment_id)
    mac.update(begun[:_MAC_OFFSET])
    mac.update(begun[_MAC_OFFSET + _MAC_DIGITS :])
    return mac


def _check_mac(mapped: mmap.mmap | bytearray, segment_id: str, namespace: Namespace) -> None:
    with memoryview(mapped) as view:
        found = bytes(view[_MAC_OFFSET : _MAC_OFFSET + _MAC_DIGITS])
        mac = _mac(view, segment_id, namespace)
    if not hmac.compare_digest(found, mac.hexdigest().encode()):
        raise IntegrityError("MAC mismatch")


def _parse(entries: dict[str, Any], mapped: mmap.mmap | bytearray, start: int) -> KvPart:
    """The tensors that an authentic header describes, as views of the mapped file."""
    metadata = entries.pop("__metadata__")
    if metadata["format"] != FORMAT:
        raise IntegrityError(f"KV format {metadata['format']} is unknown to this release")
    tensors = [_view(entries[name], mapped, start) for name in _names(len(entries) // 2)]
    kv = HostKv(tuple(zip(tensors[::2], tensors[1::2], strict=True)))
    return KvPart(int(metadata["start"]), int(metadata["stop"]), metadata["content"], kv)


def _view(entry: dict[str, Any], mapped: mmap.mmap | bytearray, start: int) -> torch.Tensor:
    import torch

    begin, end = entry["data_offsets"]
    dtype = getattr(torch, _TORCH_NAMES[entry["dtype"]])
    flat = torch.frombuffer(mapped, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=start + begin)
    return flat.reshape(entry["shape"])
