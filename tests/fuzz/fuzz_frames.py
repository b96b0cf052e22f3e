"""Feeds the frame decoder mutated frames: ``python tests/fuzz/fuzz_frames.py --inputs 1000000 --seed 0``.

It starts from the published vectors and changes bytes, lengths and metadata. Half of what comes out gets right MACs and
checksums, so that the decoder has to judge what is behind them. Nothing but an AvpError may escape, no input may take
longer than a second. In ``atheris_frames.py`` libFuzzer chooses the inputs.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgpack
import xxhash

from avp_agents.errors import AvpError
from avp_agents.protocol import (
    FrameReader,
    Limits,
    decode_context,
    decode_hidden_states,
    decode_text,
    inspect_frame,
    open_frame,
)
from avp_agents.protocol.frame_layout import DIGEST_BYTES, HEADER_BYTES, MAC_OFFSET, FrameLayout, Header
from avp_agents.protocol.frame_mac import head_mac, tail_mac
from avp_agents.protocol.frame_metadata import unpack_metadata

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "frames.json").read_text(encoding="utf-8"))
KEY = bytes.fromhex(VECTORS["key"])
CORPUS = [bytes.fromhex(case["frame"]) for case in (*VECTORS["frames"], *VECTORS["refused"])]
DECODERS = {"context": decode_context, "hidden_states": decode_hidden_states, "text": decode_text}
LIMITS = Limits(frame_bytes=1 << 20, value_bytes=1 << 20)
SLOWEST = 1.0
INTERESTING = (0, 1, 0x7F, 0x80, 0xC0, 0xC1, 0xDD, 0xDF, 0xFF)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**48,
    2**64 - 1,
    1.5,
    float("nan"),
    "",
    "zstd",
    "../..",
    b"\0",
    [],
    {},
)


class Bytes:
    """The bytes of a `ByteSource`."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def size(self) -> int:
        return len(self._data)

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(self._data), "read past what was checked"
        return self._data[offset : offset + length]


def decode(data: bytes) -> str:
    """Decode an input in every way there is; the outcome's name."""
    outcome = "decoded"
    try:
        frame = open_frame(bytearray(data), key=KEY, limits=LIMITS, trust_kv=True)
        DECODERS[frame.metadata.kind](frame)
    except AvpError as error:
        outcome = type(error).__name__
    reader = FrameReader(key=KEY, limits=LIMITS, trust_kv=True)
    try:
        half = len(data) // 2
        reader.feed(data[:half])
        reader.feed(data[half:])
        frame = reader.finish()
        DECODERS[frame.metadata.kind](frame)
        assert outcome == "decoded", "two ways to read a frame must agree"
    except AvpError:
        assert outcome != "decoded", "two ways to read a frame must agree"
    try:
        inspect_frame(Bytes(data), key=KEY, verify=True, limits=LIMITS)
    except AvpError:
        assert outcome != "decoded", "what can be decoded can be inspected"
    return outcome


def mutate(choose: random.Random) -> bytes:
    """One of the vectors, changed, and perhaps signed again."""
    data = changed(choose.choice(CORPUS), choose)
    return authentic(data) if choose.random() < 0.5 else data


def changed(frame: bytes, choose: random.Random) -> bytes:
    """A frame with other metadata, other bytes or other lengths."""
    data = bytearray(frame)
    if choose.random() < 0.3:
        data = with_other_metadata(data, choose)
    for _ in range(choose.choice((0, 1, 1, 2, 4, 8))):
        at = choose.randrange(len(data)) if len(data) else 0
        match choose.randrange(5):
            case 0:
                data[at : at + 1] = bytes([choose.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([choose.choice(INTERESTING)])
            case 2:
                del data[at : at + choose.randrange(1, 80)]
            case 3:
                data[at:at] = choose.randbytes(choose.randrange(1, 80))
            case 4:
                data[8 + 8 * choose.randrange(3) :][:8] = choose.randrange(2 ** choose.randrange(1, 65)).to_bytes(
                    8, "little"
                )
    return bytes(data)


def with_other_metadata(data: bytearray, choose: random.Random) -> bytearray:
    """The frame with one value of its metadata replaced; the header says how long it is now."""
    end = HEADER_BYTES + int.from_bytes(data[8:16], "little")
    try:
        metadata = msgpack.unpackb(data[HEADER_BYTES:end])
    except (ValueError, TypeError):  # no msgpack, or a map with a map for a key
        return data
    target: Any = metadata
    while isinstance(target, dict | list) and target:
        name = choose.choice(list(target) if isinstance(target, dict) else range(len(target)))
        if not isinstance(target[name], dict | list) or choose.random() < 0.3:
            target[name] = choose.choice(VALUES)
            break
        target = target[name]
    packed = msgpack.packb(metadata) or b""
    old = -(-end // 64) * 64
    new = -(-(HEADER_BYTES + len(packed)) // 64) * 64
    lengths = (len(packed), int.from_bytes(data[16:24], "little") + new - old, len(data) + new - old)
    header = data[:8] + b"".join((length % 2**64).to_bytes(8, "little") for length in lengths) + data[MAC_OFFSET:64]
    return header + packed + bytes(new - HEADER_BYTES - len(packed)) + data[old:]


def authentic(data: bytes) -> bytes:
    """The input as a sender who holds the key would have signed it, as far as it can be laid out."""
    limits = Limits()
    try:
        header = Header.parse(data, limits)
    except AvpError:
        return data
    mac = head_mac(KEY)
    mac.update(data[:MAC_OFFSET] + data[HEADER_BYTES : header.head_bytes])
    data = data[:MAC_OFFSET] + mac.digest() + data[HEADER_BYTES:]
    try:
        end = HEADER_BYTES + header.metadata_bytes
        layout = FrameLayout(header, unpack_metadata(data[HEADER_BYTES:end], limits))
        layout.check()
    except AvpError:
        return data
    stored = [
        (section, data[offset : offset + section.stored_bytes])
        for section, offset in zip(layout.metadata.sections, layout.offsets, strict=True)
    ]
    digests = b"".join(xxhash.xxh3_128_digest(value) for _, value in stored)
    closing = tail_mac(KEY)
    closing.update(mac.digest())
    if header.kv_authenticated:
        closing.update(b"".join(value for section, value in stored if section.is_kv))
    closing.update(digests)
    assert len(digests) == DIGEST_BYTES * len(stored)
    return data[: layout.tail_offset] + digests + closing.digest() + data[header.frame_bytes :]


def run(inputs: int, seed: int) -> dict[str, Any]:
    """Decode so many inputs; what came of them."""
    choose, outcomes, slowest = random.Random(seed), Counter[str](), 0.0
    for data in CORPUS:
        outcomes[decode(data)] += 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    for _ in range(inputs):
        data = mutate(choose)
        began = time.perf_counter()
        try:
            outcomes[decode(data)] += 1
        except BaseException:
            print(f"this input is not handled:\n{data.hex()}", file=sys.stderr)
            raise
        slowest = max(slowest, time.perf_counter() - began)
        assert slowest < SLOWEST, f"{slowest:.2f} s for {data.hex()}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    seconds = time.perf_counter() - started
    return {"inputs": inputs, "seconds": round(seconds, 1), "slowest_ms": round(1000 * slowest, 1), "grown_kib": grown,
            "outcomes": dict(outcomes)}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(run(options.inputs, options.seed), indent=1))
