"""Three researchers think in parallel, a join makes one context of theirs, and a writer answers on it.

    python recipes/joined_researchers.py replay "What does a good city park need?"

``replay`` reads the three thoughts as one text, each in the light of those before it; ``splice`` moves their KV-caches
behind one another and computes almost nothing. What they share, here the question, is kept once.
"""

import sys

from langchain_core.messages import HumanMessage, SystemMessage
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph

from avp_agents.engine.protocol import JoinStrategy
from avp_langgraph import AvpChatModel, ContextState, GenerateNode, JoinNode, ThinkNode

SYSTEM = SystemMessage("You are one of three experts who prepare an answer together.")
FIELDS = ("nature", "money", "people")


class State(MessagesState, ContextState):
    pass


def build_graph(model: AvpChatModel, strategy: JoinStrategy) -> CompiledStateGraph:
    graph = StateGraph(State)
    for field in FIELDS:
        task = HumanMessage(f"Think about this question from the side of {field}.")
        think = ThinkNode(model, steps=10, prompt=lambda state, task=task: [SYSTEM, *state["messages"], task])
        graph.add_node(field, think)
        graph.add_edge(START, field)
    graph.add_node("join", JoinNode(model, contexts=FIELDS, strategy=strategy))
    graph.add_node("writer", GenerateNode(model, context="join", prompt="Answer in three sentences."))
    graph.add_edge([*FIELDS], "join")
    graph.add_edge("join", "writer")
    return graph.compile()


graph = build_graph(AvpChatModel(max_tokens=96), "replay")


def main() -> None:
    strategy: JoinStrategy = "splice" if "splice" in sys.argv[1:2] else "replay"
    question = " ".join(sys.argv[2:]) or "What does a good city park need?"
    result = build_graph(AvpChatModel(max_tokens=96), strategy).invoke({"messages": [HumanMessage(question)]})
    for handle in result["contexts"].values():
        print(handle["text"])
    print("\n" + result["messages"][-1].text)


if __name__ == "__main__":
    main()
