"""Constrained decoding: what an answer may be, compiled for one model's tokenizer, followed token by token.

    Grammar                   what a caller asks for: a JSON schema, a regular expression, or a grammar in lark syntax
    GrammarCompiler           compiles grammars for one tokenizer; needs the extra `tools` (llguidance)
    Constraint                one answer on its way: which tokens may come next

An answer under a grammar ends where the grammar ends. Where `max_tokens` would cut it off in the middle, its shortest
ending is written instead, so that a model that talks without end still leaves valid JSON; such an answer's finish
reason is ``"length"``.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from avp_agents.errors import ConfigurationError, EngineError, GrammarError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from tokenizers import Tokenizer

GrammarKind = Literal["json_schema", "regex", "lark"]

_JSON_FORM = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',
}
"""JSON as Python's ``json.dumps(value, ensure_ascii=False)`` writes it, which is what chat templates render."""

_CACHED_GRAMMARS = 64
_LONGEST_ENDING = 512
_WATCH_EVERY = 16
"""Tokens between two looks at how long the shortest ending is, while there is plenty of room."""
_CLOSERS = ("}", "]")
"""What ends an object or an array. Where both are allowed they are content, inside a string."""
_ENDINGS = ('"', ",", "null", "0", ".", "a")
"""What else to try, in this order, to bring an answer to its end."""


@dataclass(frozen=True)
class Grammar:
    """What an answer may be. Make one with `json_schema`, `regex` or `lark`; equal grammars are compiled once.

    Attributes:
        kind: How to read the source.
        source: The schema as JSON, the expression, or the grammar.

    Example:
        >>> city = Grammar.json_schema({"type": "object", "properties": {"city": {"type": "string"}}})
        >>> engine.generate("Where is the Louvre?", grammar=city).text
        '{"city": "Paris"}'
    """

    kind: GrammarKind
    source: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind) or not isinstance(self.source, str):
            raise GrammarError(f"A grammar is the text of one of {', '.join(get_args(GrammarKind))}.")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any], *, strict: bool = False) -> Grammar:
        """JSON that is valid under `schema`, its properties in the schema's order, without superfluous white space.

        Args:
            schema: A JSON schema.
            strict: Refuse keywords that cannot be enforced (such as ``uniqueItems``) instead of leaving them out.

        Raises:
            GrammarError: The schema is not JSON data.
        """
        return cls("json_schema", _as_json(_with_form(schema, strict)))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that a regular expression (Rust syntax, no look-around) matches as a whole."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Text that a context-free grammar derives, in llguidance's dialect of lark; it may embed `lark_json`."""
        return cls("lark", text)


def lark_json(schema: Mapping[str, Any], *, strict: bool = False) -> str:
    """A JSON schema as an expression inside a lark grammar; arguments and errors as in `Grammar.json_schema`."""
    return f"%json {_as_json(_with_form(schema, strict))}"


def lark_pattern(text: str) -> str:
    """A pattern that matches just `text`, to stand between the slashes of a lark grammar."""
    return re.escape(text).replace("/", r"\/").replace(r"\ ", " ")


def _with_form(schema: Mapping[str, Any], strict: bool) -> dict[str, Any]:
    if not isinstance(schema, Mapping):
        raise GrammarError(f"A JSON schema is a dict, not {type(schema).__name__}.")
    return {**schema, "x-guidance": {**_JSON_FORM, "lenient": not strict}}


