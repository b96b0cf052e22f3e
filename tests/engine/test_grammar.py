"""Answers under a grammar: what may come next, where they end, and what a request that cannot be met says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from prompt_tokenizers import chatml
from tiny_models import TinyModels

from avp_agents import LatentEngine
from avp_agents.answer.grammar import Constraint, Grammar, GrammarCompiler, lark_json
from avp_agents.errors import ConfigurationError, GrammarError

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
TOKENIZER: Any = chatml()
BACKEND = TOKENIZER.backend_tokenizer
END = BACKEND.token_to_id("<|im_end|>")
CONTROLS = [id_ for id_, token in TOKENIZER.added_tokens_decoder.items()]


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(BACKEND, end_ids=[END], control_ids=CONTROLS)


def follow(constraint: Constraint, text: str) -> str:
    """Takes the text's tokens; returns what of it was allowed."""
    taken = []
    for id_ in BACKEND.encode(text, add_special_tokens=False).ids:
        if not constraint.allows(id_):
            break
        constraint.accept(id_)
        taken.append(id_)
    return BACKEND.decode(taken, skip_special_tokens=False)


class TestWhatMayComeNext:
    def test_is_what_the_grammar_allows(self, compiler: GrammarCompiler) -> None:
        constraint = compiler.constraint(Grammar.regex("yes|no"), 10)

        mask = constraint.mask(len(TOKENIZER))
        allowed = {BACKEND.id_to_token(int(id_)) for id_ in np.flatnonzero(mask)}

        assert allowed == {"y", "n"}
        assert [constraint.allows(id_) for id_ in range(len(TOKENIZER))] == mask.tolist()

    def test_is_the_end_where_the_grammar_ends(self, compiler: GrammarCompiler) -> None:
        constraint = compiler.constraint(Grammar.regex("yes|no"), 10)
        assert follow(constraint, "yes") == "yes"
        assert np.flatnonzero(constraint.mask(len(TOKENIZER))).tolist() == [END]

    def test_has_no_room_for_ids_that_only_the_head_has(self, compiler: GrammarCompiler) -> None:
        mask = compiler.constraint(Grammar.regex(".*"), 10).mask(10_000)
        assert not mask[len(TOKENIZER) :].any()

    def test_text_is_never_a_control_token(self, compiler: GrammarCompiler) -> None:
        mask = compiler.constraint(Grammar.regex("(?s:.*)"), 10).mask(len(TOKENIZER))
        assert [id_ for id_ in CONTROLS if mask[id_]] == [END]

    @pytest.mark.parametrize(
        "person",
        [
            {"name": "", "age": 0, "tags": [], "address": {"city": "Zürich"}},
            {"name": 'a "quoted"\n\\ name 你好', "age": 150, "tags": ["x", "}"], "address": {"city": "\t"}},
        ],
    )
    def test_json_is_written_as_python_and_chat_templates_write_it(
        self, compiler: GrammarCompiler, person: dict[str, Any]
    ) -> None:
        written = json.dumps(person, ensure_ascii=False)
        assert follow(compiler.constraint(Grammar.json_schema(PERSON), 500), written) == written

        compact = json.dumps(person, separators=(",", ":"))
        assert follow(compiler.constraint(Grammar.json_schema(PERSON), 500), compact) == '{"name":'

    def test_a_schema_can_stand_in_a_lark_grammar(self, compiler: GrammarCompiler) -> None:
        grammar = Grammar.lark(f'start: "person: " {lark_json({"type": "boolean"})}')
        assert follow(compiler.constraint(grammar, 50), "person: true") == "person: true"
        assert follow(compiler.constraint(grammar, 50), "person: 1") == "person: "

    @pytest.mark.parametrize("marker", ["</think>", "</reason>"])
    @pytest.mark.parametrize("grammar", [Grammar.json_schema({"type": "boolean"}), Grammar.lark('start: "true"')])
    def test_a_grammar_can_begin_behind_reasoning(
        self, compiler: GrammarCompiler, grammar: Grammar, marker: str
    ) -> None:
        constraint = compiler.constraint(grammar, 99, after=marker)
        assert follow(constraint, f"true? Yes.{marker}\n\ntrue") == f"true? Yes.{marker}\n\ntrue"
        assert np.flatnonzero(constraint.mask(len(TOKENIZER))).tolist() == [END]


