"""Four agents in a row: three think on the context before them, the last one answers. Nobody reads anybody's text.

    python recipes/four_agent_chain.py "Should a small town build a tram line?"

Each agent prefills its own instruction and runs its latent steps; everything before that is already in the KV-cache.
So the chain's cost grows linearly with its length (`avp-agents bench chain` draws the curve).
"""

import sys

from langchain_core.messages import HumanMessage
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph

from avp_langgraph import AvpChatModel, ContextState, GenerateNode, ThinkNode


class State(MessagesState, ContextState):
    pass


def build_graph(model: AvpChatModel) -> CompiledStateGraph:
    graph = StateGraph(State)
    graph.add_node("planner", ThinkNode(model, prompt="Break the question into parts.", steps=10))
    graph.add_node("expert", ThinkNode(model, prompt="Find the facts for each part.", steps=10, context="planner"))
    graph.add_node("critic", ThinkNode(model, prompt="Find the weakest point so far.", steps=10, context="expert"))
    graph.add_node("writer", GenerateNode(model, prompt="Give a short, balanced answer.", context="critic"))
    graph.add_edge(START, "planner")
    graph.add_edge("planner", "expert")
    graph.add_edge("expert", "critic")
    graph.add_edge("critic", "writer")
    return graph.compile()


graph = build_graph(AvpChatModel(max_tokens=96))


def main() -> None:
    question = " ".join(sys.argv[1:]) or "Should a small town build a tram line?"
    result = graph.invoke({"messages": [HumanMessage(question)]})
    for agent, handle in result["contexts"].items():
        print(f"{agent:8} {handle['tokens']:4} positions: {handle['text']}")
    made = result["messages"][-1].response_metadata["avp"]
    print(f"\n{made['tokens_not_decoded']} latent steps were handed on and never decoded. The answer:")
    print(result["messages"][-1].text)


if __name__ == "__main__":
    main()
