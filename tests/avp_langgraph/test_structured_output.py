"""`with_structured_output`: every method, every kind of schema, and what the model is told."""

from __future__ import annotations

import json
from typing import Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import HumanMessage
from pydantic import BaseModel, Field
from scripted_engine import ScriptedEngine

from avp_agents import LatentEngine
from avp_agents.answer import json_grammar
from avp_agents.answer.tool_format import GENERIC
from avp_agents.errors import ConfigurationError
from avp_langgraph import AvpChatModel

QUESTION = HumanMessage("Who wrote Faust?")


class Person(BaseModel):
    """A person."""

    name: str = Field(description="The full name.")
    born: int


class PersonDict(TypedDict):
    """A person."""

    name: str
    born: int


JSON_SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "born": {"type": "integer"}}}
GOETHE = {"name": "Goethe", "born": 1749}
WRITTEN = json.dumps(GOETHE)


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def model(engine: ScriptedEngine) -> AvpChatModel:
    return AvpChatModel(engine=engine)


class TestMethods:
    @pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
    @pytest.mark.parametrize("schema", [Person, PersonDict, {"title": "Person", **JSON_SCHEMA}])
    def test_each_kind_of_schema(self, engine: ScriptedEngine, model: AvpChatModel, method: Any, schema: Any) -> None:
        name = schema["title"] if isinstance(schema, dict) else schema.__name__
        answer = GENERIC.calls_text([(name, GOETHE)]) if method == "function_calling" else WRITTEN
        engine.says(answer, answer)
        structured = model.with_structured_output(schema, method=method)

        expected = Person(**GOETHE) if schema is Person else GOETHE

        assert structured.invoke([QUESTION]) == expected
        assert list(structured.stream([QUESTION]))[-1] == expected

    def test_a_json_schema_needs_no_title(self, engine: ScriptedEngine, model: AvpChatModel) -> None:
        engine.says(WRITTEN)
        assert model.with_structured_output(JSON_SCHEMA).invoke([QUESTION]) == GOETHE
        assert engine.last_options()["grammar"] == json_grammar(JSON_SCHEMA)

    def test_json_schema_tells_the_model_the_schema(self, engine: ScriptedEngine, model: AvpChatModel) -> None:
        engine.says(WRITTEN, WRITTEN)
        model.with_structured_output(Person).invoke([QUESTION])
        assert "Answer with JSON that fits this JSON schema" in engine.requests[-1].text
        assert "The full name." in engine.requests[-1].text

        model.with_structured_output(Person, method="json_mode").invoke([QUESTION])
        assert "JSON" not in engine.requests[-1].text

    def test_json_mode_without_a_schema_is_any_object(self, engine: ScriptedEngine, model: AvpChatModel) -> None:
        engine.says(WRITTEN)
        assert model.with_structured_output(method="json_mode").invoke([QUESTION]) == GOETHE
        assert engine.last_options()["grammar"] == json_grammar({"type": "object"})

    def test_strict_is_passed_on(self, engine: ScriptedEngine, model: AvpChatModel) -> None:
        engine.says(WRITTEN)
        model.with_structured_output(JSON_SCHEMA, strict=True).invoke([QUESTION])
        assert engine.last_options()["grammar"] == json_grammar(JSON_SCHEMA, strict=True)

    def test_include_raw(self, engine: ScriptedEngine, model: AvpChatModel) -> None:
        engine.says(WRITTEN, '{"name": "Goethe"')
        structured = model.with_structured_output(Person, include_raw=True)

        good: Any = structured.invoke([QUESTION])
        assert good["raw"].content == WRITTEN
        assert (good["parsed"], good["parsing_error"]) == (Person(**GOETHE), None)

        bad: Any = structured.invoke([QUESTION])
        assert bad["parsed"] is None
        assert isinstance(bad["parsing_error"], OutputParserException)

    @pytest.mark.parametrize(
        ("schema", "method", "complaint"),
        [
            (Person, "xml", "method must be one of"),
            (None, "json_schema", "needs a schema"),
            (None, "function_calling", "needs a schema"),
            (7, "json_schema", "No schema can be made of 7"),
        ],
    )
    def test_mistakes_are_told_at_once(self, model: AvpChatModel, schema: Any, method: Any, complaint: str) -> None:
        with pytest.raises(ConfigurationError, match=complaint):
            model.with_structured_output(schema, method=method)

    def test_a_response_format_of_no_known_kind(self, model: AvpChatModel) -> None:
        with pytest.raises(ConfigurationError, match="response_format cannot be"):
            model.invoke([QUESTION], response_format={"type": "yaml"})


class TestCreateAgent:
    """`create_agent(response_format=)`, with a tool beside it."""

    @staticmethod
    def look_up(title: str) -> str:
        """Looks a book up."""
        return f"{title} is by Goethe."

    @pytest.mark.parametrize("strategy", [ProviderStrategy, ToolStrategy])
    def test_ends_with_a_value_of_the_schema(self, engine: ScriptedEngine, model: AvpChatModel, strategy: Any) -> None:
        answer = WRITTEN if strategy is ProviderStrategy else GENERIC.calls_text([("Person", GOETHE)])
        engine.says(GENERIC.calls_text([("look_up", {"title": "Faust"})]), answer)
        agent: Any = create_agent(model, [self.look_up], response_format=strategy(Person))

        assert agent.invoke({"messages": [QUESTION]})["structured_response"] == Person(**GOETHE)


def test_a_real_model_that_repeats_itself_still_ends_in_valid_json(real_engine: LatentEngine) -> None:
    model = AvpChatModel(engine=real_engine, max_tokens=30)
    result: Any = model.with_structured_output(Person, include_raw=True).invoke([QUESTION])

    assert isinstance(result["parsed"], Person)
    assert result["raw"].usage_metadata["output_tokens"] <= 30
