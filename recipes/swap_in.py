"""An existing graph in which only the chat model is swapped: the second agent reuses what the first one computed.

    python recipes/swap_in.py "Write a slogan for a bakery."

`build_graph` is what many LangGraph applications look like: agents that append messages to one list. With any other
chat model the critic pays for the whole conversation again. With `AvpChatModel` every answer carries its context, so
the critic prefills its own instruction only; `cache_read` in the usage metadata counts what was reused.
"""

import sys
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph

from avp_langgraph import AvpChatModel

CRITIQUE = HumanMessage("Say in one sentence how to improve that.")


def build_graph(model: BaseChatModel) -> CompiledStateGraph:
    def write(state: MessagesState) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])]}

    def critique(state: MessagesState) -> dict[str, Any]:
        return {"messages": [CRITIQUE, model.invoke([*state["messages"], CRITIQUE])]}

    graph = StateGraph(MessagesState)
    graph.add_node("writer", write)
    graph.add_node("critic", critique)
    graph.add_edge(START, "writer")
    graph.add_edge("writer", "critic")
    return graph.compile()


graph = build_graph(AvpChatModel(max_tokens=48))


def main() -> None:
    task = " ".join(sys.argv[1:]) or "Write a slogan for a bakery."
    for message in graph.invoke({"messages": [HumanMessage(task)]})["messages"]:
        print(f"{message.type}: {message.text}")
        if usage := getattr(message, "usage_metadata", None):
            print(f"    {usage['input_tokens']} tokens in, {usage['input_token_details']['cache_read']} of them reused")


if __name__ == "__main__":
    main()
