"""An agent with tools whose every turn reuses the KV-cache of the turn before it.

    python recipes/tool_agent.py "What is the weather in Rome?"

It is LangChain's own `create_agent`. The tool call is decoded under a grammar, so it is valid JSON with the tool's
arguments whatever the model. The second call of the model prefills the tool's result and little else.
"""

import sys
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

from avp_langgraph import AvpChatModel, AvpMiddleware


def get_weather(city: str) -> str:
    """Tell the weather in a city."""
    return f"It is sunny in {city}, 24 degrees."


@wrap_model_call
def look_once(request: Any, handler: Any) -> Any:
    """Small models choose badly between a call and an answer: the first turn has to be a call, the next an answer."""
    looked = any(isinstance(message, ToolMessage) for message in request.messages)
    return handler(request.override(tool_choice="none" if looked else "any"))


def build_agent(model: AvpChatModel) -> Any:
    return create_agent(model, [get_weather], middleware=[look_once, AvpMiddleware()])


graph = build_agent(AvpChatModel(max_tokens=64))


def main() -> None:
    question = " ".join(sys.argv[1:]) or "What is the weather in Rome?"
    for message in graph.invoke({"messages": [HumanMessage(question)]})["messages"]:
        calls = [f"{call['name']}({call['args']})" for call in getattr(message, "tool_calls", [])]
        print(f"{message.type}: {message.text or ', '.join(calls)}")
        if isinstance(message, AIMessage) and message.usage_metadata:
            usage: Any = message.usage_metadata
            print(f"    {usage['input_tokens']} tokens in, {usage['input_token_details']['cache_read']} of them reused")


if __name__ == "__main__":
    main()
