"""JoinNode: branches fan out, think, and come back as one context."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fake_engine import FakeEngine
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Send

from avp_agents import LatentEngine
from avp_agents.context import SplicedSegment
from avp_agents.engine.protocol import JoinStrategy
from avp_agents.errors import ConfigurationError, ContextLostError
from avp_langgraph import AvpChatModel, ContextState, GenerateNode, JoinNode, ThinkNode

QUESTION = HumanMessage("What does the park need?")
TOPICS = ("trees", "water", "money")


class State(MessagesState, ContextState):
    pass


def parks(model: Any, steps: int = 3, **join: Any) -> StateGraph[Any, Any, Any, Any]:
    """Three researchers, a join and a writer."""
    graph = StateGraph(State)
    for topic in TOPICS:
        graph.add_node(topic, ThinkNode(model, steps=steps, prompt=f"Think of {topic}."))
        graph.add_edge(START, topic)
    graph.add_node("join", JoinNode(model, **join))
    graph.add_edge([*TOPICS], "join")
    graph.add_node("writer", GenerateNode(model, context="join"))
    graph.add_edge("join", "writer")
    return graph


@pytest.mark.parametrize("strategy", ["replay", "splice"])
def test_the_writer_answers_on_the_joined_context(engine: FakeEngine, strategy: JoinStrategy) -> None:
    result = parks(engine, strategy=strategy).compile().invoke({"messages": [QUESTION]})
    joined = engine.resolve(result["contexts"]["join"])
    *_, join, write = engine.requests

    assert join.text == strategy
    assert write.base is joined
    assert result["messages"][-1].response_metadata["avp"]["mode"] == "kv"
    assert result["contexts"]["join"]["text"] == (f"money, trees, water joined by {strategy} ({len(joined)} positions)")


async def test_async_graphs_join_the_same_context(engine: FakeEngine) -> None:
    graph = parks(engine, strategy="splice").compile()
    expected = graph.invoke({"messages": [QUESTION]})
    result = await graph.ainvoke({"messages": [QUESTION]})

    assert result["contexts"]["join"]["id"] == expected["contexts"]["join"]["id"]
    assert result["messages"][-1].text == expected["messages"][-1].text


@pytest.mark.parametrize(
    ("contexts", "order"),
    [
        (None, ["money", "trees", "water"]),
        (["water", "money"], ["water", "money"]),
        (lambda state: [*state["contexts"]][:1], ["money"]),
    ],
)
def test_the_order_is_by_name_or_as_told(engine: FakeEngine, contexts: Any, order: list[str]) -> None:
    state: Any = {"messages": [QUESTION]}
    handles = {t: ThinkNode(engine, key=t, prompt=t).invoke(state)["contexts"][t] for t in sorted(TOPICS)}
    JoinNode(engine, key="join", contexts=contexts).invoke(state | {"contexts": handles})
    joined = engine.requests[-1].options["contexts"]

    assert [context.recipe_id for context in joined] == [engine.resolve(handles[key]).recipe_id for key in order]


def test_all_means_neither_its_own_last_one_nor_what_was_taken_back(engine: FakeEngine) -> None:
    state: Any = {"messages": [QUESTION]}
    handles = {t: ThinkNode(engine, key=t, prompt=t).invoke(state)["contexts"][t] for t in TOPICS}
    join = JoinNode(engine, key="join")
    first = join.invoke(state | {"contexts": handles})["contexts"]
    again = join.invoke(state | {"contexts": handles | first | {"water": None}})["contexts"]

    assert len(engine.requests[-1].options["contexts"]) == 2
    assert again["join"]["id"] != first["join"]["id"]


def test_branches_of_a_map_are_joined(engine: FakeEngine) -> None:
    def ask(state: Any) -> Any:
        return [HumanMessage(f"Think of {state['topic']}.")]

    graph = StateGraph(State)
    graph.add_node("researcher", ThinkNode(engine, key=lambda state: state["topic"], prompt=ask))
    graph.add_node("join", JoinNode(engine, contexts=lambda state: sorted(state["contexts"], reverse=True)))
    graph.add_conditional_edges(START, lambda state: [Send("researcher", {"topic": t}) for t in TOPICS], ["researcher"])
    graph.add_edge("researcher", "join")
    graph.compile().invoke({"messages": [QUESTION]})
    join = engine.requests[-1]

    assert [context.token_ids()[-2] for context in join.options["contexts"]]
    assert len(join.options["contexts"]) == 3


def test_a_joined_context_is_joined_again(engine: FakeEngine) -> None:
    graph = parks(engine, strategy="splice")
    graph.add_node("critic", ThinkNode(engine, context="join", prompt="Find the flaw."))
    graph.add_node("both", JoinNode(engine, contexts=["critic", "writer"]))
    graph.add_edge("join", "critic")
    graph.add_edge(["critic", "writer"], "both")
    result = graph.compile().invoke({"messages": [QUESTION]})

    assert engine.resolve(result["contexts"]["both"]).extends(engine.resolve(result["contexts"]["join"]))


def test_streams_tell_of_the_join(engine: FakeEngine) -> None:
    events = list(parks(engine).compile().stream({"messages": [QUESTION]}, stream_mode="custom"))
    told: Any = [event for event in events if event["node"] == "join"]

    assert [event["reason"] for event in told] == ["3 contexts joined by replay"]


class TestLostContexts:
    def state(self, engine: FakeEngine) -> Any:
        state: Any = {"messages": [QUESTION]}
        handles = {t: ThinkNode(engine, key=t, prompt=t).invoke(state)["contexts"][t] for t in TOPICS}
        return state | {"contexts": handles}

    def test_a_lost_one_is_left_out_and_that_is_said(
        self, engine: FakeEngine, caplog: pytest.LogCaptureFixture
    ) -> None:
        state = self.state(engine)
        engine.store.delete(state["contexts"]["water"])
        joined = JoinNode(engine, key="join").invoke(state)["contexts"]["join"]

        assert joined["text"].startswith("money, trees joined by replay")
        assert "A context is lost" in caplog.text

    def test_or_it_is_an_error_where_that_was_asked_for(self, engine: FakeEngine) -> None:
        state = self.state(engine)
        engine.store.delete(state["contexts"]["water"])
        with pytest.raises(ContextLostError):
            JoinNode(AvpChatModel(engine=engine, on_missing="error"), key="join").invoke(state)

    def test_nothing_left_is_always_an_error(self, engine: FakeEngine) -> None:
        state = self.state(engine)
        for handle in state["contexts"].values():
            engine.store.delete(handle)
        with pytest.raises(ContextLostError, match="All contexts to join are lost"):
            JoinNode(engine, key="join").invoke(state)

    def test_another_threads_contexts_are_not_joined(self, engine: FakeEngine) -> None:
        graph = parks(engine).compile(checkpointer=InMemorySaver())
        ours = graph.invoke({"messages": [QUESTION]}, {"configurable": {"thread_id": "a"}})
        theirs: Any = {"configurable": {"thread_id": "b"}}
        graph.invoke({"messages": [HumanMessage("Another one")]}, theirs, interrupt_before=["join"])
        graph.update_state(theirs, {"contexts": {"water": ours["contexts"]["water"]}}, as_node="water")
        result = graph.invoke(None, theirs)

        assert result["contexts"]["join"]["text"].startswith("money, trees joined")


@pytest.mark.parametrize(
    ("node", "state", "complaint"),
    [
        ({"key": "join"}, {"contexts": {}}, "There is no context to join"),
        ({"key": "join", "contexts": ["a"]}, {"contexts": {"b": None}}, "no context 'a' (there: 'b')"),
        ({"contexts": ["a"]}, {"contexts": {"a": None}}, "needs a key="),
    ],
)
def test_wiring_mistakes_are_told(engine: FakeEngine, node: Any, state: Any, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(complaint)):
        JoinNode(engine, **node).invoke(state)


def test_an_unknown_strategy_is_refused_when_the_graph_is_built(engine: FakeEngine) -> None:
    with pytest.raises(ConfigurationError, match="replay, splice, text"):
        JoinNode(engine, strategy="mix")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("strategy", ["replay", "splice"])
def test_three_researchers_on_the_default_model(real_engine: LatentEngine, strategy: JoinStrategy) -> None:
    model = AvpChatModel(engine=real_engine, max_tokens=4)
    result = parks(model, steps=2, strategy=strategy).compile().invoke({"messages": [QUESTION]})
    joined = real_engine.resolve(result["contexts"]["join"])
    made = result["messages"][-1].response_metadata["avp"]

    assert joined.latent_steps == made["tokens_not_decoded"] == 6
    assert any(isinstance(segment, SplicedSegment) for segment in joined.lineage) == (strategy == "splice")
    assert made["mode"] == "kv"
    assert made["positions_reused"] >= len(joined)


def test_answers_are_joined_as_text(real_engine: LatentEngine) -> None:
    model = AvpChatModel(engine=real_engine, max_tokens=4)
    state: Any = {"messages": [QUESTION]}
    answers = [GenerateNode(model, key=topic, prompt=f"Think of {topic}.").invoke(state) for topic in TOPICS]
    contexts = {key: handle for answer in answers for key, handle in answer["contexts"].items()}
    update = JoinNode(model, key="join", strategy="text").invoke({"contexts": contexts})
    joined = real_engine.resolve(update["contexts"]["join"])

    assert joined.is_text
    assert len(joined) < sum(handle["tokens"] for handle in contexts.values())
