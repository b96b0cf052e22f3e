"""Chat models share engines: loaded once, at the first call, and closed on demand."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fake_engine import FakeEngine

from avp_agents import LatentEngine
from avp_agents.errors import ConfigurationError
from avp_langgraph import AvpChatModel, close_engines, shared_engine


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> Any:
    """What was loaded, as (name, options); loading takes a moment, and no weights."""
    loaded: list[tuple[str | None, dict[str, Any]]] = []

    def from_pretrained(name: str | None = None, **options: Any) -> FakeEngine:
        time.sleep(0.02)
        loaded.append((name, options))
        return FakeEngine(model_path=name or "default")

    monkeypatch.setattr(LatentEngine, "from_pretrained", from_pretrained)
    yield loaded
    close_engines()


def test_making_a_model_loads_nothing(loads: list[Any]) -> None:
    AvpChatModel(model="some/model")

    assert loads == []


def test_many_threads_load_an_engine_once(loads: list[Any]) -> None:
    with ThreadPoolExecutor(8) as pool:
        engines = list(pool.map(lambda _: shared_engine("some/model"), range(8)))

    assert len(loads) == 1
    assert len(set(map(id, engines))) == 1


def test_other_models_and_options_are_loaded_and_namespaces_share_them(loads: list[Any]) -> None:
    asked = [("a", {}, None), ("b", {}, None), ("a", {"dtype": "float32"}, None), ("a", {}, "tenant")]
    engines = {id(shared_engine(name, options, namespace=tenant)) for name, options, tenant in asked * 2}

    assert len(engines) == 4
    assert [(name, options.get("dtype")) for name, options in loads] == [("a", None), ("b", None), ("a", "float32")]
    assert shared_engine("a", namespace="tenant").store.namespace.name == "tenant"


def test_one_model_does_not_wait_for_another_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_may_end = threading.Event()

    def from_pretrained(name: str | None = None, **options: Any) -> FakeEngine:
        if name == "slow":
            assert slow_may_end.wait(10)
        return FakeEngine()

    monkeypatch.setattr(LatentEngine, "from_pretrained", from_pretrained)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(shared_engine, "slow")
        shared_engine("quick")
        assert not slow.done()
        slow_may_end.set()
        assert slow.result(timeout=10)


def test_a_failed_load_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[str | None] = []

    def from_pretrained(name: str | None = None, **options: Any) -> FakeEngine:
        attempts.append(name)
        if len(attempts) == 1:
            raise ConfigurationError("the disk was full")
        return FakeEngine()

    monkeypatch.setattr(LatentEngine, "from_pretrained", from_pretrained)
    with pytest.raises(ConfigurationError, match="the disk was full"):
        shared_engine("some/model")

    assert isinstance(shared_engine("some/model"), FakeEngine)


def test_closed_engines_are_loaded_again(loads: list[Any]) -> None:
    first = shared_engine("some/model")
    close_engines()
    second = shared_engine("some/model")

    assert isinstance(first, FakeEngine)
    assert first.closed
    assert second is not first
    assert len(loads) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_no_engines() -> None:
    parents = shared_engine("some/model")
    child = os.fork()
    if child == 0:
        os._exit(0 if shared_engine("some/model") is not parents else 1)

    assert os.waitpid(child, 0)[1] == 0


def test_a_model_calls_its_engine_at_the_first_invoke(loads: list[Any]) -> None:
    model = AvpChatModel(model="some/model", engine_options={"dtype": "float32"}, namespace="tenant")
    answers = [model.invoke("hello"), model.invoke("hello")]

    assert answers[0].text == answers[1].text
    ((name, options),) = loads
    assert (name, options["dtype"], options["store"].namespace.name) == ("some/model", "float32", "tenant")


def test_a_call_can_name_another_model(loads: list[Any]) -> None:
    model = AvpChatModel(model="some/model")

    assert model.invoke("hello", model="other/model").response_metadata["model_name"] == "other/model"
    assert [name for name, _ in loads] == ["other/model"]


def test_options_that_are_no_json_data_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"engine_options must be JSON data.*engine=LatentEngine"):
        AvpChatModel(engine_options={"store": object()}).invoke("hello")
