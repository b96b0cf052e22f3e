"""Grammars as vLLM's guidance backend takes them: read by the same library, in the way that backend reads them."""

from __future__ import annotations

from typing import Any

import pytest

from avp_agents.answer.grammar import Grammar
from avp_agents.vllm.constraining import Marker, structured_outputs
from avp_agents.vllm.served_model import ServedModel

llguidance = pytest.importorskip("llguidance", reason="needs the extra `tools`")
hf = pytest.importorskip("llguidance.hf", reason="needs the extra `tools`")

SCHEMA = {"type": "object", "properties": {"a/b": {"type": "string"}}, "required": ["a/b"]}
GRAMMARS = [
    (Grammar.json_schema(SCHEMA), '{"a/b": "c"}', '{"a/b":"c"}'),
    (Grammar.regex(r"(yes|no)/\d+\/[/]"), "yes/12//", "yes/12/"),
    (Grammar.lark('%llguidance {}\nstart: "a" inner\ninner: %json {"type": "integer"}\n'), "a12", "12"),
]
TEXT_MARKER = Marker("</think>", None)


@pytest.fixture(scope="module")
def tokenizer(served_model: ServedModel) -> Any:
    """As the backend makes it."""
    return hf.from_tokenizer(served_model.tokenizer, len(served_model.tokenizer))


def matches(tokenizer: Any, outputs: dict[str, Any], ids: list[int]) -> bool:
    [(kind, source)] = outputs.items()
    read = llguidance.grammar_from("regex" if kind == "regex" else "grammar", source)
    matcher = llguidance.LLMatcher(tokenizer, read, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()


@pytest.mark.parametrize("after", [None, TEXT_MARKER], ids=["alone", "behind-reasoning"])
@pytest.mark.parametrize(("grammar", "right", "wrong"), GRAMMARS, ids=["json", "regex", "lark"])
def test_answers_are_what_the_grammar_says(
    served_model: ServedModel, tokenizer: Any, grammar: Grammar, right: str, wrong: str, after: Marker | None
) -> None:
    outputs = structured_outputs(grammar, after=after)
    before = "I think so.</think>\n\n" if after else ""

    assert matches(tokenizer, outputs, served_model.renderer.encode(before + right))
    assert not matches(tokenizer, outputs, served_model.renderer.encode(before + wrong))


def test_the_marker_may_be_a_control_token(served_model: ServedModel, tokenizer: Any) -> None:
    marker = served_model.control_id("<|im_start|>")
    assert marker is not None
    outputs = structured_outputs(Grammar.regex("yes|no"), after=Marker("<|im_start|>", marker))

    thinking, answer = served_model.renderer.encode("I think so."), served_model.renderer.encode("yes")
    assert matches(tokenizer, outputs, [*thinking, marker, *answer])
    assert not matches(tokenizer, outputs, [*thinking, *answer])
