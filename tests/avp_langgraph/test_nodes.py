"""ThinkNode and GenerateNode in graphs: contexts in state, branches, retries, checkpoints."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from fake_engine import FakeEngine
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import RetryPolicy, Send
from pydantic import BaseModel
from typing_extensions import TypedDict

from avp_agents.errors import ConfigurationError
from avp_agents.handle import ContextHandle
from avp_langgraph import AvpChatModel, ContextState, GenerateNode, ThinkNode, merge_contexts

QUESTION = HumanMessage("What is 24 * 17 + 3?")


class State(MessagesState, ContextState):
    pass


def researcher_solver(engine: FakeEngine, checkpointer: BaseCheckpointSaver[Any] | None = None) -> Any:
    graph = StateGraph(State)
    graph.add_node("researcher", ThinkNode(engine, steps=7))
    graph.add_node("solver", GenerateNode(engine, context="researcher", prompt="Solve it."))
    graph.add_edge(START, "researcher")
    graph.add_edge("researcher", "solver")
    return graph.compile(checkpointer=checkpointer)


def test_the_solver_answers_on_the_researchers_context(engine: FakeEngine) -> None:
    result = researcher_solver(engine).invoke({"messages": [QUESTION]})
    think, solve = engine.requests
    answer = result["messages"][-1]

    assert [think.kind, solve.kind] == ["think", "generate"]
    assert solve.base is engine.resolve(result["contexts"]["researcher"])
    assert solve.text == f"||Solve it.||{QUESTION.text}||"
    assert answer.response_metadata["avp"]["mode"] == "kv"
    assert answer.response_metadata["avp_context"] == result["contexts"]["solver"]
    assert result["contexts"]["researcher"]["agent"] == "researcher"
    assert len(result["messages"]) == 2


async def test_async_graphs_give_the_same(engine: FakeEngine) -> None:
    graph = researcher_solver(engine)
    expected = graph.invoke({"messages": [QUESTION]})
    result = await graph.ainvoke({"messages": [QUESTION]})

    assert result["messages"][-1].text == expected["messages"][-1].text
    assert {key: handle["id"] for key, handle in result["contexts"].items()} == {
        key: handle["id"] for key, handle in expected["contexts"].items()
    }


def test_tokens_stream_out_of_a_node(engine: FakeEngine) -> None:
    graph = researcher_solver(engine)
    pieces = [
        piece.text
        for piece, where in graph.stream({"messages": [QUESTION]}, stream_mode="messages")
        if where["langgraph_node"] == "solver"
    ]

    assert len(pieces) > 3
    assert "".join(pieces) == graph.invoke({"messages": [QUESTION]})["messages"][-1].text


def test_a_chain_thinks_on_thoughts(engine: FakeEngine) -> None:
    graph = StateGraph(State)
    graph.add_node("researcher", ThinkNode(engine, steps=7))
    graph.add_node("critic", ThinkNode(engine, steps=5, context="researcher", prompt="Find the flaw."))
    graph.add_node("solver", GenerateNode(engine, context="critic"))
    graph.add_edge(START, "researcher")
    graph.add_edge("researcher", "critic")
    graph.add_edge("critic", "solver")
    result = graph.compile().invoke({"messages": [QUESTION]})
    critic = engine.resolve(result["contexts"]["critic"])

    assert critic.extends(engine.resolve(result["contexts"]["researcher"]))
    assert critic.latent_steps == 12
    assert result["messages"][-1].response_metadata["avp"]["tokens_not_decoded"] == 12


class TopicState(TypedDict):
    topic: str
    contexts: dict[str, Any]


class TopicsState(TypedDict):
    topics: list[str]
    messages: Annotated[list[AnyMessage], operator.add]
    contexts: Annotated[dict[str, Any], merge_contexts]


def test_eight_branches_do_not_mix(engine: FakeEngine) -> None:
    topics = [f"topic {number}" for number in range(8)]
    about: Any = lambda state: [HumanMessage(f"Research {state['topic']}")]  # noqa: E731
    key: Any = lambda state: state["topic"]  # noqa: E731

    graph = StateGraph(TopicsState)
    graph.add_node("researcher", ThinkNode(engine, key=key, prompt=about))
    graph.add_node("solver", GenerateNode(engine, context=key, key=lambda s: f"answer {s['topic']}", prompt=about))
    graph.add_node("collect", lambda state: {})
    graph.add_conditional_edges(
        START, lambda state: [Send("researcher", {"topic": topic}) for topic in state["topics"]], ["researcher"]
    )
    graph.add_edge("researcher", "collect")
    graph.add_conditional_edges(
        "collect",
        lambda state: [Send("solver", {"topic": topic, "contexts": state["contexts"]}) for topic in state["topics"]],
        ["solver"],
    )
    result = graph.compile().invoke({"topics": topics, "messages": [], "contexts": {}})

    assert set(result["contexts"]) == {*topics, *(f"answer {topic}" for topic in topics)}
    assert len({handle["id"] for handle in result["contexts"].values()}) == 16
    for topic, answer in zip(topics, result["messages"], strict=True):
        alone = AvpChatModel(engine=engine)
        on = alone.invoke([HumanMessage(f"Research {topic}")], mode="latent")
        expected = alone.invoke([HumanMessage(f"Research {topic}")], avp_context=on.response_metadata["avp_context"])
        assert answer.text == expected.text


def test_a_retried_node_finds_its_context_again(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    put, failures = engine.store.put, [OSError("once"), OSError("twice")]

    def put_and_fail(*args: Any, **options: Any) -> ContextHandle:
        handle = put(*args, **options)
        if failures:
            raise failures.pop()
        return handle

    monkeypatch.setattr(engine.store, "put", put_and_fail)
    graph = StateGraph(State)
    graph.add_node("researcher", ThinkNode(engine), retry_policy=RetryPolicy(initial_interval=0.01, retry_on=OSError))
    graph.add_edge(START, "researcher")
    graph.compile().invoke({"messages": [QUESTION]})

    assert [request.kind for request in engine.requests] == ["think"] * 3
    assert engine.store.stats().contexts == 1


@pytest.fixture(params=["memory", "sqlite"])
def checkpointer(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[BaseCheckpointSaver[Any]]:
    if request.param == "memory":
        yield InMemorySaver()
    else:
        with SqliteSaver.from_conn_string(str(tmp_path / "checkpoints.sqlite")) as saver:
            yield saver


def test_checkpoints_hold_small_handles(engine: FakeEngine, checkpointer: BaseCheckpointSaver[Any]) -> None:
    graph = researcher_solver(engine, checkpointer)
    config: Any = {"configurable": {"thread_id": "a"}}
    graph.invoke({"messages": [QUESTION]}, config)
    saved = checkpointer.get(config)
    assert saved is not None
    contexts = saved["channel_values"]["contexts"]

    for handle in contexts.values():
        kind, data = checkpointer.serde.dumps_typed(handle)
        assert kind == "msgpack"
        assert len(data) < 300
        assert ContextHandle.from_state(handle).to_state().items() <= handle.items()
    assert b"tensor" not in checkpointer.serde.dumps_typed(saved["channel_values"])[1]


def test_a_thread_goes_on_from_its_checkpoint(engine: FakeEngine, checkpointer: BaseCheckpointSaver[Any]) -> None:
    config: Any = {"configurable": {"thread_id": "a"}}
    researcher_solver(engine, checkpointer).invoke({"messages": [QUESTION]}, config, interrupt_before=["solver"])
    resumed = researcher_solver(engine, checkpointer).invoke(None, config)

    assert resumed["messages"][-1].response_metadata["avp"]["mode"] == "kv"


def test_another_threads_handle_is_refused_and_the_graph_goes_on(engine: FakeEngine) -> None:
    graph = researcher_solver(engine, InMemorySaver())
    ours = graph.invoke({"messages": [QUESTION]}, {"configurable": {"thread_id": "a"}})
    theirs: Any = {"configurable": {"thread_id": "b"}}
    graph.invoke({"messages": [HumanMessage("Another question")]}, theirs, interrupt_before=["solver"])
    graph.update_state(theirs, {"contexts": {"researcher": ours["contexts"]["researcher"]}}, as_node="researcher")
    result = graph.invoke(None, theirs)

    assert result["messages"][-1].response_metadata["avp"]["mode"] == "lost"
    assert engine.requests[-1].base is None


def test_a_pydantic_state_works_too(engine: FakeEngine) -> None:
    class Record(BaseModel):
        messages: Annotated[list[AnyMessage], operator.add]
        contexts: Annotated[dict[str, Any], merge_contexts] = {}

    graph = StateGraph(Record)
    graph.add_node("researcher", ThinkNode(engine))
    graph.add_node("solver", GenerateNode(engine, context="researcher"))
    graph.add_edge(START, "researcher")
    graph.add_edge("researcher", "solver")
    result = graph.compile().invoke(Record(messages=[QUESTION]))

    assert result["messages"][-1].response_metadata["avp"]["mode"] == "kv"


def test_a_context_that_was_taken_back_is_not_used(engine: FakeEngine) -> None:
    node = GenerateNode(engine, key="solver", context="researcher")
    node.invoke({"messages": [QUESTION], "contexts": {"researcher": None}})

    assert engine.requests[-1].base is None


def test_outside_of_a_graph_a_node_is_a_runnable(engine: FakeEngine) -> None:
    update = ThinkNode(engine, key="researcher", steps=3).invoke({"messages": [QUESTION]})

    assert engine.resolve(update["contexts"]["researcher"]).latent_steps == 3


@pytest.mark.parametrize(
    ("node", "state", "complaint"),
    [
        ({"key": "k"}, {}, "no messages for this ThinkNode"),
        ({}, {"messages": [QUESTION]}, "needs a key="),
        ({"key": "k", "context": "a"}, {"messages": [QUESTION]}, "no context 'a' (there: none)"),
        ({"key": "k", "context": "a"}, {"messages": [QUESTION], "contexts": {"b": None}}, "(there: 'b')"),
    ],
)
def test_wiring_mistakes_are_told(engine: FakeEngine, node: Any, state: Any, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(complaint)):
        ThinkNode(engine, **node).invoke(state)


def test_messages_of_other_models_pass_through(engine: FakeEngine) -> None:
    history = [SystemMessage("Be brief."), QUESTION, AIMessage("411"), HumanMessage("Sure?")]
    GenerateNode(engine, key="solver").invoke({"messages": history})

    assert engine.requests[-1].text == f"|Be brief.||{QUESTION.text}||411||Sure?||"
