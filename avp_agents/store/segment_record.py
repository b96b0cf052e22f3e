"""The durable form of one segment: its values, how they were made, and which segment it follows.

    magic "AVPS1\\n"   6 bytes
    header length     uint32
    header            msgpack map: version, fingerprint, dtype, parent, form, readout
    payload           int32 token ids, or embeddings [positions, hidden]; of a splice those of its parts, in order
    readout           where a stored context ends here: hidden state, int32 token ids, float32 probabilities
    MAC               32 bytes, keyed BLAKE2b over the segment's id and all before

The form is a map: kind ("tokens", "latent", "spliced") and positions; of latent steps also recipe, hidden and origin;
of a splice also prefix and the parts' forms. Everything is little-endian; bfloat16 and float16 are kept bit for bit.
"""

from __future__ import annotations

import math
import struct
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, cast

import msgpack
import numpy as np

from avp_agents.context import LatentRecipe, LatentSegment, Readout, Segment, SplicedSegment, TokenSegment
from avp_agents.errors import ConfigurationError, IntegrityError
from avp_agents.store.namespace import MAC_BYTES, Namespace

if TYPE_CHECKING:
    import torch

MAGIC = b"AVPS1\n"
VERSION = 2
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_PREFIX = struct.Struct("<6sI")


@dataclass(frozen=True)
class SegmentRecord:
    """One segment as it lies in a store.

    Attributes:
        segment: Token ids, latent embeddings, or a splice of both.
        fingerprint, dtype: The model's.
        parent: Id of the segment before it, None for the first.
        readout: That of the context that ends here, if one was stored.
    """

    segment: Segment
    fingerprint: str
    dtype: str
    parent: str | None
    readout: Readout | None


def encode_segment(record: SegmentRecord, segment_id: str, namespace: Namespace) -> bytes:
    """A record's bytes.

    Raises:
        ConfigurationError: Ids are not int32 >= 0, or a tensor has the wrong shape or dtype or is not finite.
    """
    readout = record.readout
    header = {
        "version": VERSION,
        "fingerprint": record.fingerprint,
        "dtype": record.dtype,
        "parent": record.parent,
        "form": _form(record.segment),
        "readout": [readout.hidden.numel(), readout.token_ids.numel()] if readout is not None else None,
    }
    packed = cast(bytes, msgpack.packb(header))
    body = payload_bytes(record.segment, record.dtype)
    if readout is not None:
        body += _readout_bytes(readout, record.dtype)
    content = _PREFIX.pack(MAGIC, len(packed)) + packed + body
    return namespace.signed(content, _label(segment_id))


def decode_segment(data: bytes, segment_id: str, namespace: Namespace) -> SegmentRecord:
    """The record that `data` holds. Nothing of it is used before its MAC is checked.

    Raises:
        IntegrityError: The bytes are torn, altered, another segment's, or of a version this release does not know.
    """
    if len(data) < _PREFIX.size + MAC_BYTES:
        raise IntegrityError(f"{len(data)} bytes are too few for a segment record")
    content = data[:-MAC_BYTES]
    magic, header_length = _PREFIX.unpack_from(content)
    if magic != MAGIC or header_length > len(content) - _PREFIX.size:
        raise IntegrityError("not a segment record")
    namespace.verified(data, _label(segment_id))
    start = _PREFIX.size + header_length
    header = msgpack.unpackb(content[_PREFIX.size : start])
    if header["version"] != VERSION:
        raise IntegrityError(f"record version {header['version']} is unknown to this release")
    return _parse(header, content[start:])


def payload_bytes(segment: Segment, dtype: str) -> bytes:
    """A segment's values: int32 ids, or embeddings in the model's dtype.

    Raises:
        ConfigurationError: They are out of range, not finite, or of another shape or dtype.
    """
    if isinstance(segment, SplicedSegment):
        return b"".join(payload_bytes(part, dtype) for part in segment.segments)
    if isinstance(segment, LatentSegment):
        _require(segment.embeddings.dim() == 2, "Latent embeddings must have the shape [steps, hidden].")
        return _float_bytes(segment.embeddings, dtype, "Latent embeddings")
    ids = np.asarray(segment.token_ids, dtype=np.int64)
    _require(ids.size == 0 or (ids.min() >= 0 and ids.max() < 2**31), "Token ids must lie in 0 .. 2**31 - 1.")
    return ids.astype("<i4").tobytes()


