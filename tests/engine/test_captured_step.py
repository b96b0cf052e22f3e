"""The captured step computes what the eager step computes. On a CPU it is captured by torch.compile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch
from conftest import OpenEngine
from tiny_models import TinyModels

from avp_agents import LatentEngine, LatentSegment
from avp_agents.errors import ConfigurationError

MODEL = "mistral-sliding"
QUESTIONS = ["What is two plus two?", "Name a colour, and say in one sentence why you like it most of all."]


@pytest.fixture(scope="module")
def eager(tiny: TinyModels, open_module_engine: Callable[..., LatentEngine]) -> LatentEngine:
    return open_module_engine(tiny.path(MODEL))


@pytest.fixture(scope="module")
def captured(tiny: TinyModels, open_module_engine: Callable[..., LatentEngine]) -> LatentEngine:
    return open_module_engine(tiny.path(MODEL), capture_steps=True)


async def test_captured_steps_think_and_decode_as_eager_ones(eager: LatentEngine, captured: LatentEngine) -> None:
    """Latent steps and tokens agree for rows of several lengths in one bucket, sliding window crossed."""
    thoughts = [
        await asyncio.gather(*(engine.athink(question, steps=4) for question in QUESTIONS))
        for engine in (eager, captured)
    ]
    for one, other in zip(*thoughts, strict=True):
        ours, theirs = one.lineage[-1], other.lineage[-1]
        assert isinstance(ours, LatentSegment)
        assert isinstance(theirs, LatentSegment)
        torch.testing.assert_close(ours.embeddings, theirs.embeddings, rtol=1e-4, atol=1e-4)

    answers = [
        await asyncio.gather(
            *(engine.agenerate("Go on.", context=context, max_tokens=12, min_tokens=12) for context in contexts)
        )
        for engine, contexts in zip((eager, captured), thoughts, strict=True)
    ]
    assert [a.token_ids for a in answers[0]] == [a.token_ids for a in answers[1]]


def test_capture_and_batch_invariance_exclude_each_other(tiny: TinyModels, open_engine: OpenEngine) -> None:
    """A captured step picks its shapes by company, so the engine refuses both at once."""
    engine = open_engine(tiny.path(MODEL), capture_steps=True, batch_invariant=True)
    with pytest.raises(ConfigurationError, match="exclude each other"):
        engine.load()
