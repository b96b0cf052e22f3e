"""A process that runs a graph and is killed between the researcher and the solver; and the graph that resumes."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from langchain_core.messages import HumanMessage
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, MessagesState, StateGraph

from avp_agents import LatentEngine, MemoryStore, Namespace
from avp_agents.store import DiskStore, TieredStore
from avp_langgraph import AvpChatModel

QUESTION = HumanMessage("A shop sells pens at 3 dollars each. How much do 14 pens cost?", id="question")
STEPS, TOKENS = 5, 10
THREAD: Any = {"configurable": {"thread_id": "a"}}


def open_store(folder: Path) -> TieredStore:
    """Contexts in memory over `folder`."""
    tenant = Namespace("resume", b"r" * 32)
    return TieredStore(MemoryStore(namespace=tenant), DiskStore(folder / "contexts", namespace=tenant))


def build_graph(engine: LatentEngine, *, killed: bool = False) -> Any:
    """Researcher, then solver; where it is to be killed, this process is when the solver's turn comes."""
    thinker = AvpChatModel(engine=engine, mode="latent", latent_steps=STEPS)
    solver = AvpChatModel(engine=engine, max_tokens=TOKENS)

    def research(state: MessagesState) -> Any:
        return {"messages": thinker.invoke(state["messages"])}

    def solve(state: MessagesState) -> Any:
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"messages": solver.invoke(state["messages"])}

    graph = StateGraph(MessagesState)
    graph.add_node("researcher", research)
    graph.add_node("solver", solve)
    graph.add_edge(START, "researcher")
    graph.add_edge("researcher", "solver")
    return graph


if __name__ == "__main__":
    model, folder = sys.argv[1], Path(sys.argv[2])
    store = open_store(folder)
    engine = LatentEngine.from_pretrained(model, store=store, dtype="float32", device="cpu", kv_pool_bytes=2**27)
    with SqliteSaver.from_conn_string(str(folder / "checkpoints.sqlite")) as checkpointer:
        graph = build_graph(engine, killed=True).compile(checkpointer=checkpointer)
        graph.invoke({"messages": [QUESTION]}, THREAD, durability="sync")
