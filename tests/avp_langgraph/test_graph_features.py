"""Context nodes under what LangGraph offers: subgraphs, commands, interrupts, retries, caches, tasks, event loops."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from blockbuster import BlockBuster, blockbuster_ctx
from fake_engine import FakeEngine
from langchain_core.messages import AnyMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import CachePolicy, Command, RetryPolicy, interrupt
from typing_extensions import TypedDict

from avp_agents import DiskStore, LatentEngine, Namespace
from avp_langgraph import AvpChatModel, ContextState, GenerateNode, JoinNode, ThinkNode, merge_contexts

QUESTION = HumanMessage("What is 24 * 17 + 3?")


class State(MessagesState, ContextState):
    pass


class TestSubgraphs:
    def test_a_subgraph_that_shares_the_channel_hands_its_contexts_on(self, engine: FakeEngine) -> None:
        research = StateGraph(State)
        research.add_node("facts", ThinkNode(engine))
        research.add_edge(START, "facts")
        graph = StateGraph(State)
        graph.add_node("research", research.compile())
        graph.add_node("solver", GenerateNode(engine, context="facts"))
        graph.add_edge(START, "research")
        graph.add_edge("research", "solver")
        result = graph.compile(checkpointer=InMemorySaver()).invoke(
            {"messages": [QUESTION]}, {"configurable": {"thread_id": "a"}}
        )

        assert set(result["contexts"]) == {"facts", "solver"}
        assert result["messages"][-1].response_metadata["avp"]["mode"] == "kv"

    def test_a_subgraph_with_a_state_of_its_own_is_called_with_what_it_needs(self, engine: FakeEngine) -> None:
        class Inner(TypedDict):
            question: str
            contexts: Annotated[dict[str, Any], merge_contexts]

        inner = StateGraph(Inner)
        inner.add_node("facts", ThinkNode(engine, prompt=lambda state: [HumanMessage(state["question"])]))
        inner.add_edge(START, "facts")
        research = inner.compile()

        def call(state: State) -> dict[str, Any]:
            return {"contexts": research.invoke({"question": state["messages"][0].text, "contexts": {}})["contexts"]}

        graph = StateGraph(State)
        graph.add_node("research", call)
        graph.add_node("solver", GenerateNode(engine, context="facts"))
        graph.add_edge(START, "research")
        graph.add_edge("research", "solver")
        result = graph.compile().invoke({"messages": [QUESTION]})

        assert result["messages"][-1].response_metadata["avp"]["mode"] == "kv"


def test_commands_update_the_channel_and_choose_the_way(engine: FakeEngine) -> None:
    think = ThinkNode(engine, key="facts")

    def research(state: State, config: RunnableConfig) -> Command[str]:
        return Command(update=think.invoke(state, config), goto="solver")

    graph = StateGraph(State)
    graph.add_node("research", research, destinations=("solver",))
    graph.add_node("solver", GenerateNode(engine, context="facts"))
    graph.add_edge(START, "research")
    result = graph.compile().invoke({"messages": [QUESTION]})

    assert result["contexts"]["facts"]["agent"] == "research"
    assert result["messages"][-1].response_metadata["avp"]["mode"] == "kv"


class TestInterrupts:
    def graph(self, engine: Any) -> Any:
        """The researcher thinks, a person is asked, the solver answers on the thought."""

        def approve(state: State) -> dict[str, Any]:
            return {"messages": [HumanMessage(interrupt("May I answer?"))]}

        graph = StateGraph(State)
        graph.add_node("researcher", ThinkNode(engine, steps=2))
        graph.add_node("approve", approve)
        graph.add_node("solver", GenerateNode(AvpChatModel(engine=engine, max_tokens=4), context="researcher"))
        graph.add_edge(START, "researcher")
        graph.add_edge("researcher", "approve")
        graph.add_edge("approve", "solver")
        return graph

    def test_the_thought_waits_for_the_person(self, engine: FakeEngine) -> None:
        graph, config = self.graph(engine).compile(checkpointer=InMemorySaver()), {"configurable": {"thread_id": "a"}}
        waiting = graph.invoke({"messages": [QUESTION]}, config)
        result = graph.invoke(Command(resume="Yes, briefly."), config)

        assert waiting["__interrupt__"][0].value == "May I answer?"
        assert [request.kind for request in engine.requests] == ["think", "generate"]
        assert engine.requests[-1].base is engine.resolve(result["contexts"]["researcher"])
        assert "Yes, briefly." in engine.requests[-1].text

    def test_and_outlives_the_process(self, real_engine: LatentEngine, tmp_path: Path, smollm2_path: Path) -> None:
        """What a new process would find: the checkpoint and the store's folder, nothing in memory."""
        database, config = str(tmp_path / "checkpoints.sqlite"), {"configurable": {"thread_id": "a"}}

        def run(command: Any) -> Any:
            store = DiskStore(tmp_path / "contexts", namespace=Namespace("tests", b"k" * 32))
            with SqliteSaver.from_conn_string(database) as saver:
                return self.graph(real_engine.for_store(store)).compile(checkpointer=saver).invoke(command, config)

        run({"messages": [QUESTION]})
        made = run(Command(resume="Yes."))["messages"][-1].response_metadata["avp"]

        assert made["mode"] in ("kv", "replay")
        assert made["tokens_not_decoded"] == 2


