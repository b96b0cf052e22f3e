"""Without opentelemetry-api there are no spans, and nothing is wrapped; with it, stores and handoffs have theirs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from avp_agents import MemoryStore, Namespace, tracing
from avp_agents.errors import ContextLostError
from avp_agents.store import DiskStore, TieredStore
from avp_agents.testing.contexts import make_context
from avp_agents.usage import Handoff, Usage

TENANT = Namespace("tracing-tests", b"k" * 32)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Where finished spans go."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing.trace, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


@pytest.fixture
def without_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as it is where the package is not installed."""
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    spec = spec_from_file_location("tracing_alone", tracing.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_opentelemetry_nothing_happens(without_opentelemetry: ModuleType) -> None:
    module = without_opentelemetry

    def put() -> int:
        return 1

    assert module.traced("avp.store.put", dict)(put) is put
    with module.span("avp.handoff") as note:
        note("avp.handoff.contexts", 1)
    with module.start_operation("think", "a model", {"steps": 3}) as operation:
        operation.result(Usage(), Handoff(), "stop")
    with pytest.raises(KeyError), module.start_operation("think", "a model"):
        raise KeyError


def test_stores_have_spans_and_tiers_are_nested(spans: InMemorySpanExporter, tmp_path: Any) -> None:
    store = TieredStore(MemoryStore(namespace=TENANT), DiskStore(tmp_path, namespace=TENANT))
    handle = store.put(make_context())
    store.get(handle)
    finished = spans.get_finished_spans()
    outermost = [span for span in finished if span.parent is None]

    assert [span.name for span in outermost] == ["avp.store.put", "avp.store.get"]
    for span in outermost:
        assert dict(span.attributes or {}) == {
            "avp.store.kind": "TieredStore",
            "avp.namespace": TENANT.name,
            "avp.context.id": handle.id,
            "avp.context.positions": handle.tokens,
            "avp.context.bytes": handle.bytes,
        }
    assert {str((s.attributes or {})["avp.store.kind"]) for s in finished if s.parent} == {"MemoryStore", "DiskStore"}


def test_a_context_that_is_lost_is_an_error_of_its_span(spans: InMemorySpanExporter) -> None:
    with pytest.raises(ContextLostError):
        MemoryStore(namespace=TENANT).get("avp:1:" + "0" * 32)
    (span,) = spans.get_finished_spans()

    assert (span.attributes or {})["error.type"] == "ContextLostError"
    assert span.status.status_code is StatusCode.ERROR


def test_a_folder_is_shown_by_its_name(spans: InMemorySpanExporter) -> None:
    tracing.start_operation("think", "/home/ann/models/qwen").end()

    assert [span.name for span in spans.get_finished_spans()] == ["think qwen"]
