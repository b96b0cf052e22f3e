"""Latent steps inside vLLM against `LatentEngine` on SmolLM2: the same thoughts, and the same answers on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plugin_reference import ASKED, STEPS, TOKENS, Expected, answers, assert_same, expectations
from plugin_vllm import BLOCK, greedy, think, thinking_vllm, tokens
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.v1.core.sched.scheduler import Scheduler

from avp_agents.vllm.plugin.request import read_thought

TOWN = "The town lies on a river between two hills, and its market is held every Saturday under the old bridge. "
PROMPTS = (
    "Analyze: 24 * 17 + 3",
    TOWN * 4 + "What is held every Saturday?",
    TOWN * 4 + "Where does the town lie?",
    TOWN * 4 + "What is on the two sides?",
    TOWN * 8 + "What is held every Saturday?",
    TOWN * 12 + "Where does the town lie?",
)
"""The second to fourth fill a KV block but for a few positions, so that latent steps need another one."""
NEAR_A_BLOCK = slice(1, 4)

ROOMY, TIGHT = "whole prompts, no prefix cache", "chunks of 48, prefix cache, little KV memory"
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    ROOMY: {"enable_chunked_prefill": False, "enable_prefix_caching": False},
    TIGHT: {"max_num_batched_tokens": 48, "enable_prefix_caching": True, "num_gpu_blocks_override": 5},
}


@pytest.fixture(scope="module")
def expected(smollm2_path: Path) -> list[Expected]:
    return expectations(smollm2_path, PROMPTS)


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def llm(request: pytest.FixtureRequest, smollm2_path: Path, expected: list[Expected]) -> Iterator[LLM]:
    with thinking_vllm(smollm2_path, **CONFIGURATIONS[request.param]) as llm:
        yield llm


def _assert_near_a_block(references: list[Expected]) -> None:
    assert all(BLOCK - STEPS < len(reference.token_ids) < BLOCK for reference in references)


def test_thoughts_and_the_answers_on_them_are_the_same(llm: LLM, expected: list[Expected]) -> None:
    thoughts = [think(llm, [reference.token_ids], ASKED)[0] for reference in expected]

    for thought, reference in zip(thoughts, expected, strict=True):
        assert_same(thought, reference)
    answered = answers(llm, expected, [thought.embeddings for thought in thoughts])
    assert answered == [reference.answer for reference in expected]
    control = answers(llm, expected, [reference.others for reference in expected])
    assert all(answer != reference.answer for answer, reference in zip(control, expected, strict=True))


def test_thoughts_and_ordinary_requests_share_batches(llm: LLM, expected: list[Expected]) -> None:
    prompts = [TokensPrompt(prompt_token_ids=list(reference.token_ids)) for reference in expected]
    alone = llm.generate(prompts, greedy(TOKENS), use_tqdm=False)
    params = [SamplingParams(**ASKED.sampling_options()), greedy(TOKENS)]

    outputs = llm.generate([p for p in prompts for _ in params], params * len(prompts), use_tqdm=False)

    for thinking, reference in zip(outputs[::2], expected, strict=True):
        assert_same(read_thought(thinking.kv_transfer_params), reference)
    assert [tokens(output) for output in outputs[1::2]] == [tokens(output) for output in alone]
    assert all(output.kv_transfer_params is None for output in outputs[1::2])


@pytest.mark.parametrize("llm", [TIGHT], indirect=True)
def test_a_preempted_thought_goes_on_from_what_it_fed(
    llm: LLM, expected: list[Expected], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts that fill a KV block each, and one block more: whoever comes late to it is prefilled again."""
    preempted: list[int] = []
    preempt = Scheduler._preempt_request

    def watched(scheduler: Scheduler, request: Any, *args: Any, **options: Any) -> None:
        preempted.append(request.num_output_tokens)
        preempt(scheduler, request, *args, **options)

    monkeypatch.setattr(Scheduler, "_preempt_request", watched)
    near = expected[NEAR_A_BLOCK]
    _assert_near_a_block(near)

    thoughts = think(llm, [reference.token_ids for reference in near], ASKED)

    assert any(0 < sampled < STEPS for sampled in preempted)
    for thought, reference in zip(thoughts, near, strict=True):
        assert_same(thought, reference)


@pytest.mark.parametrize("llm", [TIGHT], indirect=True)
def test_the_prefix_cache_shares_prompts_and_never_latents(llm: LLM, expected: list[Expected]) -> None:
    """A prompt of one block and a bit is found again; a block that ends in latents is not, by whatever ids."""
    short, long = expected[1], expected[-1]
    for reference, block_of_prompt in ((short, 0), (long, len(long.token_ids) // BLOCK * BLOCK)):
        prompt = TokensPrompt(prompt_token_ids=list(reference.token_ids))
        params = SamplingParams(**ASKED.sampling_options())
        first = llm.generate(prompt, params, use_tqdm=False)[0]
        sampled = tokens(first)
        assert min(sampled) >= 49152

        again = llm.generate(prompt, params, use_tqdm=False)[0]

        assert again.num_cached_tokens == block_of_prompt
        assert_same(read_thought(again.kv_transfer_params), reference)
