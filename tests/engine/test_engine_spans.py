"""Each request to the engine is one span, named by the conventions for generative AI."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tiny_models import TinyModels

from avp_agents import LatentEngine, tracing
from avp_agents.errors import ContextWindowError

PROMPT = "What is 2 + 3?"


@pytest.fixture(scope="module")
def engine(tiny: TinyModels, open_module_engine: Callable[..., LatentEngine]) -> LatentEngine:
    return open_module_engine(tiny.path("llama"))


@pytest.fixture
def spans(engine: LatentEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Where finished spans go."""
    engine.load()
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing.trace, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


def only(spans: InMemorySpanExporter) -> tuple[ReadableSpan, dict[str, Any]]:
    (span,) = spans.get_finished_spans()
    return span, dict(span.attributes or {})


def test_thinking(engine: LatentEngine, spans: InMemorySpanExporter) -> None:
    context = engine.think(PROMPT, steps=3)
    span, attributes = only(spans)
    expected = {
        "gen_ai.operation.name": "think",
        "gen_ai.provider.name": "avp",
        "avp.request.latent_steps": 3,
        "gen_ai.usage.input_tokens": len(context) - 3,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.reasoning.output_tokens": 3,
        "avp.latent_steps": 3,
        "avp.handoff.mode": "none",
    }

    assert span.name == f"think {attributes['gen_ai.request.model']}"
    assert "/" not in attributes["gen_ai.request.model"], "no paths"
    assert expected.items() <= attributes.items()


def test_generating_on_a_context(engine: LatentEngine, spans: InMemorySpanExporter) -> None:
    context = engine.think(PROMPT, steps=3)
    spans.clear()
    generation = engine.generate(PROMPT, context=context, max_tokens=2, temperature=0.5, seed=7)
    _, attributes = only(spans)
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.max_tokens": 2,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 7,
        "gen_ai.response.finish_reasons": (generation.finish_reason,),
        "gen_ai.usage.input_tokens": generation.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": generation.usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": generation.usage.positions_reused,
        "avp.handoff.mode": "kv",
        "avp.handoff.positions_reused": generation.handoff.positions_reused,
    }

    assert expected.items() <= attributes.items()


def test_an_answer_that_is_left_early_ends_its_span(engine: LatentEngine, spans: InMemorySpanExporter) -> None:
    stream: Any = engine.stream(PROMPT, max_tokens=50)
    next(stream)
    assert spans.get_finished_spans() == ()
    stream.close()
    _, attributes = only(spans)

    assert "error.type" not in attributes
    assert "gen_ai.usage.output_tokens" not in attributes


def test_what_failed_says_why(engine: LatentEngine, spans: InMemorySpanExporter) -> None:
    with pytest.raises(ContextWindowError):
        engine.generate(PROMPT, max_tokens=10**6)

    assert only(spans)[1]["error.type"] == "ContextWindowError"


async def test_on_an_event_loop(engine: LatentEngine, spans: InMemorySpanExporter) -> None:
    context = await engine.athink(PROMPT, steps=3)
    await engine.agenerate(PROMPT, context=context, max_tokens=2)
    await engine.areplay(context)
    names = [(span.attributes or {})["gen_ai.operation.name"] for span in spans.get_finished_spans()]

    assert names == ["think", "chat", "replay"]
