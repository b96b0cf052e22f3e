"""Latent steps inside vLLM by the ridge map, for an untied head, on Qwen2.5-Coder-0.5B."""

from __future__ import annotations

from pathlib import Path

from plugin_reference import STEPS, answers, assert_same, expectations
from plugin_vllm import BLOCK, think, thinking_vllm

from avp_agents.vllm.plugin.request import ThoughtRequest

ASKED = ThoughtRequest(steps=STEPS, method="ridge")
PROMPTS = (
    "Analyze: 24 * 17 + 3",
    "Write a Python function that reverses a list, and explain it.",
    "def area(width, height):\n    return width * height\n\n" * 9 + "What does this module do?",
)


def test_thoughts_and_the_answers_on_them_are_the_same(qwen_path: Path) -> None:
    expected = expectations(qwen_path, PROMPTS, ASKED)
    prompts = [reference.token_ids for reference in expected]
    assert len(prompts[-1]) > BLOCK

    with thinking_vllm(qwen_path, num_gpu_blocks_override=12) as llm:
        thoughts = think(llm, prompts, ASKED)
        for thought, reference in zip(thoughts, expected, strict=True):
            assert thought.recipe.method == "ridge"
            assert_same(thought, reference)
        answered = answers(llm, expected, [thought.embeddings for thought in thoughts])
        control = answers(llm, expected, [reference.others for reference in expected])

    assert answered == [reference.answer for reference in expected]
    assert all(answer != reference.answer for answer, reference in zip(control, expected, strict=True))
