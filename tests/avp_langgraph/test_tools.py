"""Tools as LangChain binds them: what reaches the engine, and how calls come out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field
from scripted_engine import ScriptedEngine

from avp_agents import LatentEngine
from avp_agents.answer import ToolCalling, ToolSpec
from avp_agents.answer.tool_format import GENERIC
from avp_agents.errors import ConfigurationError
from avp_langgraph import AvpChatModel

QUESTION = HumanMessage("How is the weather in Oslo and Rome?")


@tool
def get_weather(city: str) -> str:
    """Tells the weather in a city."""
    return f"It is sunny in {city}."


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


class Search(BaseModel):
    """Searches the web."""

    query: str = Field(description="What to search for.")


ANTHROPIC = {"name": "pick", "description": "Picks.", "input_schema": {"type": "object", "properties": {}}}
OSLO, ROME = ("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Rome"})


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def model(engine: ScriptedEngine) -> AvpChatModel:
    return AvpChatModel(engine=engine)


def called(message: AIMessage) -> list[tuple[str, dict[str, Any]]]:
    return [(call["name"], call["args"]) for call in message.tool_calls]


class TestBinding:
    def test_takes_every_kind_of_tool(self, engine: ScriptedEngine, model: AvpChatModel) -> None:
        engine.says("Well.")
        model.bind_tools([get_weather, add, Search, ANTHROPIC]).invoke([QUESTION])

        shown = {tool["function"]["name"]: tool["function"] for tool in engine.last_options()["tools"]}
        assert list(shown) == ["get_weather", "add", "Search", "pick"]
        assert shown["add"]["description"] == "Adds two numbers."
        assert shown["Search"]["parameters"]["required"] == ["query"]

    @pytest.mark.parametrize(
        ("tool_choice", "choice", "only"),
        [
            (None, "auto", None),
            ("auto", "auto", None),
            ("any", "any", None),
            ("required", "any", None),
            (True, "any", None),
            ("none", "none", None),
            ("add", "any", "add"),
            ({"type": "function", "function": {"name": "add"}}, "any", "add"),
        ],
    )
    def test_a_choice_becomes_a_grammar(
        self, engine: ScriptedEngine, model: AvpChatModel, tool_choice: Any, choice: Any, only: str | None
    ) -> None:
        engine.says("Well.")
        bound = model.bind_tools([get_weather, add], tool_choice=tool_choice)
        bound.invoke([QUESTION])

        options = engine.last_options()
        specs = [ToolSpec.from_definition(definition) for definition in options["tools"]]
        assert options["grammar"] == ToolCalling(specs, choice=choice, only=only).grammar(GENERIC)

    def test_parallel_calls_can_be_asked_for_and_forbidden(self, engine: ScriptedEngine, model: AvpChatModel) -> None:
        def grammar_of(**choices: Any) -> Any:
            engine.says("Well.")
            model.bind_tools([add], **choices).invoke([QUESTION])
            return engine.last_options()["grammar"]

        assert grammar_of(parallel_tool_calls=True) == grammar_of()
        assert grammar_of(parallel_tool_calls=False) != grammar_of()
        assert grammar_of(tool_choice="any", parallel_tool_calls=True) != grammar_of(tool_choice="any")

    def test_strict_is_part_of_the_tools(self, engine: ScriptedEngine, model: AvpChatModel) -> None:
        engine.says("Well.")
        model.bind_tools([add], strict=True).invoke([QUESTION])
        assert '\\"lenient\\": false' in json.dumps(engine.last_options()["grammar"].source)

    @pytest.mark.parametrize(
        ("tools", "choices", "complaint"),
        [
            ([add], {"tool_choice": "subtract"}, "tool_choice cannot be 'subtract'"),
            ([], {"tool_choice": "any"}, "no tools"),
            ([{"type": "web_search"}], {}, "Not a tool"),
        ],
    )
    def test_mistakes_are_told_at_once(
        self, model: AvpChatModel, tools: Any, choices: dict[str, Any], complaint: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=complaint):
            model.bind_tools(tools, **choices)

    def test_a_thought_is_made_with_the_tools_in_view(self, engine: ScriptedEngine) -> None:
        AvpChatModel(engine=engine, mode="latent", latent_steps=3).bind_tools([add]).invoke([QUESTION])
        request = engine.requests[-1]
        assert request.kind == "think"
        assert [tool["function"]["name"] for tool in request.options["tools"]] == ["add"]

    def test_tools_count(self, model: AvpChatModel) -> None:
        without = model.get_num_tokens_from_messages([QUESTION])
        assert model.get_num_tokens_from_messages([QUESTION], tools=[get_weather]) > without + 100


class TestCalls:
    def test_are_told_from_text(self, engine: ScriptedEngine, model: AvpChatModel) -> None:
        engine.says(f"Let me see.\n{GENERIC.calls_text([OSLO, ROME])}")
        answer = model.bind_tools([get_weather]).invoke([QUESTION])

        assert answer.content == "Let me see."
        assert called(answer) == [OSLO, ROME]
        assert len({call["id"] for call in answer.tool_calls}) == 2
        assert answer.response_metadata["finish_reason"] == "tool_calls"

    async def test_are_streamed_in_pieces(self, engine: ScriptedEngine, model: AvpChatModel) -> None:
        engine.says(*[GENERIC.calls_text([OSLO, ROME])] * 2)
        bound = model.bind_tools([get_weather])

        chunks = [chunk for chunk in bound.stream([QUESTION]) if isinstance(chunk, AIMessageChunk)]
        later = [chunk async for chunk in bound.astream([QUESTION]) if isinstance(chunk, AIMessageChunk)]

        for pieces in (chunks, later):
            parts = [part for piece in pieces for part in piece.tool_call_chunks]
            assert [(part["name"], part["index"]) for part in parts if part["name"]] == [
                ("get_weather", 0),
                ("get_weather", 1),
            ]
            assert "".join(part["args"] or "" for part in parts if part["index"] == 1) == '{"city": "Rome"}'
            assert len(parts) > 4
            whole = pieces[0]
            for piece in pieces[1:]:
                whole += piece
            assert called(whole) == [OSLO, ROME]

    def test_that_were_cut_off_are_invalid(self, engine: ScriptedEngine, model: AvpChatModel) -> None:
        engine.says(GENERIC.calls_text([OSLO, ROME]).removesuffix('Rome"}}\n</tool_call>'))
        answer = model.bind_tools([get_weather]).invoke([QUESTION])
        assert called(answer)[0] == OSLO
        assert len(answer.tool_calls) + len(answer.invalid_tool_calls) == 2

    def test_without_tools_nothing_is_read_as_a_call(self, engine: ScriptedEngine, model: AvpChatModel) -> None:
        engine.says(GENERIC.calls_text([OSLO]))
        answer = model.invoke([QUESTION])
        assert answer.content == GENERIC.calls_text([OSLO])
        assert "grammar" not in engine.last_options()


class TestConversations:
    @staticmethod
    def loop(engine: ScriptedEngine, model: AvpChatModel) -> tuple[AIMessage, ToolMessage]:
        engine.says(GENERIC.calls_text([OSLO]), "Sunny.")
        call = model.bind_tools([get_weather]).invoke([QUESTION])
        return call, get_weather.invoke(call.tool_calls[0])

    def test_the_next_turn_goes_on_behind_the_call(self, engine: ScriptedEngine, model: AvpChatModel) -> None:
        call, result = self.loop(engine, model)
        answer = model.bind_tools([get_weather]).invoke([QUESTION, call, result])

        assert engine.requests[-1].base is not None
        assert "sunny in Oslo" in engine.requests[-1].text
        assert "weather in Oslo and" not in engine.requests[-1].text
        assert answer.response_metadata["avp"]["reason"] == "continuation"

    def test_an_edited_call_no_longer_stands_for_its_context(self, engine: ScriptedEngine, model: AvpChatModel) -> None:
        """As a human in the loop does, who corrects the arguments before the tool runs."""
        call, result = self.loop(engine, model)
        edited = call.model_copy(update={"tool_calls": [{**call.tool_calls[0], "args": {"city": "Rome"}}]})
        model.bind_tools([get_weather]).invoke([QUESTION, edited, result])
        assert engine.requests[-1].base is None

    def test_create_agent(self, engine: ScriptedEngine, model: AvpChatModel) -> None:
        engine.says(GENERIC.calls_text([OSLO, ROME]), "Sunny in both.")
        agent: Any = create_agent(model, [get_weather])

        messages: list[BaseMessage] = agent.invoke({"messages": [QUESTION]})["messages"]

        assert [message.type for message in messages] == ["human", "ai", "tool", "tool", "ai"]
        assert [message.content for message in messages[2:]] == [
            "It is sunny in Oslo.",
            "It is sunny in Rome.",
            "Sunny in both.",
        ]


def test_a_real_model_calls_a_tool_and_goes_on_behind_the_call(real_engine: LatentEngine) -> None:
    model = AvpChatModel(engine=real_engine, max_tokens=40)
    question = HumanMessage("How is the weather in Oslo?")

    call = model.bind_tools([get_weather], tool_choice="get_weather").invoke([question])
    assert called(call) == [OSLO]
    result = get_weather.invoke(call.tool_calls[0])
    answer = model.bind_tools([get_weather], tool_choice="none").invoke([question, call, result], max_tokens=4)

    before, after = call.usage_metadata, answer.usage_metadata
    assert before is not None
    assert after is not None
    # all positions of question, tools and call are there, but for the last token that was decoded
    reused = before["input_tokens"] + before["output_tokens"] - 1
    assert after.get("input_token_details", {}).get("cache_read") == reused
    assert after["input_tokens"] - reused < 40
