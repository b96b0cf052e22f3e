"""What a running graph and its callbacks are told of handoffs."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import FakeEngine
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import LLMResult
from langchain_core.runnables import RunnableLambda
from langgraph.graph import START, MessagesState, StateGraph

from avp_langgraph import AvpChatModel, ContextState, GenerateNode, ThinkNode

QUESTION = HumanMessage("What is 24 * 17 + 3?")


class State(MessagesState, ContextState): ...


@pytest.fixture
def graph(engine: FakeEngine) -> Any:
    builder = StateGraph(State)
    builder.add_node("researcher", ThinkNode(AvpChatModel(engine=engine), steps=3))
    builder.add_node("solver", GenerateNode(AvpChatModel(engine=engine), context="researcher"))
    builder.add_edge(START, "researcher")
    builder.add_edge("researcher", "solver")
    return builder.compile()


def test_each_handoff_is_an_event_of_the_custom_stream(graph: Any) -> None:
    events, states = [], []
    for kind, chunk in graph.stream({"messages": [QUESTION]}, stream_mode=["custom", "values"]):
        (events if kind == "custom" else states).append(chunk)
    made = states[-1]["messages"][-1].response_metadata["avp"]

    told = ("mode", "reason", "bytes", "milliseconds", "positions_reused")
    assert events == [{"type": "avp_handoff", "node": "solver"} | {name: made[name] for name in told}]
    assert events[0]["mode"] == "kv"
    assert events[0]["positions_reused"] == states[-1]["contexts"]["researcher"]["tokens"]


async def test_on_an_event_loop(graph: Any) -> None:
    events = [event async for event in graph.astream({"messages": [QUESTION]}, stream_mode="custom")]

    assert [(event["node"], event["mode"]) for event in events] == [("solver", "kv")]


def test_fallbacks_are_told_too(graph: Any, engine: FakeEngine) -> None:
    thought = AvpChatModel(engine=engine, mode="latent").invoke([QUESTION])
    engine.store.delete(thought.response_metadata["avp_context"])
    messages = [QUESTION, thought, HumanMessage("Are you sure?")]
    events = list(graph.stream({"messages": messages}, stream_mode="custom"))

    assert [(event["node"], event["mode"]) for event in events] == [("researcher", "rethink"), ("solver", "kv")]


def test_outside_of_a_graph_nobody_is_told(engine: FakeEngine) -> None:
    model = AvpChatModel(engine=engine)
    thought = AvpChatModel(engine=engine, mode="latent").invoke([QUESTION])

    assert model.invoke([QUESTION, thought]).response_metadata["avp"]["mode"] == "kv"
    assert RunnableLambda(model.invoke).invoke([QUESTION, thought]).response_metadata["avp"]["mode"] == "kv"


def test_callbacks_see_the_handoff_in_the_result(graph: Any) -> None:
    """As LangSmith and other tracers do: the whole message, its metadata included."""

    class Tracer(BaseCallbackHandler):
        seen: list[tuple[str, str]] = []  # noqa: RUF012

        def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
            message: Any = response.generations[0][0]
            metadata = message.message.response_metadata
            self.seen.append((metadata["avp_context"]["agent"], metadata["avp"]["mode"]))

    tracer = Tracer()
    answer = graph.invoke({"messages": [QUESTION]}, {"callbacks": [tracer]})["messages"][-1]

    assert isinstance(answer, AIMessage)
    assert tracer.seen == [("researcher", "none"), ("solver", "kv")]
