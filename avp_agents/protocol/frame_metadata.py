"""What a frame's metadata says: which value it carries, of which model, and what lies in each section.

The metadata is a msgpack map. It is read strictly: a key that is missing, unknown or given twice, a wrong type, and a
value that contradicts another are all refused. `docs/protocol.md` has the tables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import msgpack

from avp_agents.context import LatentRecipe
from avp_agents.errors import FrameError
from avp_agents.protocol.limits import Limits

FrameKind = Literal["context", "hidden_states", "text"]
SectionKind = Literal[
    "tokens", "latents", "readout_hidden", "readout_tokens", "readout_probabilities", "keys", "values", "hidden_states",
    "text",
]  # fmt: skip

ALIGNMENT = 64
FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_DTYPE_BYTES = {**FLOAT_BYTES, "int32": 4, "uint8": 1}
_FIXED_DTYPES = {"tokens": "int32", "readout_tokens": "int32", "readout_probabilities": "float32", "text": "uint8"}
_DIMENSIONS = {
    "tokens": 1, "latents": 2, "readout_hidden": 1, "readout_tokens": 1, "readout_probabilities": 1, "keys": 3,
    "values": 3, "hidden_states": 2, "text": 1,
}  # fmt: skip
_READOUT = ("readout_hidden", "readout_tokens", "readout_probabilities")
_METHODS = ("soft", "ridge", "rescale", "projection")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LARGEST = 2**48
_DEEPEST_SPLICE = 32


@dataclass(frozen=True)
class QuantisationError:
    """What rounding keys or values to int8 changed, measured when the frame was made.

    Attributes:
        max_error: Largest absolute difference.
        rms_error: Root mean square of the difference over that of the values.
    """

    max_error: float
    rms_error: float


@dataclass(frozen=True)
class Splice:
    """Lineage sections that were computed behind the first `prefix` positions alone, then moved to where they are.

    Attributes:
        prefix: Positions of the lineage that they saw.
        parts: Indices of sections, and splices of their own, in order.
    """

    prefix: int
    parts: tuple[int | Splice, ...]


@dataclass(frozen=True)
class Section:
    """One payload section.

    Attributes:
        kind: What it holds.
        dtype: Of the values once they are decoded.
        shape: Of the values once they are decoded.
        stored_bytes: Its bytes in the frame, padding not counted.
        layer: Which layer keys or values belong to; None for the other kinds.
        recipe: How latents were made; None for the other kinds.
        origin: The recipe id that latents were made behind, where they were joined to another lineage.
        compression: ``"zstd"`` where the stored bytes are one zstd frame; only for keys and values.
        int8: Present where keys or values are stored as int8 with float32 scales, one per head and channel.
    """

    kind: SectionKind
    dtype: str
    shape: tuple[int, ...]
    stored_bytes: int
    layer: int | None = None
    recipe: LatentRecipe | None = None
    origin: str | None = None
    compression: Literal["zstd"] | None = None
    int8: QuantisationError | None = None

    @property
    def is_kv(self) -> bool:
        """Whether it holds keys or values, which lie behind the head."""
        return self.kind in ("keys", "values")

    @property
    def value_bytes(self) -> int:
        """Bytes of the decoded values."""
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]

    @property
    def plain_bytes(self) -> int:
        """Stored bytes before compression."""
        if self.int8 is None:
            return self.value_bytes
        heads, positions, width = self.shape
        return aligned(heads * width * FLOAT_BYTES["float32"]) + heads * positions * width


@dataclass(frozen=True)
class Metadata:
    """What a frame holds.

    Attributes:
        kind: Which value.
        fingerprint: Of the model that it belongs to; None for text.
        dtype: The model's; None for text.
        sections: In the order in which they lie in the frame.
        splices: How the lineage's sections are nested; None where no context was spliced into another.
    """

    kind: FrameKind
    fingerprint: str | None
    dtype: str | None
    sections: tuple[Section, ...]
    splices: tuple[int | Splice, ...] | None = None

    def __post_init__(self) -> None:
        _check_model(self)
        {"context": _check_context, "hidden_states": _check_single, "text": _check_single}[self.kind](self)

    def to_fields(self) -> dict[str, Any]:
        """The map that the metadata is."""
        fields = {"kind": self.kind, "sections": [_packed(section) for section in self.sections]}
        if self.fingerprint is not None:
            fields |= {"fingerprint": self.fingerprint, "dtype": self.dtype}
        if self.splices is not None:
            fields["splices"] = [_packed_splice(part) for part in self.splices]
        return fields

    @property
    def positions(self) -> int:
        """Positions of the lineage; 0 where there is none."""
        return sum(s.shape[0] for s in self.sections if s.kind in ("tokens", "latents"))

    @property
    def kv_positions(self) -> int:
        """Positions of the KV-cache; 0 where there is none."""
        return next((s.shape[1] for s in self.sections if s.is_kv), 0)

    @property
    def layers(self) -> int:
        """Layers of the KV-cache."""
        return sum(s.kind == "keys" for s in self.sections)


def aligned(offset: int) -> int:
    """`offset`, or the next multiple of 64."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def pack_metadata(metadata: Metadata) -> bytes:
    """The metadata's bytes."""
    return cast(bytes, msgpack.packb(metadata.to_fields()))


