"""Tool calls are told from text while the answer is decoded, however it falls into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avp_agents.answer import CallDelta, TextDelta, ToolCallParser
from avp_agents.answer.tool_format import GENERIC

ONE = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
CUT_OFF = ONE.partition("}}")[0]
TWO = f'{ONE}\n<tool_call>\n{{"name": "g", "arguments": {{"y": ["}}", "\\"{{"]}}}}\n</tool_call>'
CALLED_TWICE = [("f", {"x": 1}), ("g", {"y": ["}", '"{']})]

Read = tuple[str, list[tuple[str, object]]]


def read(pieces: list[str], *unmarked: str) -> Read:
    """The text and the calls, both as they were streamed; they must be those that the parser reports."""
    parser = ToolCallParser(GENERIC, unmarked)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()
    text = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
    calls = [delta for delta in deltas if isinstance(delta, CallDelta)]
    arguments: dict[int, str] = {}
    for call in calls:
        arguments[call.index] = arguments.get(call.index, "") + call.arguments
    names = [(call.name, call.id) for call in calls if call.name is not None]

    whole = sorted((*parser.calls, *parser.invalid_calls), key=lambda call: [id_ for _, id_ in names].index(call.id))
    assert text == parser.text
    assert names == [(call.name, call.id) for call in whole]
    assert parser.invalid_calls == [] or list(arguments.values())[-1] == parser.invalid_calls[-1].arguments
    return text, [(call.name, call.arguments) for call in whole]


def read_whole(answer: str, *unmarked: str) -> Read:
    return read([answer], *unmarked)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", ("", [])),
        ("Good day.", ("Good day.", [])),
        ("a < b, <tool_box>", ("a < b, <tool_box>", [])),
        (ONE, ("", [("f", {"x": 1})])),
        (TWO, ("", CALLED_TWICE)),
        (f"Let me see.\n{TWO}", ("Let me see.", CALLED_TWICE)),
        (f"Let me see.\n\n{ONE}", ("Let me see.\n", [("f", {"x": 1})])),
        (f"{ONE} behind", ("", [("f", {"x": 1})])),
        (CUT_OFF, ("", [("f", '{"x": 1')])),
        ("<tool_call>", ("<tool_call>", [])),
    ],
)
def test_text_and_calls(answer: str, expected: Read) -> None:
    assert read_whole(answer) == expected


@given(
    cuts=st.lists(st.integers(1, 7)), answer=st.sampled_from([TWO, f"See, <tool: \n\n{TWO}", "a <tool_call", ONE[:50]])
)
def test_the_pieces_do_not_matter(cuts: list[int], answer: str) -> None:
    pieces, rest = [], answer
    for size in cuts:
        pieces.append(rest[:size])
        rest = rest[size:]
    assert read([*pieces, rest]) == read_whole(answer)


def test_text_and_arguments_come_as_soon_as_they_are_certain() -> None:
    parser = ToolCallParser(GENERIC)
    assert parser.feed("Let me ") == [TextDelta("Let me ")]
    assert parser.feed("see.\n<to") == [TextDelta("see.")]
    assert parser.feed('ol_call>\n{"name": "f') == []
    name, first = parser.feed('", "arguments": {"te')
    assert isinstance(name, CallDelta)
    assert (name.index, name.name) == (0, "f")
    assert first == CallDelta(0, arguments='{"te')
    assert parser.feed('xt": "a') == [CallDelta(0, arguments='xt": "a')]
    assert parser.feed('"}}\n</tool_call>') == [CallDelta(0, arguments='"}')]
    assert parser.finish() == []


def test_a_call_that_was_cut_off_says_so() -> None:
    parser = ToolCallParser(GENERIC)
    parser.feed(CUT_OFF)
    parser.finish()
    assert parser.calls == []
    assert "cut off" in parser.invalid_calls[0].error


def test_ids_differ() -> None:
    parser = ToolCallParser(GENERIC)
    parser.feed(TWO)
    first, second = parser.calls
    assert first.id.startswith("call_")
    assert first.id != second.id


class TestWithoutMarks:
    """Small models write a call as plain JSON, or in a fence."""

    @pytest.mark.parametrize(
        "answer",
        [
            '{"name": "f", "arguments": {"x": 1}}',
            '```json\n{\n  "name": "f",\n  "arguments": {"x": 1}\n}\n```',
            ' {"name":"f","parameters":{"x": 1}}',
        ],
    )
    @pytest.mark.parametrize("size", [1, 3, 1000])
    def test_is_a_call_of_a_tool_that_there_is(self, answer: str, size: int) -> None:
        pieces = [answer[i : i + size] for i in range(0, len(answer), size)]
        assert read(pieces, "f", "g") == ("", [("f", {"x": 1})])

    @pytest.mark.parametrize(
        "answer",
        [
            '{"name": "h", "arguments": {"x": 1}}',
            'So: {"name": "f", "arguments": {"x": 1}}',
            "```python\nf(x=1)\n```",
            '{"name": "f"',
        ],
    )
    def test_else_it_is_text(self, answer: str) -> None:
        assert read(list(answer), "f", "g") == (answer, [])

    def test_where_the_model_had_no_choice_it_is_text(self) -> None:
        answer = '{"name": "f", "arguments": {"x": 1}}'
        assert read_whole(answer) == (answer, [])
