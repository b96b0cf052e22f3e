"""Messages of the reference SDK: what is read, what is refused, and what cannot be carried exactly."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from avp_agents.errors import AvpError, ConfigurationError, ForeignMessageError, FrameLimitError
from avp_agents.kv_cache import HostKv
from avp_agents.protocol import Limits
from avp_agents.protocol.sdk import (
    SdkHello,
    SdkIdentity,
    SdkMessage,
    adopt_context,
    context_message,
    decode_message,
    encode_message,
    hidden_message,
    hidden_states_of,
    kv_message,
    kv_of,
)
from avp_agents.protocol.sdk.wire import pack, unpack
from avp_agents.testing.contexts import assert_same_bits, make_context

DTYPES = ("float32", "float16", "bfloat16")
IDENTITY = SdkIdentity("llama", hidden_dim=16, num_layers=2, num_kv_heads=2, head_dim=8)


def message_of(metadata: bytes, body: bytes, flags: int = 0) -> bytes:
    return struct.pack("<2sBBII", b"AV", 1, flags, len(metadata) + len(body), len(metadata)) + metadata + body


def fields(**changes: Any) -> bytes:
    plain = {"session_id": "", "source_agent_id": "", "target_agent_id": "", "model_id": "", "hidden_dim": 0}
    plain |= {"num_layers": 0, "payload_type": 0, "dtype": 0, "shape": [], "mode": 0, "compression": ""}
    return pack({**plain, "map_id": "", "extra": {}, "checksum": 0, **changes})


@contextmanager
def quickly(seconds: float = 0.25) -> Iterator[None]:
    started = time.perf_counter()
    yield
    assert time.perf_counter() - started < seconds


@pytest.mark.parametrize("level", [None, 1, 3, 19])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_back_bit_for_bit(dtype: str, level: int | None) -> None:
    context = make_context(dtype=dtype)
    assert context.kv is not None
    kv = context.kv.to_host()
    found = kv_of(decode_message(encode_message(kv_message(kv), zstd_level=level)))
    for pair, expected in zip(found.layers, kv.layers, strict=True):
        assert_same_bits(pair[0], expected[0], "keys")
        assert_same_bits(pair[1], expected[1], "values")

    states = torch.randn(2, 3).to(getattr(torch, dtype))
    data = encode_message(replace(hidden_message(states), map_id="vocab:00", extra={"a": "é"}), zstd_level=level)
    message = decode_message(data)
    assert_same_bits(hidden_states_of(message), states, "hidden states")
    assert (message.map_id, message.extra, message.hidden_dim) == ("vocab:00", {"a": "é"}, 3)


class TestAttacks:
    """What an SDK message can be made to say."""

    def test_a_bomb_of_16_kilobytes(self) -> None:
        bomb = zstandard.ZstdCompressor().compress(bytes(512 << 20))
        assert len(bomb) < 20_000
        zipped = {"compression": "zstd"}
        for metadata, flags in (
            (fields(payload_type=1, **zipped), 5),
            (fields(shape=[4], **zipped), 1),
            (fields(shape=[128 << 20], **zipped), 1),
            (fields(mode=1, **zipped), 1),
        ):
            with quickly(), pytest.raises(ForeignMessageError, match="announce"):
                decode_message(message_of(metadata, bomb, flags))

    def test_a_kv_header_of_17_bytes_with_300_000_layers(self) -> None:
        for layers, positions in ((300_000, 0), (2**32 - 1, 0), (300_000, 1)):
            header = struct.pack("<IIIIB", layers, 1, 1, positions, 0)
            metadata = fields(payload_type=1, checksum=zlib.crc32(header))
            with quickly(), pytest.raises((ForeignMessageError, FrameLimitError), match=r"empty|sections"):
                kv_of(decode_message(message_of(metadata, header, 4)))

    def test_metadata_that_ends_behind_the_message(self) -> None:
        good = message_of(fields(), b"")
        for length in (len(good), 2**20, 2**32 - 1):
            data = good[:8] + struct.pack("<I", length) + good[12:]
            with quickly(), pytest.raises((ForeignMessageError, FrameLimitError)):
                decode_message(data)

    def test_limits_are_the_receivers(self) -> None:
        data = encode_message(hidden_message(torch.ones(100)))
        with pytest.raises(FrameLimitError, match="frame_bytes"):
            decode_message(data, limits=Limits(frame_bytes=100))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "does not begin with AV"),
        (b"AVPF" + bytes(60), "version 80 is unknown"),
        (b"AV\x02" + bytes(9), "version 2 is unknown"),
        (message_of(b"", b"", 8), "flags 0x08 are unknown"),
        (message_of(fields(), b"", 1), "flags contradict"),
        (message_of(fields(), b"", 4), "flags contradict"),
        (message_of(fields(map_id="x"), b""), "flags contradict"),
        (message_of(fields(compression="lz4"), b"", 1), "flags contradict"),
        (message_of(fields(), b"") + b"\0", "bytes follow its header"),
        (message_of(fields(), b"")[:-1], "bytes follow its header"),
        (message_of(fields(checksum=1), b""), "checksum"),
        (message_of(fields(dtype=3), b""), "dtype 3 is none of"),
        (message_of(fields(payload_type=2), b""), "payload type 2 is none of"),
        (message_of(fields(mode=2), b""), "mode 2 is none of"),
        (message_of(b"\x65\0\0\0\0", b""), "before 0.3"),
        (message_of(b"\x60\x01", b""), "before 0.3"),
        (message_of(b"\x28\x01\x28\x01", b""), "field 5 twice"),
        (message_of(b"\x0a\x05a", b""), "ends early"),
        (message_of(b"\x28\xff", b""), "within a number"),
        (message_of(b"\x28" + b"\xff" * 12, b""), "within a number"),
        (message_of(b"\x28\xff\xff\xff\xff\xff\x01", b""), "more than 32 bits"),
        (message_of(b"\x0a\x01\xff", b""), "not UTF-8"),
        (message_of(b"\x72\x02\x18\x01", b""), "extra fields"),
        (message_of(fields(compression="zstd"), b"no zstd", 1), "not one whole zstd frame"),
    ],
)
def test_messages_that_are_malformed(data: bytes, match: str) -> None:
    with pytest.raises(ForeignMessageError, match=match):
        decode_message(data)


def test_bodies_that_contradict_their_shape() -> None:
    good = kv_message(HostKv(((torch.ones(1, 2, 3), torch.ones(1, 2, 3)),)))
    for body in (bytes(good.body)[:-1], bytes(good.body) + b"\0"):
        with pytest.raises(ForeignMessageError, match="describes 65 bytes"):
            kv_of(replace(good, body=body))
    with pytest.raises(ForeignMessageError, match="shorter than its header"):
        kv_of(replace(good, body=b"\1"))
    with pytest.raises(ForeignMessageError, match="KV dtype 3"):
        kv_of(replace(good, body=bytes(good.body[:16]) + b"\3" + bytes(good.body[17:])))
    with pytest.raises(ForeignMessageError, match="have 8 bytes"):
        hidden_states_of(replace(hidden_message(torch.ones(3)), shape=(2,)))
    with pytest.raises(ForeignMessageError, match="no KV-cache"):
        kv_of(hidden_message(torch.ones(3)))
    with pytest.raises(ForeignMessageError, match="no hidden states"):
        hidden_states_of(SdkMessage("hidden_state", b"hi", mode="json"))


class TestWhatCannotBeCarried:
    """Refused, where the SDK itself corrupts it silently."""

    def test_batches(self) -> None:
        batched = torch.ones(2, 1, 4, 8)
        with pytest.raises(ConfigurationError, match="one sequence"):
            kv_message(HostKv(((batched, batched),)))

    def test_layers_of_different_shapes(self) -> None:
        full, window = torch.ones(1, 20, 8), torch.ones(1, 7, 8)
        with pytest.raises(ConfigurationError, match="sliding windows"):
            kv_message(HostKv(((full, full), (window, window))))

    @pytest.mark.parametrize(
        "config",
        [
            {"model_type": "gemma2", "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4096},
            {"model_type": "mistral", "sliding_window": 4096},
            {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        ],
    )
    def test_models_with_sliding_windows(self, config: dict[str, Any]) -> None:
        with pytest.raises(ForeignMessageError, match="sliding window"):
            SdkIdentity.from_config(config_of(config))

    def test_windows_that_are_switched_off(self) -> None:
        qwen = {"model_type": "qwen2", "sliding_window": 32768, "use_sliding_window": False, "num_attention_heads": 14,
                "hidden_size": 896, "num_hidden_layers": 24, "num_key_value_heads": 2}  # fmt: skip
        found = SdkIdentity.from_config(config_of(qwen))
        assert (found.head_dim, found.num_kv_heads, found.hidden_dim, found.num_layers) == (64, 2, 896, 24)

    def test_composite_models(self) -> None:
        config = config_of({})
        config.get_text_config = lambda: SimpleNamespace()
        with pytest.raises(ForeignMessageError, match="composite"):
            SdkIdentity.from_config(config)

    def test_a_cache_that_lacks_positions(self) -> None:
        with pytest.raises(ConfigurationError, match="holds 15 of 16 positions"):
            context_message(make_context(kv_short=1), IDENTITY)
        with pytest.raises(ConfigurationError, match="holds 0 of 16 positions"):
            context_message(make_context(kv_short=None), IDENTITY)

    def test_a_cache_of_another_model(self) -> None:
        with pytest.raises(ForeignMessageError, match="2 layers of 2 heads of width 8"):
            context_message(make_context(), replace(IDENTITY, num_layers=3))


def config_of(fields: dict[str, Any]) -> Any:
    config = SimpleNamespace(to_dict=lambda: fields, _name_or_path="a/b")
    config.get_text_config = lambda: config
    return config


def test_tokens_alone_are_adopted_without_computing_anything() -> None:
    context = make_context(steps=0)
    engine: Any = SimpleNamespace(fingerprint=context.fingerprint, dtype="float32")
    message = context_message(context, IDENTITY)

    found = adopt_context(engine, message, [context.token_ids()])

    assert found.recipe_id == context.recipe_id
    assert found.kv_len == len(found)
    for fed, match in (([], "begins with token ids"), ([3], "begins with token ids"), ([[]], "begins with token ids")):
        with pytest.raises(ConfigurationError, match=match):
            adopt_context(engine, message, fed)
    with pytest.raises(ForeignMessageError, match="holds 12 positions, but 2"):
        adopt_context(engine, message, [[1, 2]])
    with pytest.raises(AvpError, match="the engine runs float16"):
        adopt_context(SimpleNamespace(fingerprint="", dtype="float16"), message, [context.token_ids()])  # pyright: ignore[reportArgumentType]


def test_a_hello_is_untrusted_input() -> None:
    hello = SdkHello("researcher", identity=replace(IDENTITY, tokenizer_hash="ab"))
    assert SdkHello.from_json(hello.to_json()) == hello
    assert SdkHello.from_json({}) == SdkHello("", version="")
    for data in (None, [], "x", {"agent_id": 1}, {"identity": []}, {"identity": {"hidden_dim": -1}},
                 {"identity": {"hidden_dim": True}}, {"capabilities": 1}):  # fmt: skip
        with pytest.raises(ForeignMessageError):
            SdkHello.from_json(data)


GOOD = encode_message(kv_message(HostKv(((torch.ones(1, 2, 3), torch.ones(1, 2, 3)),))), zstd_level=1)


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=120) | st.builds(lambda d, f: message_of(d, b"", f), st.binary(max_size=80), st.integers(0, 7))
)
def test_arbitrary_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        message = decode_message(data)
        unpack(memoryview(data[12:]))
        (kv_of if message.payload_type == "kv_cache" else hidden_states_of)(message)
    except AvpError:
        pass


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_altered_messages_are_read_or_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for offset, byte in changes:
        data[offset] = byte
    with suppress(AvpError):
        kv_of(decode_message(data))