class TestLimits:
    """A model that never stops: every token is drawn at random from those that are allowed."""

    @staticmethod
    def babble(constraint: Constraint, max_tokens: int, seed: int) -> tuple[str, int]:
        random, taken = np.random.default_rng(seed), []
        while len(taken) < max_tokens:
            allowed = np.flatnonzero(constraint.mask(len(TOKENIZER)))
            id_ = constraint.settled(int(random.choice(allowed)))
            assert constraint.allows(id_)
            constraint.accept(id_)
            if id_ == END:
                break
            taken.append(id_)
        return BACKEND.decode(taken), len(taken)

    @pytest.mark.parametrize("max_tokens", [80, 81, 100, 150])
    def test_json_is_complete_however_long_the_model_goes_on(self, compiler: GrammarCompiler, max_tokens: int) -> None:
        for seed in range(8):
            constraint = compiler.constraint(Grammar.json_schema(PERSON), max_tokens)
            text, length = self.babble(constraint, max_tokens, seed)
            assert json.loads(text).keys() == PERSON["properties"].keys()
            assert length <= max_tokens

    def test_recursion_is_brought_to_an_end(self, compiler: GrammarCompiler) -> None:
        child = {"$ref": "#/$defs/node"}
        node = {"type": "object", "properties": {"children": {"type": "array", "items": child}}}
        schema = {"$defs": {"node": node | {"required": ["children"]}}, "$ref": "#/$defs/node"}
        for seed in range(8):
            constraint = compiler.constraint(Grammar.json_schema(schema), 100)
            assert "children" in json.loads(self.babble(constraint, 100, seed)[0])

    def test_what_ends_by_itself_is_not_cut(self, compiler: GrammarCompiler) -> None:
        constraint = compiler.constraint(Grammar.regex("[ab]{30}"), 30)
        text, length = self.babble(constraint, 30, seed=1)
        assert (len(text), length, constraint.was_cut) == (30, 30, False)

    def test_an_answer_that_cannot_fit_is_left_to_the_limit(self, compiler: GrammarCompiler) -> None:
        text, length = self.babble(compiler.constraint(Grammar.regex("[ab]{30}"), 20), 20, seed=1)
        assert (len(text), length) == (20, 20)

    def test_reasoning_ends_in_time_for_the_answer(self, compiler: GrammarCompiler) -> None:
        constraint = compiler.constraint(Grammar.json_schema({"type": "boolean"}), 60, after="</think>")
        assert self.babble(constraint, 60, seed=2)[0].partition("</think>")[2].strip() in ("true", "false")


class TestErrors:
    @pytest.mark.parametrize(
        ("grammar", "complaint"),
        [
            (Grammar.json_schema({"type": "objet"}), "objet"),
            (Grammar.json_schema({"type": "array", "uniqueItems": True}, strict=True), "uniqueItems"),
            (Grammar.regex("("), "regex"),
            (Grammar.lark("start: other"), "other"),
            (Grammar("json_schema", "{"), "json_schema grammar"),
        ],
    )
    def test_a_grammar_that_cannot_be_followed(
        self, compiler: GrammarCompiler, grammar: Grammar, complaint: str
    ) -> None:
        with pytest.raises(GrammarError, match=complaint):
            compiler.constraint(grammar, 10)

    def test_what_cannot_be_enforced_is_left_out_unless_strict(self, compiler: GrammarCompiler) -> None:
        constraint = compiler.constraint(Grammar.json_schema({"type": "array", "uniqueItems": True}), 50)
        assert follow(constraint, "[1, 1]") == "[1, 1]"

    def test_a_schema_that_is_no_json_data(self) -> None:
        with pytest.raises(GrammarError, match="not JSON data"):
            Grammar.json_schema({"enum": [{1, 2}]})

    def test_a_grammar_of_no_known_kind(self) -> None:
        kind: Any = "gbnf"
        with pytest.raises(GrammarError, match="one of json_schema, regex, lark"):
            Grammar(kind, "root ::= x")

    def test_something_else_than_a_grammar(self, compiler: GrammarCompiler) -> None:
        wrong: Any = PERSON
        with pytest.raises(ConfigurationError, match="must be a Grammar, not dict"):
            compiler.constraint(wrong, 10)

    def test_without_llguidance_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "llguidance", None)
        with pytest.raises(ConfigurationError, match=r"pip install 'avp-agents\[tools\]'"):
            GrammarCompiler(BACKEND, end_ids=[END], control_ids=CONTROLS).constraint(Grammar.regex("a"), 10)


