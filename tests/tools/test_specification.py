"""What is accepted as a tool, and which limits its schema gets."""

from __future__ import annotations

from typing import Any

import pytest

from avp_agents.answer import MAX_ARRAY_ITEMS, MAX_STRING_LENGTH, ToolSpec, bounded_schema
from avp_agents.answer.json_bounds import MAX_INTEGER
from avp_agents.errors import ConfigurationError

NOTHING: dict[str, Any] = {"type": "object", "properties": {}}


class TestToolSpec:
    def test_is_read_from_a_definition_and_written_as_one(self) -> None:
        function = {"name": "f", "description": "Does it.", "parameters": NOTHING}
        definition = {"type": "function", "function": function}

        assert ToolSpec.from_definition(definition) == ToolSpec("f", "Does it.", NOTHING)
        assert ToolSpec.from_definition(function).definition() == definition

    def test_needs_no_description_and_no_parameters(self) -> None:
        assert ToolSpec.from_definition({"name": "f"}) == ToolSpec("f", "", NOTHING)

    def test_titles_are_left_out_but_properties_of_that_name_stay(self) -> None:
        value = {"title": "kept"}
        title = {"title": "Title", "type": "object", "default": value}
        parameters = {"type": "object", "title": "F", "properties": {"title": title}}

        tool = ToolSpec.from_definition({"name": "f", "parameters": parameters})

        assert tool.parameters == {"type": "object", "properties": {"title": {"type": "object", "default": value}}}

    @pytest.mark.parametrize("name", ["", 'a"b', "a b", "a" * 129, None])
    def test_a_name_that_no_format_can_write(self, name: Any) -> None:
        with pytest.raises(ConfigurationError, match="cannot be called"):
            ToolSpec(name, "", NOTHING)

    @pytest.mark.parametrize("parameters", [[], {"type": "string"}])
    def test_parameters_that_are_no_object(self, parameters: Any) -> None:
        with pytest.raises(ConfigurationError, match="schema of an object"):
            ToolSpec("f", "", parameters)

    @pytest.mark.parametrize("definition", [{"type": "web_search"}, {"function": {}}, "f"])
    def test_something_else_than_a_function(self, definition: Any) -> None:
        with pytest.raises(ConfigurationError, match="Not a tool"):
            ToolSpec.from_definition(definition)


class TestBoundedSchema:
    @pytest.mark.parametrize(
        ("schema", "limits"),
        [
            ({"type": "string"}, {"maxLength": MAX_STRING_LENGTH}),
            ({"type": ["string", "null"]}, {"maxLength": MAX_STRING_LENGTH}),
            ({"type": "string", "maxLength": 5}, {}),
            ({"type": "string", "enum": ["a"]}, {}),
            ({"type": "string", "format": "date"}, {}),
            ({"type": "string", "minLength": 10_000}, {"maxLength": 10_000}),
            ({"type": "array"}, {"maxItems": MAX_ARRAY_ITEMS}),
            ({"type": "array", "minItems": 300}, {"maxItems": 300}),
            ({"type": "integer"}, {"minimum": -MAX_INTEGER, "maximum": MAX_INTEGER}),
            ({"type": "integer", "minimum": 0}, {"maximum": MAX_INTEGER}),
            ({"type": "integer", "exclusiveMaximum": 0}, {"minimum": -MAX_INTEGER}),
            ({"type": "integer", "minimum": 2**70}, {"maximum": 2**70 + 1}),
            ({"type": "integer", "enum": [1]}, {}),
            ({"type": "object", "properties": {}}, {"additionalProperties": False}),
            ({"type": "object", "properties": {}, "additionalProperties": True}, {}),
            ({"type": "object"}, {}),
            ({}, {}),
        ],
    )
    def test_limits_what_has_no_limit(self, schema: dict[str, Any], limits: dict[str, Any]) -> None:
        assert bounded_schema(schema) == schema | limits

    def test_limits_all_parts(self) -> None:
        text, limited = {"type": "string"}, {"type": "string", "maxLength": MAX_STRING_LENGTH}
        schema = {
            "properties": {"a": text, "b": {"anyOf": [text, {"type": "null"}]}, "c": {"items": text}},
            "$defs": {"d": text},
            "additionalProperties": text,
        }
        assert bounded_schema(schema) == {
            "properties": {"a": limited, "b": {"anyOf": [limited, {"type": "null"}]}, "c": {"items": limited}},
            "$defs": {"d": limited},
            "additionalProperties": limited,
        }

    def test_parts_that_hold_together_stay_open(self) -> None:
        parts = [{"type": "object", "properties": {"a": {}}}, {"type": "object", "properties": {"b": {}}}]
        assert bounded_schema({"allOf": parts}) == {"allOf": parts}

    def test_what_was_given_is_not_changed(self) -> None:
        schema = {"type": "object", "properties": {"a": {"type": "string"}}}
        bounded_schema(schema)
        assert schema == {"type": "object", "properties": {"a": {"type": "string"}}}
