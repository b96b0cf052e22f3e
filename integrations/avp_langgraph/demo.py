"""A researcher → solver graph, run twice: handing over a latent context, and handing over text.

Both graphs have the same nodes, prompts, question and engine. In the text graph the researcher decodes its findings and
leaves an ordinary message, as any chat model would; in the latent graph it thinks and leaves a handle.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph

from avp_agents.demo import AgentRun, Comparison, DemoRequest, GraphRun, compare
from avp_agents.engine.protocol import Engine
from avp_langgraph.chat_model import AvpChatModel
from avp_langgraph.messages import HANDLE_KEY, METADATA_KEY

_RESEARCH = "Analyze the problem carefully."
_SOLVE = "Solve the problem step by step."


def run(engine: Engine, request: DemoRequest, report: Callable[[str], None]) -> Comparison:
    """Run both graphs on one engine."""

    def run_graph(request: DemoRequest, latent: bool) -> GraphRun:
        graph = latent_graph(engine, request) if latent else text_graph(engine, request)
        return _measure(engine, graph, request.question)

    return compare(run_graph, request, report, graph="graph")


def latent_graph(engine: Engine, request: DemoRequest) -> CompiledStateGraph:
    """The researcher thinks and hands over its context."""
    researcher = AvpChatModel(engine=engine, mode="latent", latent_steps=request.latent_steps)
    return _graph(researcher, AvpChatModel(engine=engine, max_tokens=request.max_tokens), lambda message: message)


def text_graph(engine: Engine, request: DemoRequest) -> CompiledStateGraph:
    """The researcher writes its findings down and hands over the text alone."""
    researcher = AvpChatModel(engine=engine, max_tokens=request.researcher_tokens)
    return _graph(researcher, AvpChatModel(engine=engine, max_tokens=request.max_tokens), _without_handle)


def _graph(
    researcher: AvpChatModel, solver: AvpChatModel, hand_over: Callable[[AIMessage], AIMessage]
) -> CompiledStateGraph:
    def research(state: MessagesState) -> dict[str, Any]:
        return {"messages": [hand_over(researcher.invoke([SystemMessage(_RESEARCH), *state["messages"]]))]}

    def solve(state: MessagesState) -> dict[str, Any]:
        return {"messages": [solver.invoke([*state["messages"], HumanMessage(_SOLVE)])]}

    graph = StateGraph(MessagesState)
    graph.add_node("researcher", research)
    graph.add_node("solver", solve)
    graph.add_edge(START, "researcher")
    graph.add_edge("researcher", "solver")
    return graph.compile()


def _without_handle(message: AIMessage) -> AIMessage:
    """The message as another chat model would have left it: its text, and no context behind it."""
    kept = {key: value for key, value in message.response_metadata.items() if key != HANDLE_KEY}
    return message.model_copy(update={"response_metadata": kept})


def _measure(engine: Engine, graph: CompiledStateGraph, question: str) -> GraphRun:
    """Run a graph; its nodes run one after another, so each one's time lies between two updates.

    Its contexts are deleted afterwards, so that the next graph cannot reuse a prompt that this one prefilled.
    """
    agents: list[AgentRun] = []
    received: AIMessage | None = None
    start = before = time.perf_counter()
    for update in graph.stream({"messages": [HumanMessage(question)]}, stream_mode="updates"):
        now = time.perf_counter()
        ((name, change),) = update.items()
        (message,) = change["messages"]
        agents.append(_agent_run(name, now - before, message, received))
        received, before = message, now
    for handle in engine.store.list():
        engine.store.delete(handle)
    return GraphRun(tuple(agents), seconds=before - start)


def _agent_run(name: str, seconds: float, message: AIMessage, received: AIMessage | None) -> AgentRun:
    usage = message.usage_metadata
    assert usage is not None
    made = message.response_metadata[METADATA_KEY]
    return AgentRun(
        agent=name,
        seconds=seconds,
        latent_steps=made["latent_steps"],
        tokens_decoded=made["tokens_decoded"],
        positions_reused=usage.get("input_token_details", {}).get("cache_read", 0),
        bytes_handed_over=made["bytes"] + _bytes_in_state(received),
        mode=made["mode"] if received is None or HANDLE_KEY in received.response_metadata else "text",
        text=message.text,
    )


def _bytes_in_state(received: AIMessage | None) -> int:
    """What the graph's state carries from one agent to the next: the handle, or the text."""
    if received is None:
        return 0
    handle = received.response_metadata.get(HANDLE_KEY)
    return len((received.text if handle is None else json.dumps(handle)).encode())
