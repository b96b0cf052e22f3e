"""What a receiver refuses: torn, altered, contradictory and oversized frames, each at once and with an AvpError."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zstandard
from frame_samples import KEY, context_metadata, frame_of, keys, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from avp_agents.errors import AvpError, FrameError, FrameIntegrityError, FrameLimitError
from avp_agents.protocol import (
    Frame,
    FrameReader,
    Limits,
    decode_context,
    decode_hidden_states,
    decode_text,
    encode_context,
    inspect_frame,
    open_frame,
    read_frame,
)
from avp_agents.protocol.frame_inspection import FileSource
from avp_agents.testing.contexts import make_context

MEBIBYTE = 1 << 20


@contextmanager
def quickly(seconds: float = 0.25) -> Iterator[None]:
    """Fails where what is inside takes longer (a generous bound for a busy machine; idle it takes milliseconds)."""
    started = time.perf_counter()
    yield
    assert time.perf_counter() - started < seconds


def read_in_chunks(data: bytes | bytearray, **options: Any) -> Frame:
    reader = FrameReader(**options)
    reader.feed(data)
    return reader.finish()


def refused(data: bytes, match: str, limits: Limits | None = None) -> None:
    options: dict[str, Any] = {"key": KEY, "trust_kv": True} | ({"limits": limits} if limits else {})
    with quickly(), pytest.raises(FrameError, match=match):
        decode_context(open_frame(bytearray(data), **options))
    with quickly(), pytest.raises(FrameError):
        decode_context(read_in_chunks(data, **options))


def test_a_frame_that_is_written_after_the_specification_is_read() -> None:
    frame = frame_of(context_metadata([tokens(2)]), [bytes(8)])

    assert decode_context(open_frame(frame, key=KEY)).token_ids() == (0, 0)


def test_every_byte_counts(frame_bytes: bytearray) -> None:
    for offset in range(len(frame_bytes)):
        frame_bytes[offset] ^= 0x40
        with pytest.raises(FrameError):
            open_frame(frame_bytes, key=KEY)
        frame_bytes[offset] ^= 0x40
    open_frame(frame_bytes, key=KEY)


def test_every_length_is_refused_but_the_right_one(frame_bytes: bytearray) -> None:
    for length in (*range(0, len(frame_bytes), 13), len(frame_bytes) - 1):
        with pytest.raises(FrameError):
            open_frame(frame_bytes[:length], key=KEY)
        with pytest.raises(FrameError, match="ends early"):
            read_in_chunks(frame_bytes[:length], key=KEY)
    with pytest.raises(FrameError, match="are there"):
        open_frame(frame_bytes + b"\0", key=KEY)
    with pytest.raises(FrameError, match="behind the frame's end"):
        FrameReader(key=KEY).feed(frame_bytes + b"\0")


def test_altered_keys_are_noticed_without_and_with_a_mac(context: Any) -> None:
    for authenticate in (False, True):
        frame = encode_context(context, key=KEY, authenticate_kv=authenticate)
        data = bytearray(frame.assemble())
        data[frame.layout.header.head_bytes] ^= 1
        with pytest.raises(FrameIntegrityError, match="checksum"):
            open_frame(data, key=KEY, trust_kv=True)


class TestAttacks:
    """What brought the reference SDK down."""

    def test_a_bomb_of_16_kilobytes(self) -> None:
        bomb = zstandard.ZstdCompressor().compress(bytes(512 * MEBIBYTE))
        assert len(bomb) < 20_000
        lineage = [tokens(8)]
        for shape, match in (((1, 8, 2), "announces 536870912 bytes"), ((1, 8, 16 * MEBIBYTE), "above the limit")):
            sections = [keys(0, shape, len(bomb), k, compression="zstd") for k in ("keys", "values")]
            data = frame_of(context_metadata([*lineage, *sections]), [bytes(32)], [bomb, bomb])
            refused(data, match, Limits(value_bytes=256 * MEBIBYTE))

    def test_a_bomb_that_hides_its_size(self) -> None:
        silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64))
        sections = [keys(0, (1, 8, 2), len(silent), kind, compression="zstd") for kind in ("keys", "values")]

        refused(frame_of(context_metadata([tokens(8), *sections]), [bytes(32)], [silent, silent]), "announces")

    def test_a_header_alone_that_announces_everything(self) -> None:
        huge = 2**63
        for lengths in ((0, 64, huge), (0, huge, huge), (huge, huge, huge), (2**64 - 1,) * 3):
            refused(frame_of({}, lengths=lengths)[:64], "above the limit")

    def test_three_hundred_thousand_layers(self) -> None:
        sections = [keys(layer, (0, 0, 0), 0, kind) for layer in range(150_000) for kind in ("keys", "values")]
        packed = msgpack.packb(context_metadata([tokens(1), *sections]))
        assert packed is not None

        refused(frame_of(packed, [bytes(4)], [b""] * 10), "metadata_bytes")
        few = msgpack.packb(context_metadata([tokens(1), *sections[:5000]]))
        assert few is not None
        refused(frame_of(few, [bytes(4)], [b""] * 10), "sections are 5001")

    def test_metadata_that_ends_behind_the_frame(self) -> None:
        good = frame_of(context_metadata([tokens(2)]), [bytes(8)])
        for metadata, head in ((5000, 256), (200, 192), (193, 256), (2**20, 2**20)):
            refused(frame_of({}, lengths=(metadata, head, len(good))), "contradict|bytes, but|ends early|MAC")

    @pytest.mark.parametrize("path", ["../../etc/passwd", "..", "a" * 63 + "/", "\0" * 64, "A" * 64, "a" * 65])
    def test_paths_in_the_place_of_ids(self, path: str) -> None:
        refused(frame_of(context_metadata([tokens(2)], fingerprint=path), [bytes(8)]), "64 hexadecimal digits")

    def test_a_sparse_file_that_says_it_has_five_gigabytes(self, tmp_path: Path) -> None:
        size, path = 5 << 30, tmp_path / "sparse.avp"
        width = (size // 2 - 4096) // (8 * 4)
        extent = 8 * width * 4
        sections = [keys(0, (1, 8, width), extent, kind) for kind in ("keys", "values")]
        packed = msgpack.packb(context_metadata([tokens(8), *sections]))
        assert packed is not None
        head = -(-(64 + len(packed)) // 64) * 64 + 64
        total = head + 2 * -(-extent // 64) * 64 + 3 * 16 + 32
        opening = frame_of(packed, [bytes(32)], lengths=(len(packed), head, total))[:head]
        with path.open("wb") as file:
            file.write(opening)
        os.truncate(path, total)

        with quickly():
            report = inspect_frame(FileSource(path), key=KEY, limits=Limits(frame_bytes=8 << 30))
        assert report.layout.metadata.sections[1].shape == (1, 8, width)
        assert report.bytes_read < 4096
        with quickly(), pytest.raises(FrameLimitError, match="frame_bytes"):
            read_frame(path, key=KEY, limits=Limits(frame_bytes=4 << 30))
        os.truncate(path, total - 1)
        with quickly(), pytest.raises(FrameError, match="but the file has"):
            read_frame(path, key=KEY)
        with quickly(), pytest.raises(FrameError, match="ends early"):
            read_in_chunks(opening, key=KEY)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"version": 2}, "version 2 is unknown"),
        ({"flags": 2}, "flags 0x0002 are unknown"),
        ({"flags": 0x8001}, "flags 0x8001 are unknown"),
        ({"key": bytes(32)}, "MAC"),
        ({"lengths": (0, 0, 0)}, "contradict"),
    ],
)
def test_headers_that_this_release_does_not_know(options: dict[str, Any], match: str) -> None:
    refused(frame_of(context_metadata([tokens(2)]), [bytes(8)], **options), match)


LATENTS = {
    "kind": "latents", "dtype": "float32", "shape": [1, 2], "bytes": 8,
    "recipe": {"method": "soft", "k": 256, "temperature": 1.0, "renormalise": False, "steps": 1, "stop_cosine": None,
               "stop_entropy": None},
}  # fmt: skip
TEXT = {"kind": "text", "dtype": "uint8", "shape": [2], "bytes": 2}


@pytest.mark.parametrize(
    ("metadata", "head", "kv", "match"),
    [
        (b"\xc1", [], [], "not msgpack"),
        (b"\xde\xff\xff", [], [], "not msgpack"),
        (b"\xdd\xff\xff\xff\xff", [], [], "not msgpack"),
        (b"\x91" * 2000, [], [], "not msgpack"),
        (b"\x82\xa1a\x01\xa1a\x02", [], [], "given twice"),
        (7, [], [], "metadata is a map"),
        ({"kind": "context"}, [], [], "has the keys"),
        (context_metadata([tokens(2)], more=1), [bytes(8)], [], "has the keys"),
        (context_metadata([tokens(2)], kind="video"), [bytes(8)], [], "frame kind is one of"),
        (context_metadata([tokens(2)], dtype="int8"), [bytes(8)], [], "dtype is one of"),
        (context_metadata([]), [], [], "has a lineage"),
        ({"kind": "text", "sections": {}}, [], [], "sections are a list"),
        (context_metadata([{**tokens(2), "kind": "tensor"}]), [bytes(8)], [], "section kind is one of"),
        (context_metadata([{**tokens(2), "dtype": "int64"}]), [bytes(8)], [], "dtype is one of"),
        (context_metadata([{**tokens(2), "shape": [1, 2]}]), [bytes(8)], [], "1 dimensions"),
        (context_metadata([{**tokens(2), "shape": [-2]}]), [bytes(8)], [], "an extent is a count"),
        (context_metadata([{**tokens(2), "shape": [True]}]), [bytes(8)], [], "an extent is a count"),
        (context_metadata([{**tokens(2), "bytes": 7}]), [bytes(8)], [], "take 8 bytes"),
        (context_metadata([{**tokens(2), "compression": "zstd"}]), [bytes(8)], [], "has the keys"),
        (context_metadata([{**tokens(2), "layer": 0}]), [bytes(8)], [], "has the keys"),
        (context_metadata([LATENTS, tokens(2)], dtype="float16"), [bytes(8), bytes(8)], [], "the frame's dtype"),
        (context_metadata([{**LATENTS, "recipe": {}}]), [bytes(8)], [], "recipe has the keys"),
        (context_metadata([{**LATENTS, "origin": "../"}]), [bytes(8)], [], "origin is 64"),
        (context_metadata([tokens(1), keys(0, (1, 1, 1), 4)]), [bytes(4)], [bytes(4)], "layer by layer"),
        (context_metadata([tokens(1), keys(0, (1, 1, 1), 4), keys(1, (1, 1, 1), 4, "values")]),
         [bytes(4)], [bytes(4), bytes(4)], "layer by layer"),
        (context_metadata([tokens(1), keys(0, (1, 2, 1), 8), keys(0, (1, 2, 1), 8, "values")]),
         [bytes(4)], [bytes(8), bytes(8)], "not longer than its lineage"),
        (context_metadata([tokens(2), keys(0, (1, 2, 1), 8), keys(0, (1, 1, 1), 4, "values")]),
         [bytes(8)], [bytes(8), bytes(4)], "the same positions"),
        (context_metadata([tokens(2), keys(0, (1, 2, 1), 8, compression="lz4")]), [bytes(8)], [bytes(8)],
         "compression is one of"),
        (context_metadata([tokens(2), keys(0, (1, 2, 1), 8, int8=1)]), [bytes(8)], [bytes(8)], "int8 is a map"),
        (context_metadata([tokens(1), tokens(1)], splices=[1, 0]), [bytes(4), bytes(4)], [], "once, in order"),
        (context_metadata([tokens(1)], splices=[{"prefix": 0, "parts": []}]), [bytes(4)], [], "once, in order"),
        ({"kind": "text", "sections": [TEXT, TEXT]}, [b"hi", b"hi"], [], "one section"),
        ({"kind": "text", "dtype": "float32", "sections": [TEXT]}, [b"hi"], [], "belongs to no model"),
        ({"kind": "text", "sections": [TEXT]}, [b"hi"], [], "holds text, not context"),
    ],
)  # fmt: skip
def test_metadata_that_breaks_a_rule(metadata: Any, head: list[bytes], kv: list[bytes], match: str) -> None:
    refused(frame_of(metadata, head, kv), match)


def test_splices_that_nest_without_end() -> None:
    nested: Any = 0
    for _ in range(100):
        nested = {"prefix": 0, "parts": [nested]}

    refused(frame_of(context_metadata([tokens(1)], splices=[nested]), [bytes(4)]), "nest 32 deep")


def test_values_that_make_no_sense() -> None:
    negative = (-1).to_bytes(4, "little", signed=True)
    refused(frame_of(context_metadata([tokens(1)]), [negative]), "negative token ids")
    infinite = bytes.fromhex("0000807f")
    refused(frame_of(context_metadata([tokens(1), LATENTS]), [bytes(4), infinite * 2]), "not finite")
    text = frame_of({"kind": "text", "sections": [TEXT]}, [b"\xff\xfe"])
    with pytest.raises(FrameError, match="not UTF-8"):
        decode_text(open_frame(text, key=KEY))


def test_bytes_between_sections_must_be_zero() -> None:
    data = bytearray(
        frame_of(context_metadata([tokens(1), *both((1, 1, 1), 4)]), [bytes(4)], [bytes(4) + b"\1", bytes(4)])
    )

    refused(bytes(data), "does not match its checksum|must be zero")


def both(shape: tuple[int, ...], size: int) -> list[dict[str, Any]]:
    return [keys(0, shape, size, kind) for kind in ("keys", "values")]


def test_a_message_of_the_reference_sdk_is_named() -> None:
    with pytest.raises(FrameError, match="reference SDK"):
        open_frame(bytes.fromhex("415601000d0000000500000028024a01020000803f00000040"), key=KEY)


GOOD = bytes(encode_context(make_context(tokens=3, steps=2), key=KEY, compress=True).assemble())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | st.builds(lambda data: b"AVPF\1\0\1\0" + data, st.binary(max_size=200)))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(AvpError):
        open_frame(data, key=KEY)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.sampled_from(["context", "tokens", "keys", "float32", "zstd"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(
    path=st.lists(st.sampled_from(["kind", "fingerprint", "dtype", "sections", "shape", "bytes", "recipe", 0, 1, 5])),
    value=VALUES,
)
def test_authentic_frames_with_arbitrary_metadata_are_refused_or_read(path: list[Any], value: Any) -> None:
    """Even a sender that holds the key cannot make a receiver fail otherwise than with an AvpError."""
    length = int.from_bytes(GOOD[8:16], "little")
    metadata = msgpack.unpackb(GOOD[64 : 64 + length])
    target: Any = metadata
    for step in path:
        try:
            inner = target[step]
        except (KeyError, IndexError, TypeError):
            continue
        if isinstance(inner, dict | list):
            target = inner
    if isinstance(target, list):
        target[0] = value
    else:
        target[path[-1] if path and isinstance(path[-1], str) else "kind"] = value
    data = frame_of(metadata, [bytes(12), bytes(128)], [bytes(64)] * 4)

    try:
        frame = open_frame(data, key=KEY)
        for decode in (decode_context, decode_hidden_states, decode_text):
            decode(frame)
    except AvpError:
        pass