def unpack_metadata(data: bytes | memoryview, limits: Limits) -> Metadata:
    """The metadata that `data` holds.

    Raises:
        FrameError: It is malformed, or says something that this release does not know.
        FrameLimitError: It has more sections, or they hold more, than `limits` allow.
    """
    try:
        fields = msgpack.unpackb(data, object_pairs_hook=_unique_keys, strict_map_key=True)
    except FrameError:
        raise
    except (ValueError, RecursionError) as error:  # msgpack's own exceptions are ValueErrors
        raise FrameError("The frame's metadata is not msgpack.") from error
    given = _fields(fields, "metadata", required=("kind", "sections"), optional=("fingerprint", "dtype", "splices"))
    kind = _one_of(given["kind"], ("context", "hidden_states", "text"), "frame kind")
    entries = given["sections"]
    _require(isinstance(entries, list), "sections are a list")
    limits.check("sections", len(entries))
    sections = tuple(_section(entry) for entry in entries)
    limits.check("value_bytes", sum(max(section.value_bytes, section.plain_bytes) for section in sections))
    splices = _splices(given["splices"], depth=0) if "splices" in given else None
    return Metadata(kind, given.get("fingerprint"), given.get("dtype"), sections, splices)


def _packed_splice(part: int | Splice) -> Any:
    if isinstance(part, int):
        return part
    return {"prefix": part.prefix, "parts": [_packed_splice(inner) for inner in part.parts]}


def _splices(entries: Any, depth: int) -> tuple[int | Splice, ...]:
    _require(isinstance(entries, list), "splices are lists")
    _require(depth <= _DEEPEST_SPLICE, f"splices nest {_DEEPEST_SPLICE} deep at most")
    return tuple(_splice(entry, depth + 1) if isinstance(entry, dict) else _count(entry, "a part") for entry in entries)


def _splice(entry: Any, depth: int) -> Splice:
    given = _fields(entry, "a splice", required=("prefix", "parts"))
    return Splice(_count(given["prefix"], "prefix"), _splices(given["parts"], depth))


def leaf_indices(parts: Sequence[int | Splice]) -> list[int]:
    """The section indices in a nested lineage, in order."""
    return [leaf for part in parts for leaf in ([part] if isinstance(part, int) else leaf_indices(part.parts))]


def _packed(section: Section) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "kind": section.kind,
        "dtype": section.dtype,
        "shape": list(section.shape),
        "bytes": section.stored_bytes,
    }
    if section.layer is not None:
        fields["layer"] = section.layer
    if section.recipe is not None:
        fields["recipe"] = asdict(section.recipe)
    if section.origin is not None:
        fields["origin"] = section.origin
    if section.compression is not None:
        fields["compression"] = section.compression
    if section.int8 is not None:
        fields["int8"] = asdict(section.int8)
    return fields


def _section(entry: Any) -> Section:
    """A section, its sizes consistent with each other."""
    kind = _one_of(entry.get("kind") if isinstance(entry, dict) else None, tuple(_DIMENSIONS), "section kind")
    is_kv = kind in ("keys", "values")
    own = ("layer",) if is_kv else ("recipe",) if kind == "latents" else ()
    given = _fields(
        entry,
        f"section {kind}",
        required=("kind", "dtype", "shape", "bytes", *own),
        optional=("compression", "int8") if is_kv else ("origin",) if kind == "latents" else (),
    )
    dtype = _one_of(given["dtype"], (_FIXED_DTYPES[kind],) if kind in _FIXED_DTYPES else tuple(FLOAT_BYTES), "dtype")
    shape = given["shape"]
    _require(isinstance(shape, list) and len(shape) == _DIMENSIONS[kind], f"{kind} have {_DIMENSIONS[kind]} dimensions")
    section = Section(
        kind=kind,
        dtype=dtype,
        shape=tuple(_count(extent, "an extent") for extent in shape),
        stored_bytes=_count(given["bytes"], "a section's size"),
        layer=_count(given["layer"], "a layer") if is_kv else None,
        recipe=_recipe(given["recipe"]) if kind == "latents" else None,
        origin=_digest(given["origin"], "origin") if "origin" in given else None,
        compression=_one_of(given["compression"], ("zstd",), "compression") if "compression" in given else None,
        int8=_quantisation_error(given["int8"]) if "int8" in given else None,
    )
    if section.compression is None:
        _require(section.stored_bytes == section.plain_bytes, f"{kind} of this shape take {section.plain_bytes} bytes")
    return section


