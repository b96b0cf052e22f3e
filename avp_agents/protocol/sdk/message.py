"""One message of the reference SDK: twelve bytes of header, protocol buffer metadata, and a body.

    "AV"  version (1)  flags  uint32 length of all that follows  uint32 length of the metadata  metadata  body

Flags: 1 the body is one zstd frame, 2 a map id is given, 4 the body is a KV-cache. All integers are little-endian. The
metadata's checksum is the CRC-32 of the body before compression.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from avp_agents.errors import ConfigurationError, ForeignMessageError
from avp_agents.protocol.limits import GIB, Limits
from avp_agents.protocol.sdk import wire

_HEADER = struct.Struct("<2sBBII")
KV_HEADER = struct.Struct("<IIIIB")
_MAGIC, _VERSION = b"AV", 1
_COMPRESSED, _HAS_MAP, _KV_CACHE = 1, 2, 4
_PAYLOADS = ("hidden_state", "kv_cache")
_MODES = ("latent", "json")
DTYPES = ("float32", "float16", "bfloat16")
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_MOST_EXPANSION, _FREE_EXPANSION = 64, 16 << 20
_LARGEST = 2**32 - 1

SDK_LIMITS = Limits(frame_bytes=4 * GIB, value_bytes=4 * GIB)


@dataclass(frozen=True)
class SdkMessage:
    """A message, its body decompressed.

    Attributes:
        payload_type: ``"kv_cache"`` or ``"hidden_state"``.
        body: Raw tensor bytes, behind a 17-byte header where it is a KV-cache; UTF-8 text in mode ``"json"``.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        mode: ``"latent"`` or ``"json"``.
        shape: Of hidden states; the SDK leaves it empty for a KV-cache.
        hidden_dim, num_layers: The model's, 0 where not given.
        model_id, session_id, source_agent_id, target_agent_id: As the sender has them, or empty.
        map_id: Which projection the sender made; empty for none.
        extra: More texts; of a context ``model_hash``, ``model_family`` and ``num_steps``.
    """

    payload_type: Literal["hidden_state", "kv_cache"]
    body: bytes | bytearray | memoryview = field(repr=False)
    dtype: str = "float32"
    mode: Literal["latent", "json"] = "latent"
    shape: tuple[int, ...] = ()
    hidden_dim: int = 0
    num_layers: int = 0
    model_id: str = ""
    session_id: str = ""
    source_agent_id: str = ""
    target_agent_id: str = ""
    map_id: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)


def encode_message(message: SdkMessage, *, zstd_level: int | None = None) -> bytes:
    """A message's bytes.

    Args:
        message: What to write.
        zstd_level: Compress the body, with 1, 3 or 19 as the SDK does, or any level that zstd has.

    Raises:
        ConfigurationError: A field is none that the SDK knows, the message exceeds 4 GiB, or zstandard is missing.
    """
    try:
        codes = {
            "payload_type": _PAYLOADS.index(message.payload_type),
            "dtype": DTYPES.index(message.dtype),
            "mode": _MODES.index(message.mode),
        }
    except ValueError as error:
        raise ConfigurationError(f"The reference SDK knows no such value: {error}.") from error
    numbers = (message.hidden_dim, message.num_layers, *message.shape)
    if not all(0 <= number <= _LARGEST for number in numbers):
        raise ConfigurationError("Dimensions and shapes of an SDK message are unsigned 32-bit numbers.")
    body = message.body
    fields = {
        "session_id": message.session_id, "source_agent_id": message.source_agent_id,
        "target_agent_id": message.target_agent_id, "model_id": message.model_id, "hidden_dim": message.hidden_dim,
        "num_layers": message.num_layers, "shape": message.shape, "map_id": message.map_id, "extra": message.extra,
        "compression": "" if zstd_level is None else "zstd", "checksum": zlib.crc32(body), **codes,
    }  # fmt: skip
    if zstd_level is not None:
        body = _zstandard().ZstdCompressor(level=zstd_level).compress(body)
    flags = _COMPRESSED * (zstd_level is not None) | _HAS_MAP * bool(message.map_id)
    flags |= _KV_CACHE * (message.payload_type == "kv_cache")
    metadata = wire.pack(fields)
    if len(metadata) + len(body) > _LARGEST:
        raise ConfigurationError("An SDK message holds less than 4 GiB; send a frame instead.")
    header = _HEADER.pack(_MAGIC, _VERSION, flags, len(metadata) + len(body), len(metadata))
    return b"".join((header, metadata, body))


def decode_message(data: bytes | bytearray | memoryview, *, limits: Limits = SDK_LIMITS) -> SdkMessage:
    """The message that `data` holds, its checksum right if it has one.

    A compressed body that would grow beyond its shape, beyond the limits, or beyond 64 times its size (above 16 MiB)
    is refused before it is decompressed.

    Raises:
        ForeignMessageError: It is malformed, damaged, of an unknown version, or uses what this release does not carry.
        FrameLimitError: It is larger than `limits` allow.
        ConfigurationError: It is compressed, and zstandard is missing.
    """
    view = memoryview(data).cast("B")
    flags, metadata_end = _parse_header(view, limits)
    fields = wire.unpack(view[_HEADER.size : metadata_end])
    limits.check("sections", len(fields["shape"]))
    compressed, has_map, is_kv = (bool(flags & bit) for bit in (_COMPRESSED, _HAS_MAP, _KV_CACHE))
    payload_type = _named(_PAYLOADS, fields["payload_type"], "payload type")
    said = (fields["compression"] == "zstd", bool(fields["map_id"]), payload_type == "kv_cache")
    if said != (compressed, has_map, is_kv) or fields["compression"] not in ("", "zstd"):
        raise ForeignMessageError("The message's flags contradict its metadata.")
    dtype = _named(DTYPES, fields["dtype"], "dtype")
    mode = _named(_MODES, fields["mode"], "mode")
    shape = tuple(fields["shape"])
    body: bytes | memoryview = view[metadata_end:]
    if compressed:
        expected = math.prod(shape) * DTYPE_BYTES[dtype] if shape and not is_kv else None
        body = _decompressed(body, expected, limits, is_kv=is_kv)
    if fields["checksum"] is not None and zlib.crc32(body) != fields["checksum"]:
        raise ForeignMessageError("The message's body does not match its checksum.")
    names = ("hidden_dim", "num_layers", "model_id", "session_id", "source_agent_id", "target_agent_id", "map_id")
    plain: dict[str, Any] = {name: fields[name] for name in names}
    return SdkMessage(payload_type, body, dtype, mode, shape, extra=fields["extra"], **plain)


def kv_shape(header: bytes | memoryview, limits: Limits) -> tuple[int, int, int, int, str, int]:
    """Layers, heads, head_dim, positions and dtype of a KV-cache's 17-byte header, and the body's length.

    Raises:
        ForeignMessageError: It is torn, empty, or of an unknown dtype.
        FrameLimitError: It announces more than `limits` allow.
    """
    if len(header) < KV_HEADER.size:
        raise ForeignMessageError("The message's KV-cache is shorter than its header.")
    layers, heads, width, positions, code = KV_HEADER.unpack_from(header)
    dtype = _named(DTYPES, code, "KV dtype")
    if not layers * heads * width * positions:
        raise ForeignMessageError("The message's KV-cache is empty.")
    size = KV_HEADER.size + 2 * layers * heads * width * positions * DTYPE_BYTES[dtype]
    limits.check("sections", 2 * layers)
    limits.check("value_bytes", size)
    return layers, heads, width, positions, dtype, size


def _parse_header(view: memoryview, limits: Limits) -> tuple[int, int]:
    """The flags, and where the metadata ends."""
    if len(view) < _HEADER.size or bytes(view[:2]) != _MAGIC:
        raise ForeignMessageError("This is not a message of the reference SDK: it does not begin with AV.")
    _, version, flags, payload_bytes, metadata_bytes = _HEADER.unpack_from(view)
    if version != _VERSION:
        raise ForeignMessageError(f"SDK message version {version} is unknown; this release reads version {_VERSION}.")
    if flags & ~(_COMPRESSED | _HAS_MAP | _KV_CACHE):
        raise ForeignMessageError(f"SDK message flags {flags:#04x} are unknown to this release.")
    limits.check("frame_bytes", payload_bytes)
    limits.check("metadata_bytes", metadata_bytes)
    if metadata_bytes > payload_bytes or len(view) != _HEADER.size + payload_bytes:
        raise ForeignMessageError(
            f"The message says that {payload_bytes} bytes follow its header, {metadata_bytes} of them metadata, but "
            f"{len(view) - _HEADER.size} do."
        )
    return flags, _HEADER.size + metadata_bytes


def _decompressed(body: memoryview, expected: int | None, limits: Limits, *, is_kv: bool) -> bytes:
    zstandard = _zstandard()
    try:
        announced = zstandard.get_frame_parameters(body).content_size
        limits.check("value_bytes", announced)
        if announced > max(_FREE_EXPANSION, _MOST_EXPANSION * len(body)):
            raise ForeignMessageError(f"{len(body)} compressed bytes announce {announced}; no tensor shrinks so much.")
        decompressor = zstandard.ZstdDecompressor()
        if is_kv:
            with decompressor.stream_reader(body) as stream:
                expected = kv_shape(stream.read(KV_HEADER.size), limits)[-1]
        if expected is not None and announced != expected:
            raise ForeignMessageError(f"The compressed body announces {announced} bytes, its shape says {expected}.")
        return decompressor.decompress(body, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ForeignMessageError(f"The message's body is not one whole zstd frame: {error}.") from error


def _named(names: tuple[str, ...], code: int, what: str) -> Any:
    if code >= len(names):
        raise ForeignMessageError(f"The message's {what} {code} is none of {', '.join(names)}.")
    return names[code]


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigurationError("Compressed messages need zstandard: pip install 'avp-agents[interop]'.") from error
    return zstandard
