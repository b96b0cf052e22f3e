"""Writes tests/vectors/frames.json: ``python tests/protocol/make_vectors.py``. `test_vectors` checks what it wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from frame_samples import FINGERPRINT, KEY, context_metadata, frame_of, keys, tokens

from avp_agents.context import Context, LatentRecipe, LatentSegment, Readout, SplicedSegment, TokenSegment
from avp_agents.kv_cache import HostKv
from avp_agents.protocol import (
    EncodedFrame,
    Frame,
    HiddenStates,
    encode_context,
    encode_hidden_states,
    encode_text,
    open_frame,
)
from avp_agents.protocol.kv_storage import load_tensor
from avp_agents.protocol.tensor_bytes import bytes_of

FILE = Path(__file__).parent.parent / "vectors" / "frames.json"
RECIPE = LatentRecipe(method="soft", k=256, temperature=1.0, renormalise=False, steps=2)


def frames() -> Iterator[tuple[str, EncodedFrame]]:
    """One frame for each thing that a frame can hold, out of numbers that every float format has exactly."""
    yield "text", encode_text("Thirty dollars: 東京", key=KEY)
    states = torch.arange(6).reshape(2, 3).bfloat16() / 4
    yield "hidden states in bfloat16", encode_hidden_states(HiddenStates(FINGERPRINT, states), key=KEY)
    prompt = TokenSegment((1, 4093, 198))
    yield "tokens only", encode_context(Context(FINGERPRINT, "float32", (prompt,)), key=KEY)
    latents = LatentSegment(torch.arange(8).reshape(2, 4).half() / 8, RECIPE)
    readout = Readout(torch.arange(4).half(), torch.tensor([7, 11]), torch.tensor([0.5, 0.25]))
    thought = Context(FINGERPRINT, "float16", (prompt, latents), readout)
    yield "latents and readout", encode_context(thought, key=KEY)
    numbers = torch.arange(2 * 5 * 2).reshape(2, 5, 2)
    thought.attach(kv=HostKv(((numbers.half(), -numbers.half()), (numbers[:1].float(), numbers[:, :, :1].bfloat16()))))
    yield "a KV-cache whose layers differ", encode_context(thought, key=KEY)
    yield "keys and values without a MAC", encode_context(thought, key=KEY, authenticate_kv=False)
    yield "int8", encode_context(thought, key=KEY, int8=True)
    yield "zstd", encode_context(thought, key=KEY, compress=True)
    joined = SplicedSegment((TokenSegment((2, 3)), LatentSegment(latents.embeddings, RECIPE, "ab" * 32)), prefix=1)
    yield "a splice", encode_context(Context(FINGERPRINT, "float16", (prompt, joined, TokenSegment((5,)))), key=KEY)


def refused() -> Iterator[tuple[str, bytes]]:
    """Frames that no receiver may accept, with why not. All but the first two have right MACs and checksums."""
    metadata, head = context_metadata([tokens(2)]), [bytes(8)]
    good = frame_of(metadata, head)
    yield "a frame of another key", frame_of(metadata, head, key=bytes(32))
    yield "one bit of the lineage is altered", good[:-96] + bytes([good[-96] ^ 1]) + good[-95:]
    yield "a byte is missing", good[:-1]
    yield "a byte is left over", good + b"\0"
    yield "version 2", frame_of(metadata, head, version=2)
    yield "an unknown flag", frame_of(metadata, head, flags=3)
    yield "an unknown frame kind", frame_of(context_metadata([tokens(2)], kind="video"), head)
    yield "an unknown section kind", frame_of(context_metadata([{**tokens(2), "kind": "tensor"}]), head)
    yield "an unknown metadata key", frame_of(context_metadata([tokens(2)], note="hi"), head)
    yield "a path for a fingerprint", frame_of(context_metadata([tokens(2)], fingerprint="../" * 21 + "."), head)
    yield "fewer bytes than the shape says", frame_of(context_metadata([{**tokens(2), "bytes": 4}]), [bytes(4)])
    yield "keys without values", frame_of(context_metadata([tokens(2), keys(0, (1, 2, 1), 8)]), head, [bytes(8)])
    yield "a token id below zero", frame_of(metadata, [b"\xff" * 8])
    yield "padding that is not zero", frame_of(metadata, [bytes(8) + b"\1"])


def describe(name: str, encoded: EncodedFrame) -> dict[str, Any]:
    """A frame, what it holds, and the intermediate results that somebody who implements it wants to compare."""
    data = bytes(encoded.assemble())
    header = encoded.layout.header
    digest_bytes = 16 * len(encoded.layout.metadata.sections)
    tail = data[encoded.layout.tail_offset :]
    frame = open_frame(data, key=KEY, trust_kv=True)
    return {
        "name": name,
        "frame": data.hex(),
        "kv_authenticated": header.kv_authenticated,
        "metadata_bytes": header.metadata_bytes,
        "head_bytes": header.head_bytes,
        "head_mac": header.mac.hex(),
        "metadata": encoded.layout.metadata.to_fields(),
        "offsets": list(encoded.layout.offsets),
        "xxh3_128": [tail[start : start + 16].hex() for start in range(0, digest_bytes, 16)],
        "tail_mac": tail[digest_bytes:].hex(),
        "values": section_values(frame),
    }


def section_values(frame: Frame) -> list[str]:
    """The decoded values of each section, as bytes in hex."""
    return [
        bytes(bytes_of(load_tensor(section, stored)) if section.is_kv else stored).hex()
        for section, stored in frame.sections()
    ]


def vectors() -> dict[str, Any]:
    """All of frames.json."""
    return {
        "key": KEY.hex(),
        "derived_key": hashlib.blake2b(KEY, digest_size=64, person=b"avp-frame-key").hexdigest(),
        "frames": [describe(name, frame) for name, frame in frames()],
        "refused": [{"name": name, "frame": data.hex()} for name, data in refused()],
    }


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(vectors(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
