"""The durable form of segments, handles and shares of KV-caches: one msgpack map each, with its version and a MAC.

The MAC is over the record's kind, its id and all its bytes, so that no record can take another's place.

A segment is a map of its kind and its values: int32 token ids ("tokens"); embeddings [positions, hidden] with recipe
and origin ("latent"); or the parts of a splice, with its prefix ("spliced"). Where a stored context ends in it, the
record holds the readout too: hidden state, int32 token ids, float32 probabilities. Values are little-endian; bfloat16
and float16 are kept bit for bit.

The scope is not in a handle's record: the handle's id is a digest of recipe and scope, so a scope can be checked but
not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING, Any, cast

import msgpack
import numpy as np

from avp_agents.context import LatentRecipe, LatentSegment, Readout, Segment, SplicedSegment, TokenSegment
from avp_agents.errors import ConfigurationError, IntegrityError
from avp_agents.handle import ContextHandle
from avp_agents.store.namespace import Namespace

if TYPE_CHECKING:
    import torch

VERSION = 3
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SegmentRecord:
    """One segment as it lies in a store.

    Attributes:
        segment: Token ids, latent embeddings, or a splice of both.
        fingerprint, dtype: The model's.
        readout: That of the context that ends here, if one was stored.
    """

    segment: Segment
    fingerprint: str
    dtype: str
    readout: Readout | None


@dataclass(frozen=True)
class HandleRecord:
    """A stored handle.

    Attributes:
        handle: As it was first returned.
        recipe_id: The recipe of the context it stands for.
        ttl: Seconds after its last use; None where the store's own applies.
        stored: When it was put, in seconds since the epoch.
        segments: Ids of the lineage's segments, in order.
    """

    handle: ContextHandle
    recipe_id: str
    ttl: float | None
    stored: float
    segments: tuple[str, ...]


@dataclass(frozen=True)
class KvRecord:
    """Positions ``start:stop`` of a KV-cache, stored elsewhere.

    Attributes:
        start, stop: Which positions of the lineage.
        content: Digest of the lineage values up to this segment that the cache was computed from.
        payload: The name its bytes are stored under.
        size: Those bytes, as stored.
    """

    start: int
    stop: int
    content: str
    payload: str
    size: int


def encode_handle(record: HandleRecord, namespace: Namespace) -> bytes:
    """A handle's bytes."""
    return _encode(asdict(record), "handle:" + record.handle.id, namespace)


def decode_handle(data: bytes, handle_id: str, namespace: Namespace) -> HandleRecord:
    """The record that `data` holds. Nothing of it is used before its MAC is checked; so it is for all records.

    Raises:
        IntegrityError: The bytes are torn, altered, another handle's, or of a version this release does not know.
    """
    fields = _decode(data, "handle:" + handle_id, namespace)
    fields["handle"], fields["segments"] = ContextHandle(**fields["handle"]), tuple(fields["segments"])
    return HandleRecord(**fields)


def encode_kv_record(record: KvRecord, segment_id: str, namespace: Namespace) -> bytes:
    """The bytes of what is known of a segment's share of a KV-cache."""
    return _encode(asdict(record), "kv-record:" + segment_id, namespace)


def decode_kv_record(data: bytes, segment_id: str, namespace: Namespace) -> KvRecord:
    """The record that `data` holds.

    Raises:
        IntegrityError: The bytes are torn, altered, another segment's, or of a version this release does not know.
    """
    return KvRecord(**_decode(data, "kv-record:" + segment_id, namespace))


def encode_segment(record: SegmentRecord, segment_id: str, namespace: Namespace) -> bytes:
    """A segment's bytes.

    Raises:
        ConfigurationError: Ids are not int32 >= 0, or a tensor has the wrong shape or dtype or is not finite.
    """
    fields = {
        "fingerprint": record.fingerprint,
        "dtype": record.dtype,
        "segment": _packed(record.segment, record.dtype),
        "readout": _packed_readout(record.readout, record.dtype) if record.readout is not None else None,
    }
    return _encode(fields, "segment:" + segment_id, namespace)


