"""Values to frames and back: contexts, hidden states, text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from avp_agents.context import Context, LatentSegment, Readout, Segment, SplicedSegment, TokenSegment, leaves
from avp_agents.errors import ConfigurationError, FrameError
from avp_agents.kv_cache import HostKv, KvCache
from avp_agents.protocol.frame_decoding import Frame
from avp_agents.protocol.frame_encoding import EncodedFrame, Payload, encode_frame
from avp_agents.protocol.frame_metadata import FLOAT_BYTES, FrameKind, Metadata, Section, SectionKind, Splice
from avp_agents.protocol.kv_storage import store_tensor, stored_layers
from avp_agents.protocol.tensor_bytes import bytes_of, tensor_from

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """Hidden states of a model, for a receiver that holds its output head.

    Attributes:
        fingerprint: The model's.
        states: ``[n, hidden]``, float32, bfloat16 or float16, on the CPU.
    """

    fingerprint: str
    states: torch.Tensor


def encode_context(
    context: Context,
    *,
    key: bytes,
    with_kv: bool = True,
    authenticate_kv: bool = True,
    compress: bool = False,
    int8: bool = False,
) -> EncodedFrame:
    """A context as a frame.

    Args:
        context: Its lineage and readout always travel.
        key: The namespace's key; the receiver needs the same.
        with_kv: Send the KV-cache too, if one is attached. Without it the receiver replays the lineage.
        authenticate_kv: Cover keys and values by the MAC. Only where nobody else can write to the channel may this be
            left out; the receiver must then say `trust_kv`.
        compress: zstd for keys and values; needs ``avp-agents[interop]``.
        int8: Round keys and values to int8 per head and channel; the measured error is in the metadata.

    Returns:
        The frame. Keys and values stay views of the context's tensors unless they are compressed or rounded.

    Raises:
        ConfigurationError: The context cannot be represented: a value is out of range or not finite, or a tensor has
            another shape or dtype than the context says.
        KvMemoryError: The KV-cache was evicted meanwhile.
    """
    head = [_segment(segment, context.dtype) for segment in leaves(context.lineage)]
    if context.readout is not None:
        head += _readout(context.readout, context.dtype)
    kv = _kv_payloads(context.kv, compress, int8) if with_kv else []
    spliced = any(isinstance(segment, SplicedSegment) for segment in context.lineage)
    splices = _splices_of(context.lineage, itertools.count()) if spliced else None
    metadata = _metadata("context", context.fingerprint, context.dtype, [s for s, _ in head], kv, splices)
    return encode_frame(metadata, [value for _, value in head], kv, key=key, authenticate_kv=authenticate_kv)


def decode_context(frame: Frame) -> Context:
    """The context in a frame, its KV-cache attached if one came along.

    Keys and values stay views of the frame's memory where they are stored as they are and it is writable.

    Raises:
        FrameError: The frame holds something else, or a value is out of range or not finite.
        ConfigurationError: It is compressed, and zstandard is missing.
    """
    metadata = _of_kind(frame, "context")
    segments: list[Segment] = []
    readout: dict[str, torch.Tensor] = {}
    for section, stored in frame.sections():
        if section.kind == "tokens":
            segments.append(TokenSegment(tuple(_token_ids(stored).tolist())))
        elif section.kind == "latents":
            assert section.recipe is not None
            segments.append(LatentSegment(_floats(section, stored), section.recipe, section.origin))
        elif section.kind == "readout_tokens":
            readout["token_ids"] = _tensor_of(_token_ids(stored).astype(np.int64))
        elif section.kind in ("readout_hidden", "readout_probabilities"):
            readout[section.kind.removeprefix("readout_")] = _floats(section, stored)
    lineage = segments if metadata.splices is None else _nested(metadata.splices, segments)
    fingerprint, dtype = metadata.fingerprint or "", metadata.dtype or ""  # the metadata was refused without
    context = Context(fingerprint, dtype, tuple(lineage), Readout(**readout) if readout else None)
    if metadata.layers:
        context.attach(kv=HostKv(stored_layers(frame.sections())))
    return context


def encode_hidden_states(hidden: HiddenStates, *, key: bytes) -> EncodedFrame:
    """Hidden states as a frame.

    Raises:
        ConfigurationError: They are not ``[n, hidden]`` of a known dtype, or not finite.
    """
    dtype = str(hidden.states.dtype).removeprefix("torch.")
    section, value = _float_section("hidden_states", hidden.states, dtype, dimensions=2)
    metadata = _metadata("hidden_states", hidden.fingerprint, dtype, [section], [])
    return encode_frame(metadata, [value], [], key=key, authenticate_kv=True)


def decode_hidden_states(frame: Frame) -> HiddenStates:
    """The hidden states in a frame.

    Raises:
        FrameError: The frame holds something else, or they are not finite.
    """
    metadata = _of_kind(frame, "hidden_states")
    ((section, stored),) = frame.sections()
    return HiddenStates(metadata.fingerprint or "", _floats(section, stored))


def encode_text(text: str, *, key: bytes) -> EncodedFrame:
    """Text as a frame.

    Raises:
        ConfigurationError: It is not Unicode text (lone surrogates).
    """
    try:
        value = text.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError("Text with lone surrogates cannot be sent.") from error
    section = Section("text", "uint8", (len(value),), len(value))
    return encode_frame(_metadata("text", None, None, [section], []), [value], [], key=key, authenticate_kv=True)


def decode_text(frame: Frame) -> str:
    """The text in a frame.

    Raises:
        FrameError: The frame holds something else, or it is not UTF-8.
    """
    _of_kind(frame, "text")
    ((_, stored),) = frame.sections()
    try:
        return bytes(stored).decode()
    except UnicodeDecodeError as error:
        raise FrameError("The frame's text is not UTF-8.") from error


def _metadata(
    kind: FrameKind,
    fingerprint: str | None,
    dtype: str | None,
    head: list[Section],
    kv: list[Payload],
    splices: tuple[int | Splice, ...] | None = None,
) -> Metadata:
    """The metadata of a frame to be sent, by the receiver's own rules."""
    try:
        return Metadata(kind, fingerprint, dtype, (*head, *(payload.section for payload in kv)), splices)
    except FrameError as error:
        raise ConfigurationError(f"This {kind} cannot be sent. {error}") from error


