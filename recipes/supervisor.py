"""A supervisor decides who works next; the workers think and hand over contexts, and a writer answers on the last one.

    python recipes/supervisor.py "How can a school save energy?"

The supervisor reads a list of names, not the workers' notes: there are none. Each worker thinks on the context of the
one before it, whoever that was. (The default model is too small to choose well; the choice itself is always valid.)
"""

import sys
from typing import Any

from langchain_core.messages import HumanMessage
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Command

from avp_langgraph import AvpChatModel, ContextState, GenerateNode, ThinkNode

WORKERS = {
    "engineer": "Think about what can be built or repaired.",
    "economist": "Think about what it costs and what it saves.",
    "teacher": "Think about what people would have to change.",
}


class State(MessagesState, ContextState):
    pass


def newest_context(state: State) -> str | None:
    return next(reversed(state.get("contexts") or {}), None)


def build_graph(model: AvpChatModel) -> CompiledStateGraph:
    def supervise(state: State) -> Command[str]:
        done = state.get("contexts") or {}
        choices = [name for name in WORKERS if name not in done] + (["writer"] if done else [])
        schema: dict[str, Any] = {
            "title": "Next",
            "description": "Who works next.",
            "type": "object",
            "properties": {"next": {"type": "string", "enum": choices}},
            "required": ["next"],
        }
        question = f"{state['messages'][0].text}\n\nDone: {', '.join(done) or 'nothing'}. Who works next?"
        choice: Any = model.with_structured_output(schema).invoke(question)
        return Command(goto=choice["next"])

    graph = StateGraph(State)
    graph.add_node("supervisor", supervise, destinations=(*WORKERS, "writer"))
    for name, task in WORKERS.items():
        graph.add_node(name, ThinkNode(model, prompt=task, context=newest_context, steps=10))
        graph.add_edge(name, "supervisor")
    graph.add_node("writer", GenerateNode(model, prompt="Answer briefly.", context=newest_context))
    graph.add_edge(START, "supervisor")
    return graph.compile()


graph = build_graph(AvpChatModel(max_tokens=64))


def main() -> None:
    question = " ".join(sys.argv[1:]) or "How can a school save energy?"
    result = graph.invoke({"messages": [HumanMessage(question)]})
    print(" -> ".join(result["contexts"]))
    print(result["messages"][-1].text)


if __name__ == "__main__":
    main()