def _form(segment: Segment) -> dict[str, Any]:
    """What a segment is, all but its values."""
    form: dict[str, Any] = {"positions": len(segment)}
    if isinstance(segment, TokenSegment):
        return form | {"kind": "tokens"}
    if isinstance(segment, LatentSegment):
        hidden, recipe = int(segment.embeddings.shape[-1]), astuple(segment.recipe)
        return form | {"kind": "latent", "recipe": recipe, "hidden": hidden, "origin": segment.origin}
    return form | {"kind": "spliced", "prefix": segment.prefix, "parts": [_form(part) for part in segment.segments]}


def _readout_bytes(readout: Readout, dtype: str) -> bytes:
    k = readout.token_ids.numel()
    shapes = readout.hidden.dim(), readout.token_ids.shape, readout.probabilities.shape
    _require(shapes == (1, (k,), (k,)), "A readout has the shapes [hidden], [k] and [k].")
    return (
        _float_bytes(readout.hidden, dtype, "A readout's hidden state")
        + payload_bytes(TokenSegment(tuple(readout.token_ids.tolist())), dtype)
        + _float_bytes(readout.probabilities, "float32", "A readout's probabilities")
    )


def _float_bytes(tensor: torch.Tensor, dtype: str, what: str) -> bytes:
    import torch

    _require(dtype in DTYPE_BYTES, f"Unknown dtype {dtype!r}; use one of {', '.join(DTYPE_BYTES)}.")
    _require(tensor.dtype == getattr(torch, dtype), f"{what} must be {dtype}, not {tensor.dtype}.")
    _require(bool(tensor.isfinite().all()), f"{what} must be finite.")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigurationError(message)


def _label(segment_id: str) -> str:
    return "segment:" + segment_id


def _parse(header: dict[str, Any], body: bytes) -> SegmentRecord:
    """Header and body, authentic by now, as a record; sizes and values are checked all the same."""
    cursor = _Cursor(body)
    dtype = header["dtype"]
    segment = _parse_segment(header["form"], cursor, dtype)
    readout = None
    if header["readout"] is not None:
        hidden, k = header["readout"]
        readout = Readout(
            hidden=cursor.floats((hidden,), dtype),
            token_ids=cursor.token_ids_tensor(k),
            probabilities=cursor.floats((k,), "float32"),
        )
    cursor.finish()
    return SegmentRecord(segment, header["fingerprint"], dtype, header["parent"], readout)


def _parse_segment(form: dict[str, Any], cursor: _Cursor, dtype: str) -> Segment:
    positions = form["positions"]
    if form["kind"] == "tokens":
        return TokenSegment(tuple(cursor.token_ids(positions).tolist()))
    if form["kind"] == "latent":
        embeddings = cursor.floats((positions, form["hidden"]), dtype)
        return LatentSegment(embeddings, LatentRecipe(*form["recipe"]), form["origin"])
    parts = tuple(_parse_segment(part, cursor, dtype) for part in form["parts"])
    return SplicedSegment(parts, form["prefix"])


class _Cursor:
    """Reads a body from front to back, and refuses to read past its end or to leave a rest."""

    def __init__(self, body: bytes) -> None:
        self._body, self._offset = body, 0

    def token_ids(self, count: int) -> np.ndarray:
        ids = np.frombuffer(self._take(4 * count), dtype="<i4")
        if ids.size and ids.min() < 0:
            raise IntegrityError("negative token ids")
        return ids

    def token_ids_tensor(self, count: int) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.token_ids(count).astype(np.int64))

    def floats(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        import torch

        if dtype not in DTYPE_BYTES:
            raise IntegrityError(f"unknown dtype {dtype!r}")
        raw = bytearray(self._take(math.prod(shape) * DTYPE_BYTES[dtype]))
        if not raw:
            return torch.empty(shape, dtype=getattr(torch, dtype))
        tensor = torch.frombuffer(raw, dtype=getattr(torch, dtype)).reshape(shape)
        if not tensor.isfinite().all():
            raise IntegrityError("values that are not finite")
        return tensor

    def finish(self) -> None:
        if self._offset != len(self._body):
            raise IntegrityError("bytes left over")

    def _take(self, count: int) -> bytes:
        if count < 0 or self._offset + count > len(self._body):
            raise IntegrityError("shorter than its header says")
        self._offset += count
        return self._body[self._offset - count : self._offset]
