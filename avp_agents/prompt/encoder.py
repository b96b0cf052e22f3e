"""Rendered chat text to token ids, so that message content is data.

A chat template writes control tokens (``<|im_start|>``) between contents that come from users, tools and models. A
content may hold the same strings; as ids they would open and close turns. So:

1. `PromptEncoder.mark` puts a marker before each control string inside a content, before the template sees it. The
   string itself stays whole, so that templates that cut contents at it (``content.split("</think>")``) still do. The
   marker names its string, so that one which a template cut off does not touch another string that comes after it.
2. `PromptEncoder.encode` turns each *unmarked* control string of the rendered text into a stand-in, drops the markers,
   and encodes the whole text at once with a private copy of the tokenizer that knows the stand-ins in place of the
   control strings. A content is therefore tokenized as one run of text, and cannot become a control id.

Markers and stand-ins hold a random number that is drawn per encoder, so no content can forge them. The copy's ids are
the tokenizer's own, which the constructor verifies.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from avp_agents.errors import PromptError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Piece = tuple[str, int | None]
"""A piece of text, and its id if it is a control token."""


class PromptEncoder:
    """Encodes rendered chat text with one tokenizer. Safe to use from many threads.

    Attributes:
        control_ids: The ids that no content can become: the special tokens, and the added tokens that steer the model
            (``<tool_call>``) without being flagged special.
        raw_prefix: What the tokenizer puts before raw text: its BOS id, or nothing.

    Args:
        tokenizer: A fast tokenizer. It is read, never changed.

    Raises:
        UnsupportedModelError: The tokenizer is not a fast one, or cannot be copied exactly.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        definition = _read_definition(tokenizer)
        self._template = _template_source(tokenizer)
        controls = _control_tokens(definition, self._template)
        nonce = f"{secrets.randbelow(10**18):018d}"
        self._ids = {token["content"]: token["id"] for token in controls}
        self._stand_ins = {text: f"\ufdd0{nonce}.{id_}\ufdd1" for text, id_ in self._ids.items()}
        self._tokenizer = _with_stand_ins(definition, self._stand_ins)
        self._lead = next((self._stand_ins[token["content"]] for token in controls if not token["rstrip"]), "")
        self.control_ids = frozenset(self._ids.values())
        self.raw_prefix = _prefix_of_raw_text(self._tokenizer)

        # ASCII punctuation and digits pass unchanged through the filters templates use: trim, upper, tojson.
        self._marker, self._gap = f"~{nonce}:", f"~{nonce};"
        control = _any_of(self._ids)
        self._control = re.compile(control)
        self._rendered = re.compile(rf"~{nonce}(?::(?P<id>\d+);(?P<data>{control})?|;)|(?P<control>{control})")
        self._heads = frozenset(text[i:] for text in self._ids for i in range(1, len(text)))
        self._tails = frozenset(text[:i] for text in self._ids for i in range(1, len(text)))
        self._longest_part = max(map(len, self._heads), default=0)

    def knows(self, control: str) -> bool:
        """Whether `control` is a control token, or text that the chat template writes."""
        return control in self._ids or control in self._template

    def pieces(self, text: str) -> list[Piece]:
        """Rendered text cut into plain text and control tokens, in order."""
        cut = re.split(f"({self._control.pattern})", text)
        return [(piece, self._ids.get(piece) if i % 2 else None) for i, piece in enumerate(cut) if piece]

    def mark(self, value: Any) -> Any:
        """`value` (text, or JSON-like data that holds text) with the control strings in it marked as data."""
        if isinstance(value, str):
            return self._mark_text(value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def encode(self, text: str, *, continued: bool = False) -> tuple[int, ...]:
        """The ids of rendered text: unmarked control strings are honoured, marked ones are text. Adds no BOS.

        Args:
            text: A rendered prompt, or a part of one.
            continued: The ids will follow others, so the text does not get the space that some tokenizers put before
                the first word of a text.

        Raises:
            PromptError: The text holds a lone surrogate, which no tokenizer can read.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"The prompt is not valid Unicode: it holds the lone surrogate {error.object[error.start]!r}. Decode "
                "the text with errors='replace', or remove the character."
            ) from error
        text = self._rendered.sub(self._resolve, text)
        if continued and self._lead:
            return tuple(self._tokenizer.encode(self._lead + text, add_special_tokens=False).ids[1:])
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _mark_text(self, text: str) -> str:
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
        body = text[start:end]
        # A content may also end (or begin) with a part of a control string that its neighbour completes.
        sizes = range(1, min(self._longest_part, len(body)) + 1)
        before = self._gap if any(body[:size] in self._heads for size in sizes) else ""
        after = self._gap if any(body[-size:] in self._tails for size in sizes) else ""
        gapped = f"{text[:start]}{before}{body}{after}{text[end:]}" if body else text
        return self._control.sub(lambda found: f"{self._marker}{self._ids[found[0]]};{found[0]}", gapped)

    def _resolve(self, found: re.Match[str]) -> str:
        text = found["control"] or found["data"] or ""
        is_data = found["data"] is not None and int(found["id"]) == self._ids[text]
        return text if is_data or not text else self._stand_ins[text]


def _any_of(texts: Iterable[str]) -> str:
    """A pattern for any of `texts`, longest first as the tokenizer matches them; one that never matches for none."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)"


def _template_source(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else "\n".join(template.values())


def _read_definition(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The fast tokenizer's own JSON form."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so control tokens in messages cannot be told from "
            "the template's own. Load the model's tokenizer.json (convert it with the 'tokenizers' library)."
        )
    try:
        definition = json.loads(backend.to_str())
    except Exception as error:  # `tokenizers` raises plain Exception for parts that are written in Python
        raise UnsupportedModelError(
            f"The tokenizer has a part that cannot be copied ({error}). Use the tokenizer that came with the model."
        ) from error
    definition["truncation"] = definition["padding"] = None
    return definition


def _control_tokens(definition: Mapping[str, Any], template: str) -> list[dict[str, Any]]:
    """The added tokens that steer the model.

    Those flagged special; and of the others those that the template writes or that lie outside the model's own
    vocabulary. The rest (Gemma's ``<table>``) is ordinary vocabulary, and so is white space and any single character.
    """
    model_vocabulary = definition["model"]["vocab"]
    ordinary = model_vocabulary if isinstance(model_vocabulary, dict) else {piece for piece, _ in model_vocabulary}

    def steers(text: str) -> bool:
        return len(text.replace("▁", " ").strip()) > 1 and (text in template or text not in ordinary)

    return [token for token in definition["added_tokens"] if token["special"] or steers(token["content"])]


def _with_stand_ins(definition: Mapping[str, Any], stand_ins: Mapping[str, str]) -> Tokenizer:
    """The tokenizer in which each control string is called by its stand-in, under the same id."""
    model = dict(definition["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {stand_ins.get(piece, piece): id_ for piece, id_ in model["vocab"].items()}
    else:
        model["vocab"] = [[stand_ins.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in stand_ins:
        model["unk_token"] = stand_ins[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if stand_ins.keys().isdisjoint((*pair, "".join(pair)))]

    added = [_called(token, stand_ins) for token in definition["added_tokens"]]
    copy = Tokenizer.from_str(json.dumps({**definition, "model": model, "added_tokens": added}))
    moved = [token["content"] for token in added if copy.token_to_id(token["content"]) != token["id"]]
    if moved:
        raise UnsupportedModelError(
            f"The tokenizer cannot be copied exactly: {len(moved)} of its added tokens would get other ids. Their ids "
            "must follow the vocabulary's without gaps."
        )
    return copy


def _called(token: dict[str, Any], stand_ins: Mapping[str, str]) -> dict[str, Any]:
    if token["content"] not in stand_ins:
        return token
    return {**token, "content": stand_ins[token["content"]], "normalized": False, "single_word": False}


def _prefix_of_raw_text(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer's post-processor puts before a text."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    start = next(i for i in range(len(full) + 1) if full[i : i + len(bare)] == bare)
    return tuple(full[:start])