class TestCaches:
    @pytest.fixture
    def graph(self, engine: FakeEngine) -> Any:
        graph = StateGraph(State)
        graph.add_node("solver", GenerateNode(engine, context="researcher"), cache_policy=CachePolicy())
        graph.add_edge(START, "solver")
        return graph.compile(cache=InMemoryCache())

    def thought(self, engine: FakeEngine, about: str) -> Any:
        return ThinkNode(engine, key="researcher").invoke({"messages": [HumanMessage(about)]})["contexts"]

    def test_a_cached_node_answers_again_on_the_same_context(self, engine: FakeEngine, graph: Any) -> None:
        state = {"messages": [QUESTION], "contexts": self.thought(engine, "numbers")}
        first, second = graph.invoke(state), graph.invoke(state)

        assert [request.kind for request in engine.requests] == ["think", "generate"]
        assert second["contexts"]["solver"] == first["contexts"]["solver"]

    def test_but_never_for_another_context(self, engine: FakeEngine, graph: Any) -> None:
        answers = [
            graph.invoke({"messages": [QUESTION], "contexts": self.thought(engine, about)})["messages"][-1].text
            for about in ("numbers", "rivers")
        ]

        assert [request.kind for request in engine.requests] == ["think", "generate"] * 2
        assert answers[0] != answers[1]

    def test_a_cached_handle_that_died_is_noticed(self, engine: FakeEngine) -> None:
        graph = StateGraph(State)
        graph.add_node("researcher", ThinkNode(engine), cache_policy=CachePolicy())
        graph.add_node("solver", GenerateNode(engine, context="researcher"))
        graph.add_edge(START, "researcher")
        graph.add_edge("researcher", "solver")
        cached = graph.compile(cache=InMemoryCache())
        first = cached.invoke({"messages": [QUESTION]})
        engine.store.delete(first["contexts"]["researcher"])
        for handle in engine.store.list():
            engine.store.delete(handle)
        second = cached.invoke({"messages": [QUESTION]})["messages"][-1]

        assert second.response_metadata["avp"]["mode"] == "rethink"
        assert second.text == first["messages"][-1].text