def _recipe(entry: Any) -> LatentRecipe:
    names = ("method", "k", "temperature", "renormalise", "steps", "stop_cosine", "stop_entropy")
    given = _fields(entry, "recipe", required=names)
    _require(isinstance(given["renormalise"], bool), "renormalise is a boolean")
    return LatentRecipe(
        method=_one_of(given["method"], _METHODS, "latent method"),
        k=None if given["k"] is None else _count(given["k"], "k"),
        temperature=_number(given["temperature"], "temperature"),
        renormalise=given["renormalise"],
        steps=_count(given["steps"], "steps"),
        stop_cosine=None if given["stop_cosine"] is None else _number(given["stop_cosine"], "stop_cosine"),
        stop_entropy=None if given["stop_entropy"] is None else _number(given["stop_entropy"], "stop_entropy"),
    )


def _quantisation_error(entry: Any) -> QuantisationError:
    given = _fields(entry, "int8", required=("max_error", "rms_error"))
    return QuantisationError(*(_number(given[name], name) for name in ("max_error", "rms_error")))


def _check_model(metadata: Metadata) -> None:
    """A fingerprint and a dtype are there exactly where the value belongs to a model."""
    if metadata.kind == "text":
        _require((metadata.fingerprint, metadata.dtype) == (None, None), "text belongs to no model")
        return
    _digest(metadata.fingerprint, "fingerprint")
    _one_of(metadata.dtype, tuple(FLOAT_BYTES), "dtype")


def _check_single(metadata: Metadata) -> None:
    kinds = [section.kind for section in metadata.sections]
    _require(kinds == [metadata.kind], f"a {metadata.kind} frame has one section, of that kind")
    _require(metadata.splices is None, "only contexts are spliced")
    _require(metadata.dtype in (None, metadata.sections[0].dtype), "values have the frame's dtype")


def _check_context(metadata: Metadata) -> None:
    """Lineage, then the readout, then keys and values of each layer in turn; shapes and dtypes agree."""
    sections = metadata.sections
    lineage = [s for s in sections if s.kind in ("tokens", "latents")]
    readout = [s for s in sections if s.kind in _READOUT]
    kv = [s for s in sections if s.is_kv]
    _require(bool(lineage), "a context has a lineage")
    _require(list(sections) == [*lineage, *readout, *kv], "a context's sections are lineage, readout, keys and values")
    _require([s.kind for s in readout] in ([], list(_READOUT)), "a readout has three sections")
    if metadata.splices is not None:
        _require(
            leaf_indices(metadata.splices) == list(range(len(lineage))), "splices name each section once, in order"
        )
    if readout:
        _require(readout[1].shape == readout[2].shape, "a readout has one probability per token")
    of_model = [s for s in sections if s.kind in ("latents", "readout_hidden")]
    _require(all(s.dtype == metadata.dtype for s in of_model), "latents and readout have the frame's dtype")
    _require(len({s.shape[-1] for s in of_model}) <= 1, "latents and readout have one width")
    order = [(s.layer, s.kind) for s in kv]
    expected = [(layer, kind) for layer in range(len(kv) // 2) for kind in ("keys", "values")]
    _require(order == expected, "keys and values follow each other layer by layer")
    _require(len({s.shape[1] for s in kv}) <= 1, "all layers have the same positions")
    _require(metadata.kv_positions <= metadata.positions, "a KV-cache is not longer than its lineage")


def _unique_keys(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    fields = dict(pairs)
    _require(len(fields) == len(pairs), "a key is given twice")
    return fields


def _fields(value: Any, what: str, *, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> Mapping[str, Any]:
    _require(isinstance(value, dict), f"{what} is a map")
    missing, unknown = set(required) - value.keys(), value.keys() - {*required, *optional}
    _require(not missing and not unknown, f"{what} has the keys {', '.join((*required, *optional))}")
    return value


def _one_of(value: Any, known: tuple[str, ...], what: str) -> Any:
    _require(isinstance(value, str) and value in known, f"{what} is one of {', '.join(known)}, not {str(value)[:40]!r}")
    return value


def _digest(value: Any, what: str) -> str:
    _require(isinstance(value, str) and bool(_DIGEST.fullmatch(value)), f"{what} is 64 hexadecimal digits")
    return value


def _count(value: Any, what: str) -> int:
    _require(type(value) is int and 0 <= value <= _LARGEST, f"{what} is a count")
    return value


def _number(value: Any, what: str) -> float:
    _require(type(value) in (int, float) and math.isfinite(value), f"{what} is a finite number")
    return float(value)


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise FrameError(f"The frame's metadata breaks a rule: {rule}.")
