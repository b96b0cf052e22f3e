"""Frames: what goes in comes out bit for bit, whichever way the bytes travel."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from frame_samples import KEY
from hypothesis import given, settings
from hypothesis import strategies as st

from avp_agents.context import Context, LatentSegment, SplicedSegment, TokenSegment
from avp_agents.errors import ConfigurationError, FrameError, FrameIntegrityError
from avp_agents.kv_cache import HostKv
from avp_agents.protocol import (
    EncodedFrame,
    Frame,
    FrameReader,
    HiddenStates,
    decode_context,
    decode_hidden_states,
    decode_text,
    encode_context,
    encode_hidden_states,
    encode_text,
    open_frame,
    read_frame,
)
from avp_agents.testing.contexts import FINGERPRINT, assert_same_bits, assert_same_kv, assert_same_lineage, make_context

DTYPES = ("float32", "bfloat16", "float16")


def through_memory(frame: EncodedFrame, _: Path) -> Frame:
    return open_frame(frame.assemble(), key=KEY, trust_kv=True)


def through_bytes(frame: EncodedFrame, _: Path) -> Frame:
    return open_frame(b"".join(frame), key=KEY, trust_kv=True)


def through_a_mapped_file(frame: EncodedFrame, folder: Path) -> Frame:
    path = folder / "context.avp"
    with path.open("wb") as file:
        frame.write(file)
    opened = read_frame(path, key=KEY, trust_kv=True)
    path.unlink()
    return opened


def through_chunks(frame: EncodedFrame, _: Path) -> Frame:
    reader, data = FrameReader(key=KEY, trust_kv=True), bytes(frame.assemble())
    for start in range(0, len(data), 97):
        reader.feed(data[start : start + 97])
    return reader.finish()


def one_layer(tensor: torch.Tensor) -> HostKv:
    return HostKv(((tensor, tensor),))


WAYS = (through_memory, through_bytes, through_a_mapped_file, through_chunks)
Way = Callable[[EncodedFrame, Path], Frame]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_context_comes_back_bit_for_bit(dtype: str, way: Way, tmp_path: Path) -> None:
    context = make_context(parent=make_context(dtype=dtype, tokens=3), seed=1, dtype=dtype, kv_short=1)

    found = decode_context(way(encode_context(context, key=KEY), tmp_path))

    assert_same_lineage(found, context)
    assert_same_kv(found, context)
    assert (found.fingerprint, found.dtype, len(found)) == (context.fingerprint, context.dtype, len(context))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_states_come_back_bit_for_bit(dtype: str, way: Way, tmp_path: Path) -> None:
    states = torch.randn(3, 7).to(getattr(torch, dtype))

    found = decode_hidden_states(way(encode_hidden_states(HiddenStates(FINGERPRINT, states), key=KEY), tmp_path))

    assert found.fingerprint == FINGERPRINT
    assert_same_bits(found.states, states, "hidden states")


@pytest.mark.parametrize("way", WAYS)
def test_text_comes_back(way: Way, tmp_path: Path) -> None:
    for text in ("", "Thirty dollars, déjà vu: 東京 🍞"):
        assert decode_text(way(encode_text(text, key=KEY), tmp_path)) == text


@pytest.mark.parametrize(
    ("tokens", "steps", "kv_short"), [(1, 0, None), (1, 0, 0), (1, 0, 1), (5, 3, None), (0, 2, 0), (300, 20, 0)]
)
def test_contexts_of_all_sizes(tokens: int, steps: int, kv_short: int | None) -> None:
    context = make_context(tokens=tokens, steps=steps, kv_short=kv_short)

    found = decode_context(open_frame(encode_context(context, key=KEY).assemble(), key=KEY))

    assert_same_lineage(found, context)
    assert_same_kv(found, context)


def test_layers_keep_their_own_shapes_and_dtypes() -> None:
    shapes = [((2, 6, 8), (2, 6, 4), torch.float32), ((1, 6, 16), (3, 6, 1), torch.bfloat16)]
    layers = tuple((torch.randn(keys).to(dtype), torch.randn(values).to(dtype)) for keys, values, dtype in shapes)
    context = make_context(tokens=6, steps=0, kv_short=None).with_kv(HostKv(layers))

    assert_same_kv(decode_context(open_frame(encode_context(context, key=KEY).assemble(), key=KEY)), context)


def test_a_cache_that_is_cut_out_of_a_longer_one_needs_no_copy_to_be_right(context: Context) -> None:
    assert context.kv is not None
    shorter = context.with_kv(context.kv.to_host(0, 5))

    found = decode_context(open_frame(encode_context(shorter, key=KEY).assemble(), key=KEY))

    assert found.kv_len == 5
    assert_same_kv(found, shorter)


def test_spliced_lineages_keep_their_structure(context: Context) -> None:
    latents = context.lineage[-1]
    assert isinstance(latents, LatentSegment)
    joined = replace(latents, origin=context.recipe_id)
    inner = SplicedSegment((TokenSegment((7, 8)), joined), prefix=2)
    spliced = Context(
        context.fingerprint, context.dtype,
        (*context.lineage, SplicedSegment((inner, TokenSegment((9,))), prefix=12), TokenSegment((1, 2))),
    )  # fmt: skip

    found = decode_context(open_frame(encode_context(spliced, key=KEY).assemble(), key=KEY))

    assert found.recipe_ids == spliced.recipe_ids


def test_the_kv_cache_can_stay_behind(context: Context) -> None:
    frame = encode_context(context, key=KEY, with_kv=False)

    found = decode_context(open_frame(frame.assemble(), key=KEY))

    assert found.kv is None
    assert_same_lineage(found, context)
    assert frame.nbytes < encode_context(context, key=KEY).nbytes


def test_keys_and_values_are_views_of_writable_memory(context: Context) -> None:
    buffer = encode_context(context, key=KEY).assemble()
    found = decode_context(open_frame(buffer, key=KEY))
    assert found.kv is not None
    keys = found.kv.to_host().layers[0][0]

    keys.zero_()

    assert bytes(keys.numel() * 4) in bytes(buffer), "decoding must not have copied the keys"


def test_a_frame_can_be_sent_again_and_is_the_same(context: Context) -> None:
    frame = encode_context(context, key=KEY)

    assert b"".join(frame) == b"".join(frame) == bytes(frame.assemble())
    assert len(b"".join(frame)) == frame.nbytes


def test_a_buffer_of_the_wrong_size_is_refused(context: Context) -> None:
    with pytest.raises(ConfigurationError, match="bytes, the buffer"):
        encode_context(context, key=KEY).copy_into(bytearray(100))


class TestCompression:
    """zstd and int8, alone and together."""

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_zstd_is_exact(self, dtype: str) -> None:
        context = make_context(dtype=dtype)

        found = decode_context(open_frame(encode_context(context, key=KEY, compress=True).assemble(), key=KEY))

        assert_same_kv(found, context)

    def test_zstd_saves_bytes_where_there_is_something_to_save(self) -> None:
        kv = HostKv(((torch.zeros(4, 256, 64), torch.ones(4, 256, 64)),))
        context = make_context(tokens=256, steps=0, kv_short=None).with_kv(kv)

        frame = encode_context(context, key=KEY, compress=True)

        assert frame.nbytes < kv.nbytes / 100
        assert_same_kv(decode_context(open_frame(frame.assemble(), key=KEY)), context)

    @pytest.mark.parametrize(("dtype", "compress"), list(itertools.product(DTYPES, (False, True))))
    def test_int8_stays_within_the_error_that_its_metadata_states(self, dtype: str, compress: bool) -> None:
        context = make_context(dtype=dtype, tokens=40)
        assert context.kv is not None

        frame = open_frame(encode_context(context, key=KEY, int8=True, compress=compress).assemble(), key=KEY)

        found = decode_context(frame)
        assert found.kv is not None
        stated = [s.int8 for s in frame.metadata.sections if s.is_kv]
        pairs = zip(found.kv.to_host().layers, context.kv.to_host().layers, strict=True)
        tensors = [(a, b) for found_pair, pair in pairs for a, b in zip(found_pair, pair, strict=True)]
        for (ours, exact), error in zip(tensors, stated, strict=True):
            assert error is not None
            assert ours.dtype == exact.dtype
            difference = ours.float() - exact.float()
            assert difference.abs().max().item() == pytest.approx(error.max_error)
            assert 0 < error.rms_error < 0.02
            assert difference.square().mean().sqrt() / exact.float().square().mean().sqrt() == pytest.approx(
                error.rms_error, rel=1e-3
            )

    def test_int8_of_zeros_is_zeros(self) -> None:
        context = make_context(tokens=4, steps=0, kv_short=None).with_kv(one_layer(torch.zeros(1, 4, 2)))

        found = decode_context(open_frame(encode_context(context, key=KEY, int8=True).assemble(), key=KEY))

        assert_same_kv(found, context)

    def test_int8_needs_finite_values(self, context: Context) -> None:
        context = context.with_kv(one_layer(torch.full((1, 4, 2), float("nan"))))

        with pytest.raises(ConfigurationError, match="not finite"):
            encode_context(context, key=KEY, int8=True)


class TestKeys:
    """Who may read what."""

    def test_another_key_is_refused_before_anything_is_used(self, frame_bytes: bytearray) -> None:
        with pytest.raises(FrameIntegrityError, match="AVP_STORE_KEY"):
            open_frame(frame_bytes, key=bytes(32))

    def test_a_short_key_is_refused(self, context: Context) -> None:
        with pytest.raises(ConfigurationError, match="at least 32 bytes"):
            encode_context(context, key=b"short")

    def test_keys_and_values_without_a_mac_need_trust(self, context: Context) -> None:
        frame = encode_context(context, key=KEY, authenticate_kv=False).assemble()

        with pytest.raises(FrameIntegrityError, match="trust_kv"):
            open_frame(frame, key=KEY)
        assert_same_kv(decode_context(open_frame(frame, key=KEY, trust_kv=True)), context)


def test_what_the_format_cannot_carry_is_refused_by_the_sender(context: Context) -> None:
    def refuses(match: str, **changes: object) -> None:
        with pytest.raises(ConfigurationError, match=match):
            encode_context(replace(context, **changes), key=KEY)

    refuses("fingerprint is 64 hexadecimal digits", fingerprint="../../etc/passwd")
    refuses("must be float16", dtype="float16")
    refuses("Unknown dtype", dtype="float64")
    refuses("lineage", lineage=(), readout=None)
    refuses(r"0 \.\. 2\*\*31", lineage=(TokenSegment((2**31,)),))
    refuses(r"0 \.\. 2\*\*31", lineage=(TokenSegment((-1,)),))
    too_long = context.with_kv(one_layer(torch.zeros(1, 99, 2)))
    with pytest.raises(ConfigurationError, match="not longer than its lineage"):
        encode_context(too_long, key=KEY)
    batched = context.with_kv(one_layer(torch.zeros(2, 1, 4, 2)))
    with pytest.raises(ConfigurationError, match="heads, positions, head_dim"):
        encode_context(batched, key=KEY)
    with pytest.raises(ConfigurationError, match="surrogates"):
        encode_text("\ud800", key=KEY)


def test_a_frame_of_another_kind_is_refused(frame_bytes: bytearray) -> None:
    with pytest.raises(FrameError, match="holds context, not text"):
        decode_text(open_frame(frame_bytes, key=KEY))
    with pytest.raises(FrameError, match="holds text, not context"):
        decode_context(open_frame(encode_text("hi", key=KEY).assemble(), key=KEY))


def test_sending_and_receiving_take_no_more_memory_than_the_payload() -> None:
    layers = tuple((torch.randn(4, 512, 64), torch.randn(4, 512, 64)) for _ in range(8))
    context = make_context(tokens=512, steps=0, kv_short=None).with_kv(HostKv(layers))
    payload = HostKv(layers).nbytes
    frame = encode_context(context, key=KEY)
    reader = FrameReader(key=KEY)

    tracemalloc.start()
    try:
        for chunk in frame:
            reader.feed(chunk)
        found = decode_context(reader.finish())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert_same_kv(found, context)
    assert peak < 1.25 * payload


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    width=st.integers(1, 5),
    layers=st.integers(0, 3),
    heads=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    options=st.fixed_dictionaries({"compress": st.booleans(), "authenticate_kv": st.booleans()}),
    cut=st.integers(1, 200),
)
def test_any_context_comes_back(
    lengths: list[int], width: int, layers: int, heads: int, dtype: str, options: dict[str, bool], cut: int
) -> None:
    context: Context | None = None
    for index, length in enumerate(lengths):
        steps = length if index % 2 else 0
        context = make_context(parent=context, seed=index, tokens=length, steps=steps, dtype=dtype, kv_short=None)
    assert context is not None
    shape = (heads, len(context), width)
    floats = getattr(torch, dtype)
    kv = HostKv(tuple((torch.randn(shape).to(floats), torch.randn(shape).to(floats)) for _ in range(layers)))
    context = context.with_kv(kv)
    data = b"".join(encode_context(context, key=KEY, **options))
    reader = FrameReader(key=KEY, trust_kv=True)
    for start in range(0, len(data), cut):
        reader.feed(data[start : start + cut])

    found = decode_context(reader.finish())

    assert_same_lineage(found, context)
    assert_same_kv(found, context)
