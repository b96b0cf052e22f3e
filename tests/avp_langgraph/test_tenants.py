"""One compiled graph for many tenants, users and threads: nobody's context reaches anybody else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from fake_engine import FakeEngine
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langgraph.graph import END, START, MessagesState, StateGraph
from pydantic import ValidationError

from avp_agents import LatentEngine, MemoryStore, Namespace
from avp_agents.errors import ConfigurationError
from avp_langgraph import AvpChatModel, ContextState, GenerateNode, ThinkNode, close_engines

QUESTION = HumanMessage("What is 24 * 17 + 3?")
TENANTS, THREADS = ("acme", "globex"), ("one", "two")


class State(MessagesState, ContextState):
    """Messages, and contexts by node."""


def tenant_of(config: RunnableConfig) -> str:
    return config.get("configurable", {}).get("tenant", "")


def run_of(tenant: str, thread: str, user: str = "ann") -> RunnableConfig:
    return {"configurable": {"tenant": tenant, "thread_id": thread, "user_id": user}}


def made(message: BaseMessage) -> dict[str, Any]:
    return message.response_metadata["avp"]


def handle_of(message: BaseMessage) -> dict[str, Any]:
    return message.response_metadata["avp_context"]


def in_run(model: AvpChatModel, messages: list[BaseMessage], config: RunnableConfig, **call: Any) -> AIMessage:
    """The model's answer inside a run with that config, as in a graph's node."""
    return RunnableLambda(lambda _: model.invoke(messages, **call)).invoke(None, config)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeEngine]]:
    """The engines that were loaded; none has weights."""
    loaded: list[FakeEngine] = []

    def from_pretrained(name: str | None = None, **options: Any) -> FakeEngine:
        loaded.append(FakeEngine(model_path=name or "default", store=options["store"]))
        return loaded[-1]

    monkeypatch.setattr(LatentEngine, "from_pretrained", from_pretrained)
    monkeypatch.setattr("avp_agents.store.default_store", lambda namespace: MemoryStore(namespace=namespace))
    yield loaded
    close_engines()


def build_graph(thinker: AvpChatModel, solver: AvpChatModel) -> Any:
    graph = StateGraph(State)
    graph.add_node("researcher", ThinkNode(thinker, steps=2))
    graph.add_node("solver", GenerateNode(solver, context="researcher"))
    graph.add_edge(START, "researcher")
    graph.add_edge("researcher", "solver")
    graph.add_edge("solver", END)
    return graph.compile()


async def test_thirty_two_runs_at_once_answer_as_each_would_alone(loads: list[FakeEngine]) -> None:
    model = AvpChatModel(model="some/model", namespace=tenant_of)
    graph = build_graph(model, model)
    runs = [
        ({"messages": [HumanMessage(f"What is {number} + {number}?")]}, run_of(tenant, thread))
        for tenant in TENANTS for thread in THREADS for number in range(8)
    ]  # fmt: skip
    together = await asyncio.gather(*(graph.ainvoke(state, config) for state, config in runs))
    close_engines()
    alone = [graph.invoke(state, config) for state, config in runs]

    assert len(runs) == 32
    assert [state["messages"][-1].text for state in together] == [state["messages"][-1].text for state in alone]
    assert len({handle["id"] for state in together for handle in state["contexts"].values()}) == 64
    assert all(made(state["messages"][-1])["mode"] == "kv" for state in together)
    assert [engine.store.namespace.name in TENANTS for engine in loads] == [True, True]


@pytest.mark.parametrize("asked", [[QUESTION], []], ids=["with its messages", "alone"])
def test_another_tenants_handle_is_refused(loads: list[FakeEngine], asked: list[BaseMessage]) -> None:
    thinker = AvpChatModel(model="some/model", mode="latent", namespace=tenant_of)
    solver = AvpChatModel(model="some/model", namespace=tenant_of)
    stolen = in_run(thinker, [QUESTION], run_of("acme", "one"))
    answer = in_run(solver, [*asked, stolen, HumanMessage("And?")], run_of("globex", "one"))

    assert made(answer)["mode"] == ("rethink" if asked else "lost")
    assert "avp:1:" in made(answer)["reason"]
    assert answer.text


def test_another_tenants_handle_in_the_state_is_refused(loads: list[FakeEngine]) -> None:
    model = AvpChatModel(model="some/model", namespace=tenant_of)
    graph = build_graph(model, model)
    theirs = graph.invoke({"messages": [QUESTION]}, run_of("acme", "one"))["contexts"]["researcher"]
    solve = GenerateNode(model, context="researcher", key="solver")
    state = {"messages": [HumanMessage("What did they find?")], "contexts": {"researcher": theirs}}
    answer = RunnableLambda(solve.invoke).invoke(state, run_of("globex", "one"))["messages"][0]

    assert made(answer)["mode"] == "lost"
    assert made(answer)["positions_reused"] == 0


def test_another_users_handle_is_refused(loads: list[FakeEngine]) -> None:
    options: dict[str, Any] = {"model": "some/model", "namespace": tenant_of, "scope": "user"}
    thinker, solver = AvpChatModel(**options, mode="latent"), AvpChatModel(**options)
    anns = in_run(thinker, [QUESTION], run_of("acme", "one", user="ann"))
    bobs = in_run(solver, [QUESTION], run_of("acme", "two", user="bob"))
    pasted = bobs.model_copy(update={"response_metadata": {**bobs.response_metadata, "avp_context": handle_of(anns)}})

    assert made(in_run(solver, [QUESTION, anns], run_of("acme", "two", user="ann")))["mode"] == "kv"
    assert made(in_run(solver, [QUESTION, anns], run_of("acme", "two", user="bob")))["mode"] == "rethink"
    assert made(in_run(solver, [QUESTION, pasted, QUESTION], run_of("acme", "two", user="bob")))["mode"] == "text"


def test_a_run_without_a_tenant_is_refused(loads: list[FakeEngine]) -> None:
    model = AvpChatModel(model="some/model", namespace=tenant_of)

    with pytest.raises(ConfigurationError, match="must name the tenant"):
        model.invoke("hello")
    assert model.get_num_tokens("four") == 4


def test_an_engine_that_is_passed_has_one_tenant(engine: FakeEngine) -> None:
    with pytest.raises(ValidationError, match="the engine's namespace is 'tests'"):
        AvpChatModel(engine=engine, namespace=tenant_of)


async def test_on_the_real_model_thirty_two_runs_do_not_mix(real_engine: LatentEngine) -> None:
    """The tenants share weights and batches."""
    engines = {name: real_engine.for_store(MemoryStore(namespace=Namespace(name, b"k" * 32))) for name in TENANTS}
    graphs = {name: build_graph(*[AvpChatModel(engine=engine, max_tokens=2)] * 2) for name, engine in engines.items()}
    runs = [
        (tenant, {"messages": [HumanMessage(f"What is {number} + {number}?")]}, run_of(tenant, thread))
        for number in range(8) for thread in THREADS for tenant in TENANTS
    ]  # fmt: skip
    states = await asyncio.gather(*(graphs[tenant].ainvoke(state, config) for tenant, state, config in runs))

    questions = [state["messages"][0].text for _, state, _ in runs]
    for (tenant, _, _), question, state in zip(runs, questions, states, strict=True):
        ids = engines[tenant].resolve(handle_of(state["messages"][-1])).token_ids()
        seen = {other for other in questions if holds(ids, engines[tenant].encode(other))}
        assert seen == {question}


async def test_on_the_real_model_nothing_counts_as_cached_across_tenants(real_engine: LatentEngine) -> None:
    engines = {name: real_engine.for_store(MemoryStore(namespace=Namespace(name, b"k" * 32))) for name in TENANTS}
    cached = []
    for tenant in ("acme", "acme", "globex"):
        answer = await AvpChatModel(engine=engines[tenant], max_tokens=1).ainvoke("Name three rivers.")
        assert answer.usage_metadata is not None
        cached.append(answer.usage_metadata["input_token_details"]["cache_read"])  # pyright: ignore[reportTypedDictNotRequiredAccess]

    assert cached[0] == cached[2] == 0
    assert cached[1] > 0


def holds(ids: Sequence[int], part: Sequence[int]) -> bool:
    return any(list(ids[start : start + len(part)]) == list(part) for start in range(len(ids)))