class TestInTheEngine:
    """A tiny model with random weights says nothing that makes sense; under a grammar it still answers with JSON."""

    @pytest.fixture(scope="class")
    @staticmethod
    def engine(tiny: TinyModels, open_module_engine: Callable[..., LatentEngine]) -> LatentEngine:
        return open_module_engine(tiny.path("llama"), batch_invariant=True)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"temperature": 1.5, "seed": 1},
            {"temperature": 1.0, "seed": 2, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
            {"repetition_penalty": 1.5},
            {"min_tokens": 60},
            {"logprobs": 2},
        ],
    )
    def test_whatever_the_sampling_options_it_is_valid(self, engine: LatentEngine, options: dict[str, Any]) -> None:
        answer = engine.generate("Who?", grammar=Grammar.json_schema(PERSON), max_tokens=120, **options)

        assert json.loads(answer.text).keys() == PERSON["properties"].keys()
        assert len(answer.token_ids) <= 120

    def test_an_answer_that_was_brought_to_its_end_was_too_long(self, engine: LatentEngine) -> None:
        grammar = Grammar.json_schema({"type": "array", "items": {"type": "string"}})
        assert engine.generate("Who?", grammar=grammar, max_tokens=40).finish_reason == "length"
        assert engine.generate("Who?", grammar=Grammar.regex("yes|no"), max_tokens=40).finish_reason == "stop"

    def test_the_grammar_s_end_comes_before_min_tokens(self, engine: LatentEngine) -> None:
        answer = engine.generate("Who?", grammar=Grammar.regex("yes|no"), min_tokens=30, max_tokens=40)
        assert (answer.text in ("yes", "no"), answer.finish_reason) == (True, "stop")

    def test_a_stop_string_cuts_it(self, engine: LatentEngine) -> None:
        grammar = Grammar.json_schema(PERSON)
        answer = engine.generate("Who?", grammar=grammar, stop=['"age"'], max_tokens=90)
        assert answer.text.endswith(", ")
        assert answer.finish_reason == "stop"

    def test_logprobs_are_those_of_the_model(self, engine: LatentEngine) -> None:
        forced = engine.generate("Who?", grammar=Grammar.regex("zebra"), logprobs=1, max_tokens=20)
        assert forced.logprobs is not None
        assert all(token.logprob <= token.top[0][1] for token in forced.logprobs)
        assert any(token.token_id != token.top[0][0] for token in forced.logprobs)

    def test_rows_of_a_batch_do_not_know_of_each_other(self, engine: LatentEngine) -> None:
        requests: list[dict[str, Any]] = [
            {"grammar": Grammar.json_schema(PERSON)},
            {},
            {"grammar": Grammar.regex("[a-z ]{10,20}"), "temperature": 1.0, "seed": 3},
            {"temperature": 1.0, "seed": 3},
            {"grammar": Grammar.json_schema(PERSON), "temperature": 1.0, "seed": 4},
        ]
        alone = [engine.generate("Who?", max_tokens=100, **options).token_ids for options in requests]

        streams = [engine.stream("Who?", max_tokens=100, **options) for options in requests]
        last = [[chunk.generation for chunk in stream][-1] for stream in streams]

        assert [generation.token_ids for generation in last if generation is not None] == alone

    def test_a_bad_grammar_is_told_before_work_starts(self, engine: LatentEngine) -> None:
        steps = engine.stats().steps
        with pytest.raises(GrammarError):
            engine.stream("Who?", grammar=Grammar.regex("("))
        assert engine.stats().steps == steps