def _as_json(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise GrammarError(f"The JSON schema is not JSON data: {error}.") from error


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Thread-safe; the work is done on the caller's thread.

    Args:
        tokenizer: A fast tokenizer's backend; it is read, never changed.
        end_ids: Ids that end an answer.
        control_ids: Ids that no text can become; a grammar names them as ``<[id]>``.
    """

    def __init__(self, tokenizer: Tokenizer, *, end_ids: Collection[int], control_ids: Collection[int]) -> None:
        self._backend = tokenizer
        self._end_ids, self._control_ids = frozenset(end_ids), frozenset(control_ids)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[Grammar, str | None], LLMatcher] = OrderedDict()

    def constraint(self, grammar: Grammar, max_tokens: int, *, after: str | None = None) -> Constraint:
        """A constraint for one answer of at most `max_tokens` tokens.

        Args:
            grammar: What the answer may be.
            max_tokens: Tokens that the answer may have.
            after: A marker that the answer's text comes behind, after line breaks; before it anything may stand. None
                where the grammar holds from the first token.

        Raises:
            GrammarError: The grammar is malformed, or asks for more than can be enforced.
            ConfigurationError: llguidance is not installed.
        """
        if not isinstance(grammar, Grammar):
            raise ConfigurationError(f"grammar must be a Grammar, not {type(grammar).__name__}.")
        if not self._end_ids:
            raise ConfigurationError("The model has no end-of-sequence token, so it cannot end where a grammar ends.")
        with self._lock:
            matcher = self._compiled.pop((grammar, after), None) or self._compile(grammar, after)
            self._compiled[grammar, after] = matcher
            if len(self._compiled) > _CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
            first = () if after is None else (after,)
            endings = _Endings(self._end_ids, self._single_ids(_CLOSERS), self._single_ids((*first, *_ENDINGS)))
            return Constraint(matcher.deep_copy(), endings, max_tokens)

    def _compile(self, grammar: Grammar, after: str | None) -> LLMatcher:
        llguidance = _llguidance()
        if self._tokenizer is None:
            self._tokenizer = llguidance.LLTokenizer(self._definition(), eos_token=min(self._end_ids))
        try:
            source = getattr(llguidance.LLMatcher, f"grammar_from_{grammar.kind}")(grammar.source)
            source = source if after is None else self._behind(after, source)
        except ValueError as error:
            raise GrammarError(f"The {grammar.kind} grammar is malformed: {error}") from error
        matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0)
        if matcher.is_error():
            raise GrammarError(f"The {grammar.kind} grammar cannot be followed: {_first_lines(matcher.get_error())}")
        return matcher

    def _behind(self, marker: str, source: str) -> str:
        """A grammar that lets anything stand before `marker`, and `source` behind it."""
        inner = json.loads(source)["grammars"] if source.lstrip().startswith("{") else [{"lark_grammar": source}]
        inner[0]["name"] = "answer"
        token_id = self._backend.token_to_id(marker)
        is_control = token_id in self._control_ids
        head = f"head: /(?s:.*)/ <[{token_id}]>" if is_control else f"head[lazy]: /(?s:.*){lark_pattern(marker)}/"
        outer = f"%llguidance {{}}\nstart: head /\\n{{0,2}}/ @answer\n{head}\n"
        return json.dumps({"grammars": [{"lark_grammar": outer}, *inner]})

    def _definition(self) -> str:
        """The tokenizer's JSON form: its control tokens flagged special, without truncation and padding."""
        definition = json.loads(self._backend.to_str())
        for token in definition["added_tokens"]:
            token["special"] = token["id"] in self._control_ids
        return json.dumps({**definition, "truncation": None, "padding": None})

    def _single_ids(self, texts: tuple[str, ...]) -> tuple[int, ...]:
        """The ids of those texts that are one token."""
        spelled = (self._backend.encode(text, add_special_tokens=False).ids for text in texts)
        return tuple(ids[0] for ids in spelled if len(ids) == 1)


@dataclass(frozen=True)
class _Endings:
    """Ids that end an answer, those that close an object or an array, and those to try else on the way to an end."""

    end_ids: frozenset[int]
    closers: tuple[int, ...]
    others: tuple[int, ...]


class Constraint:
    """Which tokens may come next in one answer. Its user accepts every token that it takes; not thread-safe.

    Attributes:
        was_cut: Whether the answer was brought to its end because `max_tokens` would not have sufficed.

    Args:
        matcher: At the answer's beginning; owned by this constraint.
        endings: What to end an answer with.
        max_tokens: Tokens that the answer may have.
    """

    def __init__(self, matcher: LLMatcher, endings: _Endings, max_tokens: int) -> None:
        self._matcher, self._endings = matcher, endings
        self._left = max_tokens
        self._watched_below = 2 * _WATCH_EVERY
        self._ending: list[int] | None = None
        self.was_cut = False

    def allows(self, token_id: int) -> bool:
        """Whether the token may come next."""
        if token_id in self._endings.end_ids:
            return self._matcher.is_accepting()
        return self._matcher.validate_tokens([token_id]) == 1

    def mask(self, size: int) -> np.ndarray:
        """Which of the ids ``0..size-1`` may come next, ``[size]`` bool.

        Raises:
            EngineError: The grammar is too complex to be followed any further.
        """
        mask = _grammar_mask(self._matcher)[:size]
        mask = np.pad(mask, (0, size - len(mask)))
        mask[[token for token in self._endings.end_ids if token < size]] = self._matcher.is_accepting()
        return mask

    def settled(self, token_id: int) -> int:
        """The token to take where `token_id` was drawn: another one where `max_tokens` would not suffice behind it."""
        if self._ending is None and not self._is_too_long(token_id):
            return token_id
        if self._ending is None:
            ending = self._shortest_ending(self._matcher)
            if ending is None:
                return token_id
            self._ending, self.was_cut = ending, True
        return self._ending.pop(0) if self._ending else min(self._endings.end_ids)

    def accept(self, token_id: int) -> None:
        """Note the token that was taken.

        Raises:
            EngineError: The grammar does not allow it, or became too complex.
        """
        self._left -= 1
        if token_id not in self._endings.end_ids and not self._matcher.consume_token(token_id):
            raise _failed(self._matcher)

    def _is_too_long(self, token_id: int) -> bool:
        """Whether no ending fits behind the token. Looked at now and then, and always where room is scarce."""
        left = self._left - 1
        if token_id in self._endings.end_ids or (left > self._watched_below and left % _WATCH_EVERY):
            return False
        after = self._matcher.deep_copy()
        after.consume_token(token_id)
        ending = self._shortest_ending(after)
        if ending is None:
            return True
        self._watched_below = max(self._watched_below, 2 * (len(ending) + _WATCH_EVERY))
        return len(ending) > left

    def _shortest_ending(self, matcher: LLMatcher) -> list[int] | None:
        """A short run of ids that completes the answer within its tokens; None where none is found."""
        matcher = matcher.deep_copy()
        ending: list[int] = []
        longest = min(_LONGEST_ENDING, self._left)
        while not matcher.is_accepting():
            step = matcher.compute_ff_tokens() or self._toward_end(matcher)
            ending += step
            if not step or len(ending) > longest or not matcher.consume_tokens(step):
                return None
        return ending

    def _toward_end(self, matcher: LLMatcher) -> list[int]:
        closers = [token for token in self._endings.closers if matcher.validate_tokens([token])]
        if len(closers) == 1:
            return closers
        for token in self._endings.others:
            if matcher.validate_tokens([token]):
                return [token]
        allowed = (int(token) for token in np.flatnonzero(_grammar_mask(matcher)))
        return [token for token in allowed if token not in self._endings.end_ids][:1]


def _grammar_mask(matcher: LLMatcher) -> np.ndarray:
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    if matcher.is_error():
        raise _failed(matcher)
    return np.unpackbits(bits, bitorder="little").astype(bool)


def _failed(matcher: LLMatcher) -> EngineError:
    return EngineError(f"The grammar cannot be followed any further: {_first_lines(matcher.get_error())}")


def _llguidance() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "Tools, structured output and grammars need llguidance. Install it with: pip install 'avp-agents[tools]'"
        ) from error
    return llguidance


def _first_lines(message: str) -> str:
    """An error message without the dump of the parser's state behind it."""
    return message.partition("\n<state>")[0].strip()
