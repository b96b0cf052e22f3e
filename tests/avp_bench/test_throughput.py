"""The throughput bench runs what it says, as often and as many at once as it says, and leaves no engine open."""

from __future__ import annotations

import asyncio

import pytest
from typer.testing import CliRunner

from avp_agents import LatentEngine, MemoryStore
from avp_agents.cli import app
from avp_agents.engine.protocol import Engine
from avp_agents.errors import EngineClosedError
from avp_bench.throughput import EngineArm, PipelineWork, arms, measure


@pytest.mark.parametrize("hands_over", ["latent", "text"])
def test_a_real_engine_is_timed_and_closed(smollm2_path: str, hands_over: str) -> None:
    engine = LatentEngine.from_pretrained(str(smollm2_path), device="cpu", store=MemoryStore(), kv_pool_bytes=2**27)
    work = PipelineWork(steps=2, note_tokens=3, answer_tokens=2)
    arm = EngineArm("an arm", lambda: engine, work.latent if hands_over == "latent" else work.text)

    found = measure(arm, [1, 2], 3, lambda _: None)

    assert [(each.arm, each.concurrency) for each in found] == [("an arm", 1), ("an arm", 2)]
    assert all(each.per_minute > 0 and each.median_seconds > 0 for each in found)
    with pytest.raises(EngineClosedError):
        engine.generate("Hello")


def test_so_many_run_at_once_and_every_question_is_its_own(smollm2_path: str) -> None:
    engine = LatentEngine.from_pretrained(str(smollm2_path), device="cpu", store=MemoryStore())
    running, most = 0, 0
    questions: list[str] = []

    async def pipeline(engine: Engine, question: str) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        questions.append(question)
        await asyncio.sleep(0.01)
        running -= 1

    measure(EngineArm("counted", lambda: engine, pipeline), [3], 7, lambda _: None)

    assert most == 3
    assert len(set(questions)) == len(questions) == 3 + 7


def test_the_arms_are_both_engines_and_plain_text() -> None:
    names = [arm.name for arm in arms("a/model", "bfloat16", PipelineWork(), 4, eager=True)]

    assert names == ["latent, LatentEngine", "latent, VllmEngine", "text, vLLM"]


@pytest.mark.parametrize("levels", ["", "0", "1,x", "-2"])
def test_concurrency_is_checked_before_anything_is_loaded(levels: str) -> None:
    result = CliRunner().invoke(app, ["bench", "throughput", "--concurrency", levels])

    assert result.exit_code != 0
    assert "1,4,16" in str(result.exception) + result.output
