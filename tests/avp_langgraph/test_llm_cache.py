"""LangChain's answer cache for the whole process: what must not be mixed up has entries of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableLambda

from avp_agents import MemoryStore, Namespace
from avp_langgraph import AvpChatModel

SOLVE = HumanMessage("Solve it.")


@pytest.fixture(autouse=True)
def _cache() -> Iterator[None]:
    set_llm_cache(InMemoryCache())
    yield
    set_llm_cache(None)


@pytest.fixture
def thoughts(engine: FakeEngine) -> list[AIMessage]:
    """Two contexts behind which the same text is asked."""
    thinker = AvpChatModel(engine=engine, mode="latent")
    made = [thinker.invoke([HumanMessage(text)]) for text in ("What is 1 + 1?", "What is 2 + 2?")]
    engine.requests.clear()
    return made


def handle_of(message: AIMessage) -> dict[str, Any]:
    return message.response_metadata["avp_context"]


@pytest.mark.parametrize("way", ["given", "on a message"])
def test_two_contexts_are_two_calls_of_the_engine(engine: FakeEngine, thoughts: list[AIMessage], way: str) -> None:
    model = AvpChatModel(engine=engine)

    def answer(thought: AIMessage) -> str:
        if way == "given":
            return model.invoke([SOLVE], avp_context=handle_of(thought)).text
        return model.invoke([thought, SOLVE]).text

    answers = [answer(thought) for thought in thoughts]
    assert len(engine.requests) == 2
    assert answers[0] != answers[1]

    assert [answer(thought) for thought in thoughts] == answers
    assert len(engine.requests) == 2


async def test_event_loops_use_the_same_entries(engine: FakeEngine, thoughts: list[AIMessage]) -> None:
    model = AvpChatModel(engine=engine)
    answer = model.invoke([thoughts[0], SOLVE])

    assert (await model.ainvoke([thoughts[0], SOLVE])).text == answer.text
    assert (await model.ainvoke([thoughts[1], SOLVE])).text != answer.text
    assert len(engine.requests) == 2


@pytest.mark.parametrize(
    "other",
    [{"chat_template_kwargs": {"enable_thinking": False}}, {"temperature": 0.5}, {"stop": ["\n"]}, {"max_tokens": 3}],
)
def test_other_options_are_other_entries(engine: FakeEngine, other: dict[str, Any]) -> None:
    AvpChatModel(engine=engine).invoke([SOLVE])
    AvpChatModel(engine=engine, **other).invoke([SOLVE])
    AvpChatModel(engine=engine).invoke([SOLVE], **other)

    assert len(engine.requests) == 3


def test_tenants_share_no_entry(engine: FakeEngine) -> None:
    for tenant in ("acme", "globex", "acme"):
        engine_of_tenant = engine.for_store(MemoryStore(namespace=Namespace(tenant, b"k" * 32)))
        AvpChatModel(engine=engine_of_tenant).invoke([SOLVE])

    assert len(engine.requests) == 2


def test_tenants_of_one_model_share_no_entry(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avp_langgraph.chat_model.shared_engine", lambda *args, namespace: engine)
    model = AvpChatModel(namespace=lambda config: config.get("configurable", {})["tenant"])
    ask = RunnableLambda(lambda _: model.invoke([SOLVE]))
    for tenant in ("acme", "globex", "acme"):
        ask.invoke(None, {"configurable": {"tenant": tenant}})

    assert len(engine.requests) == 2