def _splices_of(lineage: Iterable[Segment], sections: Iterator[int]) -> tuple[int | Splice, ...]:
    """How a lineage is nested; its leaves take their indices from `sections`."""
    return tuple(
        Splice(segment.prefix, _splices_of(segment.segments, sections))
        if isinstance(segment, SplicedSegment)
        else next(sections)
        for segment in lineage
    )


def _nested(parts: Iterable[int | Splice], segments: Sequence[Segment]) -> tuple[Segment, ...]:
    return tuple(
        segments[part] if isinstance(part, int) else SplicedSegment(_nested(part.parts, segments), part.prefix)
        for part in parts
    )


def _segment(segment: TokenSegment | LatentSegment, dtype: str) -> tuple[Section, bytes]:
    if isinstance(segment, LatentSegment):
        return _float_section("latents", segment.embeddings, dtype, dimensions=2, segment=segment)
    return _token_section("tokens", np.asarray(segment.token_ids, dtype=np.int64))


def _readout(readout: Readout, dtype: str) -> list[tuple[Section, bytes]]:
    return [
        _float_section("readout_hidden", readout.hidden, dtype, dimensions=1),
        _token_section("readout_tokens", readout.token_ids.numpy()),
        _float_section("readout_probabilities", readout.probabilities, "float32", dimensions=1),
    ]


def _token_section(kind: SectionKind, ids: np.ndarray) -> tuple[Section, bytes]:
    in_range = not ids.size or (ids.min() >= 0 and ids.max() < 2**31)
    _require(ids.ndim == 1 and in_range, "Token ids lie in 0 .. 2**31 - 1.")
    value = ids.astype("<i4").tobytes()
    return Section(kind, "int32", (len(ids),), len(value)), value


def _float_section(
    kind: SectionKind, tensor: torch.Tensor, dtype: str, *, dimensions: int, segment: LatentSegment | None = None
) -> tuple[Section, bytes]:
    _require(dtype in FLOAT_BYTES, f"Unknown dtype {dtype!r}; use one of {', '.join(FLOAT_BYTES)}.")
    _require(str(tensor.dtype) == f"torch.{dtype}", f"The {kind} must be {dtype}, not {tensor.dtype}.")
    _require(tensor.dim() == dimensions, f"The {kind} have {dimensions} dimensions, not {tensor.dim()}.")
    _require(bool(tensor.isfinite().all()), f"The {kind} must be finite.")
    value = bytes(bytes_of(tensor))
    recipe, origin = (segment.recipe, segment.origin) if segment is not None else (None, None)
    return Section(kind, dtype, tuple(tensor.shape), len(value), recipe=recipe, origin=origin), value


def _kv_payloads(kv: KvCache | None, compress: bool, int8: bool) -> list[Payload]:
    if kv is None:
        return []
    names: tuple[SectionKind, SectionKind] = ("keys", "values")
    return [
        store_tensor(tensor, kind, layer, compress=compress, quantise=int8)
        for layer, pair in enumerate(kv.to_host().layers)
        for kind, tensor in zip(names, pair, strict=True)
    ]


def _of_kind(frame: Frame, kind: FrameKind) -> Metadata:
    if frame.metadata.kind != kind:
        raise FrameError(f"The frame holds {frame.metadata.kind}, not {kind}.")
    return frame.metadata


def _token_ids(stored: memoryview) -> np.ndarray:
    ids = np.frombuffer(stored, dtype="<i4")
    if ids.size and ids.min() < 0:
        raise FrameError("The frame has negative token ids.")
    return ids


def _tensor_of(array: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(array)


def _floats(section: Section, stored: memoryview) -> torch.Tensor:
    """A small tensor, copied so that it does not keep the frame's memory."""
    tensor = tensor_from(memoryview(bytes(stored)), section.dtype, section.shape)
    if not tensor.isfinite().all():
        raise FrameError(f"The frame's {section.kind} are not finite.")
    return tensor


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigurationError(message)
