"""The published vectors: frames and SDK messages byte for byte, as somebody who implements the formats reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make_vectors
import pytest

from avp_agents.errors import FrameError
from avp_agents.protocol import decode_context, decode_hidden_states, decode_text, open_frame
from avp_agents.protocol.sdk import decode_message, encode_message, model_hash, tokenizer_hash

FRAMES = json.loads(make_vectors.FILE.read_text(encoding="utf-8"))
SDK = json.loads((Path(__file__).parent.parent / "vectors" / "sdk.json").read_text(encoding="utf-8"))
KEY = bytes.fromhex(FRAMES["key"])
DECODERS = {"context": decode_context, "hidden_states": decode_hidden_states, "text": decode_text}


def named(cases: list[dict[str, Any]]) -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in cases]


@pytest.mark.parametrize("vector", named(FRAMES["frames"]))
def test_a_frame_holds_what_its_vector_says(vector: dict[str, Any]) -> None:
    frame = open_frame(bytes.fromhex(vector["frame"]), key=KEY, trust_kv=True)

    assert frame.metadata.to_fields() == vector["metadata"]
    assert list(frame.layout.offsets) == vector["offsets"]
    assert make_vectors.section_values(frame) == vector["values"]
    DECODERS[vector["metadata"]["kind"]](frame)


def test_encoding_makes_the_vectors_again() -> None:
    made = make_vectors.vectors()

    for ours, published in zip(made["frames"], FRAMES["frames"], strict=True):
        if published["name"] == "zstd":  # whose bytes depend on the library's version
            assert ours["values"] == published["values"]
        else:
            assert ours == published
    assert made["refused"] == FRAMES["refused"]
    assert made["derived_key"] == FRAMES["derived_key"]


@pytest.mark.parametrize("vector", named(FRAMES["refused"]))
def test_frames_that_no_receiver_may_accept(vector: dict[str, Any]) -> None:
    with pytest.raises(FrameError):
        decode_context(open_frame(bytes.fromhex(vector["frame"]), key=KEY, trust_kv=True))


@pytest.mark.parametrize("vector", named(SDK["messages"]))
def test_an_sdk_message_holds_what_its_vector_says(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["message"])

    message = decode_message(data)

    found = {name: getattr(message, name) for name in vector["fields"]}
    assert found == vector["fields"] | {n: tuple(v) for n, v in vector["fields"].items() if n == "shape"}
    assert bytes(message.body).hex() == vector["body"]
    if vector["written_by_0_6"]:
        assert encode_message(message) == data


def test_hashes_are_those_of_the_sdk() -> None:
    for case in SDK["model_hashes"]:
        assert model_hash(case["config"]) == case["hash"]
    for case in SDK["tokenizer_hashes"]:
        assert tokenizer_hash(case["vocabulary"]) == case["hash"]