def test_a_join_is_retried_like_any_node(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    join, failures = engine.join, [OSError("once")]

    def fail_once(*args: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return join(*args, **options)

    monkeypatch.setattr(engine, "join", fail_once)
    graph = StateGraph(State)
    for name in "ab":
        graph.add_node(name, ThinkNode(engine, prompt=name))
        graph.add_edge(START, name)
    policy = RetryPolicy(initial_interval=0.01, retry_on=OSError)
    graph.add_node("join", JoinNode(engine), retry_policy=policy)
    graph.add_edge(["a", "b"], "join")
    result = graph.compile().invoke({"messages": [QUESTION]})

    assert result["contexts"]["join"]["text"].startswith("a, b joined by replay")


class TestFunctionalApi:
    def workflow(self, engine: FakeEngine, saver: InMemorySaver) -> Any:
        think, join = ThinkNode(engine, key="thought"), JoinNode(engine, key="all")

        @task
        def research(topic: str) -> Any:
            return think.invoke({"messages": [HumanMessage(topic)]})["contexts"]["thought"]

        @entrypoint(checkpointer=saver)
        def plan(topics: list[str]) -> Any:
            handles = dict(zip(topics, [future.result() for future in [research(t) for t in topics]], strict=True))
            approved = interrupt("Go on?")
            joined = join.invoke({"contexts": handles})
            answer = GenerateNode(engine, key="answer", context="all").invoke(
                joined | {"messages": [HumanMessage(approved)]}
            )
            return answer["messages"][-1].response_metadata["avp"]["mode"]

        return plan

    def test_tasks_hand_over_handles_and_are_not_run_again(self, engine: FakeEngine) -> None:
        config: Any = {"configurable": {"thread_id": "a"}}
        plan = self.workflow(engine, InMemorySaver())
        plan.invoke(["trees", "water"], config)
        mode = plan.invoke(Command(resume="Yes."), config)

        assert mode == "kv"
        assert [request.kind for request in engine.requests] == ["think", "think", "join", "generate"]


class TestEventLoops:
    """`langgraph dev` refuses blocking calls in asynchronous nodes."""

    @pytest.fixture
    def no_blocking_calls(self) -> Iterator[BlockBuster]:
        with blockbuster_ctx(["avp_agents", "avp_langgraph"]) as blockbuster:
            yield blockbuster

    def graph(self, model: AvpChatModel) -> Any:
        graph = StateGraph(State)
        for name in "ab":
            graph.add_node(name, ThinkNode(model, prompt=name, steps=2))
            graph.add_edge(START, name)
        graph.add_node("join", JoinNode(model))
        graph.add_node("solver", GenerateNode(model, context="join"))
        graph.add_edge(["a", "b"], "join")
        graph.add_edge("join", "solver")
        graph.add_edge("solver", END)
        return graph.compile()

    @pytest.fixture
    def store(self, tmp_path: Path) -> DiskStore:
        return DiskStore(tmp_path / "contexts", namespace=Namespace("tests", b"k" * 32))

    @pytest.mark.usefixtures("no_blocking_calls")
    async def test_nothing_blocks_the_loop_on_a_disk_store(self, real_engine: LatentEngine, store: DiskStore) -> None:
        model = AvpChatModel(engine=real_engine.for_store(store), max_tokens=3)
        result = await self.graph(model).ainvoke({"messages": [QUESTION]})

        assert result["messages"][-1].response_metadata["avp"]["mode"] == "kv"

    @pytest.mark.usefixtures("no_blocking_calls")
    async def test_the_check_sees_blocking_calls(self, real_engine: LatentEngine, store: DiskStore) -> None:
        context = await real_engine.athink("Hello", steps=1)
        with pytest.raises(Exception, match="Blocking call"):
            store.put(context)


def test_states_without_messages_are_served_by_prompt_functions(engine: FakeEngine) -> None:
    class Plain(TypedDict):
        topic: str
        answers: Annotated[list[AnyMessage], operator.add]
        contexts: Annotated[dict[str, Any], merge_contexts]

    graph = StateGraph(Plain)
    graph.add_node("a", ThinkNode(engine, prompt=lambda state: [HumanMessage(state["topic"])]))
    graph.add_node("join", JoinNode(engine))
    graph.add_edge(START, "a")
    graph.add_edge("a", "join")
    result = graph.compile().invoke({"topic": "trees", "answers": [], "contexts": {}})

    assert set(result["contexts"]) == {"a", "join"}