def decode_segment(data: bytes, segment_id: str, namespace: Namespace) -> SegmentRecord:
    """The record that `data` holds; its values are checked too, though they are authentic.

    Raises:
        IntegrityError: The bytes are torn, altered, another segment's, or of a version this release does not know.
    """
    fields = _decode(data, "segment:" + segment_id, namespace)
    dtype, readout = fields["dtype"], fields["readout"]
    if dtype not in DTYPES:
        raise IntegrityError(f"unknown dtype {dtype!r}")
    return SegmentRecord(
        segment=_unpacked(fields["segment"], dtype),
        fingerprint=fields["fingerprint"],
        dtype=dtype,
        readout=_unpacked_readout(readout, dtype) if readout is not None else None,
    )


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


def _encode(fields: Mapping[str, Any], label: str, namespace: Namespace) -> bytes:
    return namespace.signed(cast(bytes, msgpack.packb({"version": VERSION, **fields})), label)


def _decode(data: bytes, label: str, namespace: Namespace) -> dict[str, Any]:
    content = namespace.verified(data, label)
    try:
        fields = msgpack.unpackb(content)
    except (ValueError, msgpack.UnpackException) as error:
        raise IntegrityError("not a record of a form this release knows") from error
    version = fields.pop("version", None) if isinstance(fields, dict) else None
    if version != VERSION:
        raise IntegrityError(f"record version {version} is unknown to this release")
    return fields


def _packed(segment: Segment, dtype: str) -> dict[str, Any]:
    if isinstance(segment, SplicedSegment):
        parts = [_packed(part, dtype) for part in segment.segments]
        return {"kind": "spliced", "prefix": segment.prefix, "parts": parts}
    values = payload_bytes(segment, dtype)
    if isinstance(segment, TokenSegment):
        return {"kind": "tokens", "values": values}
    hidden, recipe = int(segment.embeddings.shape[-1]), astuple(segment.recipe)
    return {"kind": "latent", "values": values, "hidden": hidden, "recipe": recipe, "origin": segment.origin}


def _unpacked(fields: Mapping[str, Any], dtype: str) -> Segment:
    if fields["kind"] == "spliced":
        return SplicedSegment(tuple(_unpacked(part, dtype) for part in fields["parts"]), fields["prefix"])
    if fields["kind"] == "tokens":
        return TokenSegment(tuple(_ids(fields["values"]).tolist()))
    embeddings = _floats(fields["values"], dtype).reshape(-1, fields["hidden"])
    return LatentSegment(embeddings, LatentRecipe(*fields["recipe"]), fields["origin"])


def _packed_readout(readout: Readout, dtype: str) -> dict[str, bytes]:
    k = readout.token_ids.numel()
    shapes = readout.hidden.dim(), readout.token_ids.shape, readout.probabilities.shape
    _require(shapes == (1, (k,), (k,)), "A readout has the shapes [hidden], [k] and [k].")
    return {
        "hidden": _float_bytes(readout.hidden, dtype, "A readout's hidden state"),
        "token_ids": payload_bytes(TokenSegment(tuple(readout.token_ids.tolist())), dtype),
        "probabilities": _float_bytes(readout.probabilities, "float32", "A readout's probabilities"),
    }


def _unpacked_readout(fields: Mapping[str, bytes], dtype: str) -> Readout:
    import torch

    return Readout(
        hidden=_floats(fields["hidden"], dtype),
        token_ids=torch.from_numpy(_ids(fields["token_ids"]).astype(np.int64)),
        probabilities=_floats(fields["probabilities"], "float32"),
    )


def _float_bytes(tensor: torch.Tensor, dtype: str, what: str) -> bytes:
    import torch

    _require(dtype in DTYPES, f"Unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}.")
    _require(tensor.dtype == getattr(torch, dtype), f"{what} must be {dtype}, not {tensor.dtype}.")
    _require(bool(tensor.isfinite().all()), f"{what} must be finite.")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigurationError(message)


def _ids(values: bytes) -> np.ndarray:
    ids = np.frombuffer(values, dtype="<i4")
    if ids.size and ids.min() < 0:
        raise IntegrityError("negative token ids")
    return ids


def _floats(values: bytes, dtype: str) -> torch.Tensor:
    import torch

    if not values:
        return torch.empty(0, dtype=getattr(torch, dtype))
    tensor = torch.frombuffer(bytearray(values), dtype=getattr(torch, dtype))
    if not tensor.isfinite().all():
        raise IntegrityError("values that are not finite")
    return tensor
