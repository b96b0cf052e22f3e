"""A researcher hands its thought to a solver: an ordinary LangGraph graph in which only the chat models are swapped.

    python recipes/researcher_solver.py "What is 24 * 17 + 3?"

The researcher runs 20 latent steps and decodes nothing; the solver answers on top of what it thought. Try
``mode="text"`` for the researcher, or any other LangChain chat model for both: the graph stays the same.
"""

import sys
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage, SystemMessage
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph

from avp_langgraph import AvpChatModel

RESEARCH = SystemMessage("Work out which quantities the question is about and how they depend on each other.")
SOLVE = SystemMessage("Answer the question step by step.")


def build_graph(researcher: BaseChatModel, solver: BaseChatModel) -> CompiledStateGraph:
    def research(state: MessagesState) -> dict[str, Any]:
        return {"messages": [researcher.invoke([RESEARCH, *state["messages"]])]}

    def solve(state: MessagesState) -> dict[str, Any]:
        return {"messages": [solver.invoke([SOLVE, *state["messages"]])]}

    graph = StateGraph(MessagesState)
    graph.add_node("researcher", research)
    graph.add_node("solver", solve)
    graph.add_edge(START, "researcher")
    graph.add_edge("researcher", "solver")
    return graph.compile()


graph = build_graph(AvpChatModel(mode="latent", latent_steps=20), AvpChatModel(max_tokens=128))


def main() -> None:
    question = " ".join(sys.argv[1:]) or "A shop sells pens at 3 dollars each. How much do 14 pens cost?"
    *_, thought, answer = graph.invoke({"messages": [HumanMessage(question)]})["messages"]
    handoff = answer.response_metadata["avp"]

    print(f"{thought.text}, handed over by {handoff['mode']} ({handoff['reason']})")
    print(f"solver reused {handoff['positions_reused']} positions and decoded {handoff['tokens_decoded']} tokens:")
    print(answer.text)


if __name__ == "__main__":
    main()
