"""Contexts between an engine of ours and avp 0.6.2, each in a process and an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from avp_agents import LatentEngine, MemoryStore
from avp_agents.context import Context, LatentSegment, TokenSegment
from avp_agents.errors import FingerprintMismatchError, ForeignMessageError
from avp_agents.kv_cache import HostKv
from avp_agents.protocol.sdk import (
    SdkHello,
    SdkIdentity,
    adopt_context,
    context_message,
    decode_message,
    encode_message,
    hidden_message,
    hidden_states_of,
    kv_of,
)
from avp_agents.testing.contexts import assert_same_bits, make_context

STEPS, TOKENS = 5, 12
QUESTION = "A pen costs 3 dollars. How much are 4 pens?"
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def sdk() -> Iterator[Ask]:
    """Asks the SDK's process; see `sdk_program.py`."""
    python = os.environ.get("AVP_SDK_PYTHON")
    if python is None:
        pytest.skip(
            "AVP_SDK_PYTHON is not set: python -m venv sdk; sdk/bin/pip install avp==0.6.2 'transformers>=5' torch; "
            "AVP_SDK_PYTHON=sdk/bin/python"
        )
    program = Path(__file__).with_name("sdk_program.py")
    with subprocess.Popen([python, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        requests, answers = process.stdin, process.stdout

        def ask(command: str, **arguments: Any) -> dict[str, Any]:
            requests.write(
                json.dumps([command, {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}])
            )
            requests.write("\n")
            requests.flush()
            return json.loads(answers.readline())

        yield ask
        requests.close()


@pytest.fixture(scope="module")
def hello(sdk: Ask, smollm2_path: Path) -> dict[str, Any]:
    return sdk("load", path=smollm2_path)["hello"]


@pytest.fixture(scope="module")
def engine(smollm2_path: Path) -> Iterator[LatentEngine]:
    with LatentEngine.from_pretrained(str(smollm2_path), dtype="float32", store=MemoryStore()) as engine:
        yield engine


def assert_same_tensors(kv: HostKv, file: Path) -> None:
    theirs = load_file(file)
    assert len(theirs) == 2 * len(kv.layers)
    for index, (keys, values) in enumerate(kv.layers):
        assert_same_bits(keys, theirs[f"{index}.keys"], f"keys of layer {index}")
        assert_same_bits(values, theirs[f"{index}.values"], f"values of layer {index}")


def appended_ids(context: Context, behind: Context) -> list[int]:
    """What our engine fed behind a context before it decoded."""
    prompt = context.lineage[len(behind.lineage)]
    assert isinstance(prompt, TokenSegment)
    return list(prompt.token_ids)


@pytest.mark.usefixtures("hello")
def test_a_context_of_the_sdk_is_adopted_and_answers_with_the_same_tokens(
    sdk: Ask, engine: LatentEngine, tmp_path: Path
) -> None:
    message_file, tensors = tmp_path / "message", tmp_path / "tensors"
    told = sdk("think", prompt=QUESTION, steps=STEPS, message=message_file, tensors=tensors)

    message = decode_message(message_file.read_bytes())
    context = adopt_context(engine, message, [told["ids"], STEPS])

    assert len(context) == context.kv_len == told["positions"]
    assert context.kv is not None
    assert_same_tensors(context.kv.to_host(), tensors)
    assert (message.extra["num_steps"], message.source_agent_id) == (str(STEPS), "researcher")
    answer = engine.generate("Only the number.", context=context, max_tokens=TOKENS)
    assert answer.handoff.mode == "kv"
    ids = appended_ids(answer.context, context)
    theirs = sdk("decode_on", message=message_file, ids=ids, tokens=len(answer.token_ids), tensors=tmp_path / "again")
    assert list(answer.token_ids) == theirs["tokens"]
    replayed = engine.replay(Context(context.fingerprint, context.dtype, context.lineage, context.readout))
    again = engine.generate("Only the number.", context=replayed, max_tokens=TOKENS)
    assert again.token_ids == answer.token_ids, "what was adopted can be rebuilt from its lineage"


def test_a_context_of_ours_continues_in_the_sdk_with_the_same_tokens(
    sdk: Ask, hello: dict[str, Any], engine: LatentEngine, tmp_path: Path
) -> None:
    identity = SdkHello.from_json(hello).identity
    assert identity is not None
    context = engine.think(QUESTION, steps=STEPS)
    assert context.kv is not None
    message_file = tmp_path / "message"

    message_file.write_bytes(encode_message(context_message(context, identity, agent="ours")))

    answer = engine.generate("Only the number.", context=context, max_tokens=TOKENS)
    ids = appended_ids(answer.context, context)
    theirs = sdk("decode_on", message=message_file, ids=ids, tokens=len(answer.token_ids), tensors=tmp_path / "tensors")
    assert theirs == {"tokens": list(answer.token_ids), "steps": STEPS, "family": "llama"}
    assert_same_tensors(context.kv.to_host(), tmp_path / "tensors")


@pytest.mark.usefixtures("hello")
def test_a_context_is_refused_where_what_was_fed_is_wrong(sdk: Ask, engine: LatentEngine, tmp_path: Path) -> None:
    told = sdk("think", prompt=QUESTION, steps=2, message=tmp_path / "message", tensors=tmp_path / "tensors")
    message = decode_message((tmp_path / "message").read_bytes())

    with pytest.raises(ForeignMessageError, match="positions"):
        adopt_context(engine, message, [told["ids"], 3])
    with pytest.raises(FingerprintMismatchError, match="does not come from this model and these ids"):
        adopt_context(engine, message, [[*told["ids"][:-1], 11], 2])


def test_hello_and_hashes_are_those_that_the_sdk_computes(hello: dict[str, Any], smollm2_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(smollm2_path, dtype="float32")
    vocabulary = AutoTokenizer.from_pretrained(smollm2_path).get_vocab()

    ours = SdkHello("researcher", identity=SdkIdentity.from_config(config, vocabulary))

    assert ours.to_json() == hello
    assert SdkHello.from_json(hello) == ours


def test_hidden_states_of_the_sdk_are_read_bit_for_bit(sdk: Ask, tmp_path: Path) -> None:
    names = sdk("write_messages", folder=tmp_path)["names"]
    expected = load_file(tmp_path / "hidden.safetensors")

    assert len(names) == 12
    for name in names:
        message = decode_message((tmp_path / f"{name}.hidden").read_bytes())
        assert_same_bits(hidden_states_of(message), expected[name], name)
        assert message.extra == {"note": "é"}
        assert message.map_id == ("vocab:00" if name.endswith("none") else "")


@pytest.mark.parametrize("level", [None, 1, 3, 19])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_sdk_reads_our_messages_bit_for_bit(sdk: Ask, tmp_path: Path, dtype: str, level: int | None) -> None:
    file, tensors = tmp_path / "message", tmp_path / "tensors"
    states = torch.randn(3, 8).to(getattr(torch, dtype))
    save_file({"states": states}, tensors)
    file.write_bytes(encode_message(hidden_message(states), zstd_level=level))
    assert sdk("read_hidden", message=file, tensors=tensors) == {
        "same": True, "shape": [3, 8], "dtype": dtype, "map": "",
    }  # fmt: skip

    context = make_context(dtype=dtype)
    identity = SdkIdentity("llama", hidden_dim=16, num_layers=2, num_kv_heads=2, head_dim=8)
    message = context_message(context, identity)
    file.write_bytes(encode_message(message, zstd_level=level))
    assert sdk("read_kv", message=file, tensors=tensors) == {"positions": len(context), "layers": 2}
    assert_same_tensors(kv_of(message), tensors)


def test_latents_that_are_found_again_have_the_sdks_recipe(sdk: Ask, engine: LatentEngine, tmp_path: Path) -> None:
    told = sdk("think", prompt=QUESTION, steps=3, message=tmp_path / "message", tensors=tmp_path / "tensors")
    context = adopt_context(engine, decode_message((tmp_path / "message").read_bytes()), [told["ids"], 3])

    latents = context.lineage[-1]
    assert isinstance(latents, LatentSegment)
    assert (latents.recipe.method, latents.recipe.k, latents.recipe.renormalise) == ("soft", None, False)
    assert context.readout is not None
    ours = engine.think(QUESTION, steps=3, k=None)
    assert context.recipe_id == ours.recipe_id, "the same ids and steps are the same context"
