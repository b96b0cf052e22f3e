"""A person is asked between thinking and answering, and the process may end meanwhile.

    python recipes/human_in_the_loop.py "Plan a weekend in Rome."     # thinks, asks, and ends
    python recipes/human_in_the_loop.py --answer "Leave out museums"  # another process: goes on from the thought

The checkpoint in SQLite holds a handle of some 300 bytes. The thought itself lies in the context store on disk and is
found again, so the second process does not think again; its metadata says how it got the context.
"""

import sys
from pathlib import Path
from typing import Any

from langchain_core.messages import HumanMessage
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command, interrupt

from avp_langgraph import AvpChatModel, ContextState, GenerateNode, ThinkNode

DATABASE = Path("human_in_the_loop.sqlite")


class State(MessagesState, ContextState):
    pass


def ask(state: State) -> dict[str, Any]:
    return {"messages": [HumanMessage(interrupt("Anything I should keep in mind?"))]}


def build_graph(model: AvpChatModel) -> StateGraph[State]:
    graph = StateGraph(State)
    graph.add_node("thinker", ThinkNode(model, steps=10))
    graph.add_node("ask", ask)
    graph.add_node("writer", GenerateNode(model, context="thinker"))
    graph.add_edge(START, "thinker")
    graph.add_edge("thinker", "ask")
    graph.add_edge("ask", "writer")
    return graph


graph = build_graph(AvpChatModel(max_tokens=96)).compile()


def main() -> None:
    said, rest = (Command(resume=" ".join(sys.argv[2:])), ()) if "--answer" in sys.argv[1:2] else (None, sys.argv[1:])
    with SqliteSaver.from_conn_string(str(DATABASE)) as saver:
        saved = build_graph(AvpChatModel(max_tokens=96)).compile(checkpointer=saver)
        task: Any = {"messages": [HumanMessage(" ".join(rest) or "Plan a weekend in Rome.")]}
        result: dict[str, Any] = saved.invoke(said or task, {"configurable": {"thread_id": "rome"}})
    if waiting := result.get("__interrupt__"):
        print(f"{waiting[0].value}  (go on with --answer ...)")
        return
    made = result["messages"][-1].response_metadata["avp"]
    print(f"got the thought by {made['mode']} ({made['reason']}), {made['positions_reused']} positions reused:")
    print(result["messages"][-1].text)


if __name__ == "__main__":
    main()
