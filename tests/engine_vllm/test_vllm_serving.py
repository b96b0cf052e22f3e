"""A real vLLM server: the same tokens over HTTP, and many graphs at once without mixing."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: see docs/vllm.md")
pytest.importorskip("obstore", reason="needs the extra `objects`")

from vllm_cases import STEPS, TOKENS, Reference, review, solve, without_kv

from avp_agents import Context, LatentEngine, TokenSegment
from avp_agents.answer.options import GenerateOptions
from avp_agents.store import open_store
from avp_agents.vllm import VllmEngine
from avp_agents.vllm.plugin.options import plugin_arguments

START_SECONDS = 240


@pytest.fixture(scope="module")
def engine(references: list[Reference], smollm2_path: Path, kv_store: str) -> Iterator[VllmEngine]:
    """On a server of its own; after the references, so that the two do not compute at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2_path)),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "512", "--max-num-seqs", "8", "--num-gpu-blocks-override", "16"),
        *("--trust-request-chat-template", "--enable-prompt-tokens-details"),
        *("--structured-outputs-config.backend", "guidance"),
        *plugin_arguments(thinks_as="LlamaForCausalLM", kv_store=kv_store),
    ]
    server = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url, server)
        with VllmEngine.from_server(url, dtype="float32", kv_store=kv_store) as opened:
            yield opened
    finally:
        server.terminate()
        server.wait()


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    latest = time.monotonic() + START_SECONDS
    while time.monotonic() < latest and server.poll() is None:
        try:
            if httpx.get(f"{url}/health").is_success:
                return
        except httpx.ConnectError:
            time.sleep(1)
    raise AssertionError("the server did not start; its log says why")


@pytest.mark.timeout(600)
def test_tokens_are_those_of_the_latent_engine(engine: VllmEngine, references: list[Reference]) -> None:
    for reference in references:
        case = reference.case
        assert solve(engine, case, reference.thought).token_ids == reference.answer.token_ids
        assert review(engine, case, reference.answer.context).token_ids == reference.review.token_ids
        assert solve(engine, case, reference.other).token_ids == reference.control.token_ids


def test_it_thinks_over_http(engine: VllmEngine, latent_engine: LatentEngine, references: list[Reference]) -> None:
    reference = references[0]

    thought = engine.think(reference.case.research, steps=STEPS)

    assert thought.recipe_id == reference.thought.recipe_id
    assert solve(latent_engine, reference.case, thought).token_ids == reference.answer.token_ids


def test_keys_and_values_go_to_and_come_from_the_store(
    engine: VllmEngine, latent_engine: LatentEngine, kv_store: str, references: list[Reference]
) -> None:
    reference = references[1]
    store = open_store(kv_store, share_kv=True)
    tokens: GenerateOptions = {"max_tokens": TOKENS, "min_tokens": TOKENS}

    answer = engine.generate(reference.case.solve, context=engine.resolve(store.put(reference.thought)), **tokens)
    handle = engine.store.put(answer.context)
    engine.save_kv(answer.context)
    went_on = latent_engine.generate(reference.case.review, context=store.get(handle), **tokens)

    assert (answer.handoff.mode, answer.token_ids) == ("kv", reference.answer.token_ids)
    assert (went_on.handoff.mode, went_on.token_ids) == ("kv", reference.review.token_ids)


def test_tokens_that_no_text_becomes_are_sent_all_the_same(
    engine: VllmEngine, latent_engine: LatentEngine, references: list[Reference]
) -> None:
    thought = references[0].thought
    letters = tuple(token for letter in "The answer is" for token in engine.encode(letter))
    context = Context(thought.fingerprint, thought.dtype, (*thought.lineage, TokenSegment(letters)))

    ours, theirs = (each.generate("Go on.", context=context, max_tokens=12) for each in (engine, latent_engine))

    assert ours.token_ids == theirs.token_ids
    engine.store.put(context)
    assert engine.save_kv(context).kv_len == len(context)


async def test_sixteen_pipelines_at_once_do_not_mix(engine: VllmEngine, references: list[Reference]) -> None:
    async def pipeline(reference: Reference) -> tuple[int, ...]:
        thought = await engine.athink(reference.case.research, steps=STEPS)
        answer = await engine.agenerate(reference.case.solve, context=without_kv(thought), max_tokens=8, min_tokens=8)
        return answer.token_ids

    answers = await asyncio.gather(*(pipeline(references[index % 3]) for index in range(16)))

    for index, answer in enumerate(answers):
        assert answer == references[index % 3].answer.token_ids[:8]
