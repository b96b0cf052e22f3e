"""What each token id of a tokenizer stands for, as bytes: where two tokenizers meet.

Byte-level BPE writes `` the`` as ``Ġthe``, sentencepiece as ``▁the``; a line feed is ``Ċ`` here and ``<0x0A>`` there.
As bytes they are the same. Special tokens, added tokens that steer the model and padding rows stand for no bytes.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from avp_agents.errors import UnsupportedModelError
from avp_agents.protocol.handshake import SKETCH_SIZE, VocabularySketch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# what converters call the rows that only fill a table up
_PADDING_ROW = re.compile(r"\[PAD\d+\]|\[unused\d+\]|<unused\d+>")
_SPACE_MARK = "▁"


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """A tokenizer's vocabulary as bytes.

    Attributes:
        pieces: The bytes of each id, by id; None for ids that stand for no text.
        fallbacks: Ids of byte fallbacks (``<0x41>``); for bytes that an ordinary token stands for too, that is used.
    """

    pieces: tuple[bytes | None, ...]
    fallbacks: frozenset[int] = frozenset()

    @cached_property
    def ids(self) -> Mapping[bytes, int]:
        """The id for each byte string: the lowest ordinary one, a byte fallback only where there is no other."""
        found: dict[bytes, int] = {}
        for id_ in sorted(range(len(self.pieces)), key=lambda id_: id_ in self.fallbacks):
            if (piece := self.pieces[id_]) is not None:
                found.setdefault(piece, id_)
        return found

    @cached_property
    def digest(self) -> str:
        """Of all ids and their bytes; 64 hexadecimal digits."""
        digest = hashlib.blake2b(b"avp-token-bytes-1", digest_size=32)
        parts = (b"-" if piece is None else b"%d:%b" % (len(piece), piece) for piece in self.pieces)
        digest.update(b"".join(parts))
        return digest.hexdigest()

    @cached_property
    def sketch(self) -> VocabularySketch:
        """The vocabulary as a hello has it."""
        hashes = {int.from_bytes(hashlib.blake2b(piece, digest_size=4).digest(), "little") for piece in self.ids}
        return VocabularySketch(self.digest, len(self.ids), tuple(heapq.nsmallest(SKETCH_SIZE, hashes)))


def read_token_bytes(tokenizer: PreTrainedTokenizerBase, rows: int) -> TokenBytes:
    """The bytes of every id below `rows`, the number of input embeddings that stand for tokens.

    Raises:
        UnsupportedModelError: The tokenizer is not a fast one, so what its tokens stand for cannot be told.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so the bytes of its tokens are not known. Load the "
            "model's tokenizer.json (convert it with the 'tokenizers' library)."
        )
    definition = json.loads(backend.to_str())
    bytes_of = _reader(definition)
    pieces: list[bytes | None] = [None] * rows
    fallbacks: set[int] = set()
    for id_, piece in _model_vocabulary(definition):
        if id_ < rows and not _PADDING_ROW.fullmatch(piece):
            pieces[id_] = bytes_of(piece) or None
            if _has_byte_fallback(definition) and _BYTE_FALLBACK.fullmatch(piece):
                fallbacks.add(id_)
    for token in definition["added_tokens"]:
        if token["id"] < rows:
            pieces[token["id"]] = None if _steers(token) else token["content"].encode()
    return TokenBytes(tuple(pieces), frozenset(fallbacks))


def _steers(token: Mapping[str, Any]) -> bool:
    """Whether an added token is more than text: only white space and single characters are surely not."""
    return token["special"] or len(token["content"].replace(_SPACE_MARK, " ").strip()) > 1


def _model_vocabulary(definition: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """Ids and pieces as the tokenizer writes them."""
    vocabulary = definition["model"]["vocab"]
    if isinstance(vocabulary, Mapping):
        for piece, id_ in vocabulary.items():
            yield id_, piece
    else:
        for id_, entry in enumerate(vocabulary):
            yield id_, entry[0]


def _reader(definition: Mapping[str, Any]) -> Callable[[str], bytes]:
    """How this tokenizer's pieces are read, judged by the parts it is made of."""
    parts = set(_part_types(definition.get("decoder"))) | set(_part_types(definition.get("pre_tokenizer")))
    if "ByteLevel" in parts:
        return _read_byte_level
    if "WordPiece" in parts:
        return lambda piece: (piece[2:] if piece.startswith("##") else f" {piece}").encode(errors="ignore")
    if _has_byte_fallback(definition):
        return _read_sentencepiece
    return lambda piece: piece.replace(_SPACE_MARK, " ").encode(errors="ignore")


def _has_byte_fallback(definition: Mapping[str, Any]) -> bool:
    return bool(definition["model"].get("byte_fallback")) or "ByteFallback" in _part_types(definition.get("decoder"))


def _part_types(part: Any) -> list[str]:
    """The types of a tokenizer's part and of those it is made of."""
    if not isinstance(part, Mapping):
        return []
    nested = [*part.get("decoders", ()), *part.get("pretokenizers", ())]
    return [part["type"], *(name for inner in nested for name in _part_types(inner))]


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: the printable ones stand for themselves, the others for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


def _read_byte_level(piece: str) -> bytes:
    try:
        return bytes(_BYTE_LEVEL[character] for character in piece)
    except KeyError:  # not written in the alphabet, so no text is ever encoded to it
        return b""


def _read_sentencepiece(piece: str) -> bytes:
    if fallback := _BYTE_FALLBACK.fullmatch(piece):
        return bytes([int(fallback[1], 16)])
    return piece.replace(_SPACE_MARK, " ").encode(errors="ignore")
