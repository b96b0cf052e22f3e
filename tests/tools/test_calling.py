"""Which answers each choice of tools allows, followed token by token on the default model's tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from avp_agents.answer import MAX_CALLS, ToolCalling, ToolSpec, json_grammar, json_instruction
from avp_agents.answer.grammar import Grammar, GrammarCompiler
from avp_agents.answer.tool_format import GENERIC
from avp_agents.errors import ConfigurationError, GrammarError

WEATHER = ToolSpec(
    "get_weather",
    "Tells the weather.",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
TIME = ToolSpec("get_time", "Tells the time.", {"type": "object", "properties": {}})
TOOLS = [WEATHER, TIME]

WEATHER_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TIME_CALL = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
BOTH = f"{WEATHER_CALL}\n{TIME_CALL}"
TEXT = "It rains. {a} <tool"


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_path)


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer.backend_tokenizer, end_ids=[2], control_ids=tokenizer.all_special_ids)


@pytest.fixture
def allows(compiler: GrammarCompiler, tokenizer: Any) -> Any:
    def allows(grammar: Grammar, answer: str) -> bool:
        """Whether the answer is a whole one under the grammar."""
        constraint = compiler.constraint(grammar, 10_000)
        for id_ in (*tokenizer.encode(answer), 2):
            if not constraint.allows(id_):
                return False
            constraint.accept(id_)
        return True

    return allows


@pytest.mark.parametrize(
    ("choice", "allowed", "refused"),
    [
        (
            None,
            [TEXT, WEATHER_CALL, BOTH, f"Let me see.\n{WEATHER_CALL}"],
            [WEATHER_CALL[:-12], f"{WEATHER_CALL} Well."],
        ),
        ("any", [WEATHER_CALL, TIME_CALL], [TEXT, BOTH, f"Let me see.\n{WEATHER_CALL}"]),
        ("get_time", [TIME_CALL], [TEXT, WEATHER_CALL, BOTH]),
        ("none", [TEXT, WEATHER_CALL[:10]], [WEATHER_CALL, f"Let me see.\n{WEATHER_CALL}"]),
    ],
)
def test_each_choice_allows_its_answers(allows: Any, choice: Any, allowed: list[str], refused: list[str]) -> None:
    grammar = ToolCalling.chosen(TOOLS, choice).grammar(GENERIC)
    assert [answer for answer in allowed if not allows(grammar, answer)] == []
    assert [answer for answer in refused if allows(grammar, answer)] == []


def test_only_known_tools_with_valid_arguments_can_be_called(allows: Any) -> None:
    grammar = ToolCalling(TOOLS).grammar(GENERIC)
    for wrong in ('"get_news", "arguments": {}', '"get_weather", "arguments": {}', '"get_time", "arguments": {"a": 1}'):
        assert not allows(grammar, f'<tool_call>\n{{"name": {wrong}}}\n</tool_call>')


def test_parallel_calls(allows: Any) -> None:
    many = "\n".join([TIME_CALL] * MAX_CALLS)
    forced = ToolCalling(TOOLS, choice="any", parallel=True).grammar(GENERIC)
    assert allows(forced, many)
    assert not allows(forced, f"{many}\n{TIME_CALL}")
    assert not allows(ToolCalling(TOOLS, parallel=False).grammar(GENERIC), BOTH)
    assert not allows(ToolCalling(TOOLS).grammar(replace(GENERIC, between=None)), BOTH)


def test_a_format_without_text_beside_calls(allows: Any) -> None:
    grammar = ToolCalling(TOOLS).grammar(replace(GENERIC, joint=None))
    assert allows(grammar, TEXT)
    assert allows(grammar, WEATHER_CALL)
    assert not allows(grammar, f"Let me see.\n{WEATHER_CALL}")


def test_answers_of_a_schema_or_calls(allows: Any) -> None:
    schema = {"type": "object", "properties": {"rain": {"type": "boolean"}}, "required": ["rain"]}
    grammar = ToolCalling(TOOLS, answer=schema).grammar(GENERIC)
    assert allows(grammar, '{"rain": true}')
    assert allows(grammar, WEATHER_CALL)
    assert not allows(grammar, "It rains.")


def test_json_of_a_schema(allows: Any) -> None:
    grammar = json_grammar(WEATHER.parameters)
    assert allows(grammar, '{"city": "Oslo"}')
    assert not allows(grammar, '{"city": "Oslo", "country": "Norway"}')
    assert '"city"' in json_instruction(WEATHER.parameters)


def test_options_show_the_tools() -> None:
    options: Any = ToolCalling(TOOLS).options(GENERIC)
    assert options["tools"] == [WEATHER.definition(), TIME.definition()]
    assert options["grammar"] == ToolCalling(TOOLS).grammar(GENERIC)


def test_strict_tools_refuse_what_cannot_be_enforced(compiler: GrammarCompiler) -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}
    compiler.constraint(ToolCalling([ToolSpec("f", "", parameters)]).grammar(GENERIC), 9)
    with pytest.raises(GrammarError, match="uniqueItems"):
        compiler.constraint(ToolCalling([ToolSpec("f", "", parameters, strict=True)]).grammar(GENERIC), 9)


@pytest.mark.parametrize(
    ("spelled", "choice", "only"),
    [
        (None, "auto", None),
        (False, "auto", None),
        ("auto", "auto", None),
        (True, "any", None),
        ("any", "any", None),
        ("required", "any", None),
        ("none", "none", None),
        ("get_time", "any", "get_time"),
        ({"type": "function", "function": {"name": "get_time"}}, "any", "get_time"),
        ({"type": "tool", "name": "get_time"}, "any", "get_time"),
    ],
)
def test_choices_as_frameworks_spell_them(spelled: object, choice: str, only: str | None) -> None:
    calling = ToolCalling.chosen(TOOLS, spelled)
    assert (calling.choice, calling.only) == (choice, only)


@pytest.mark.parametrize("spelled", ["get_news", 7, {"type": "function"}, {"name": "get_news"}])
def test_a_choice_that_is_none(spelled: object) -> None:
    with pytest.raises(ConfigurationError, match=r"tool_choice cannot be|no tool 'get_news'"):
        ToolCalling.chosen(TOOLS, spelled)


def test_tools_that_cannot_be_told_apart() -> None:
    assert ToolCalling([WEATHER, TIME, WEATHER]).tools == (WEATHER, TIME)
    with pytest.raises(ConfigurationError, match="Two tools are called 'get_time'"):
        ToolCalling([TIME, replace(TIME, description="Tells the hour.")])
    with pytest.raises(ConfigurationError, match="no tools"):
        ToolCalling([])
