"""Ids to text, one token at a time, ending at a stop string.

A token's text is not always final when the token arrives: a character may be spread over several tokens, and the end of
the text may turn out to be the beginning of a stop string. `TextStream` emits what is final and holds the rest back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tokenizers import Tokenizer

from avp_agents.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4
"""Bytes of the longest UTF-8 sequence."""
_WINDOW = 8
"""Ids that are decoded again with each new one, at most, while the text is whole."""
_BROKEN_WINDOW = 32
"""The same while it ends in an incomplete character: longer than any run of bytes that a model means."""


class TextStream:
    """The text of one answer, token by token.

    Text that was emitted is never taken back.

    Attributes:
        text: Everything emitted so far.
        stopped: Whether a stop string was found. Further ids are ignored then.

    Args:
        tokenizer: A fast tokenizer; it is only read.
        stop: Strings that end the text, none of them empty. The one that is complete first wins; of several that are
            complete at the same character, the longest.
        min_tokens: Text of so many tokens is not searched for stop strings.
        skip_special_tokens: Special tokens are not shown.

    Raises:
        UnsupportedModelError: The tokenizer is not a fast one.

    Example:
        >>> stream = TextStream(tokenizer, stop=("\\n\\n",))
        >>> "".join(stream.feed(token_id) for token_id in ids) + stream.finish()
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UnsupportedModelError(
                f"{type(tokenizer).__name__} is not a fast tokenizer. Load the model's tokenizer.json (convert it with "
                "the 'tokenizers' library)."
            )
        self._decoder = _Decoder(backend, skip_special_tokens)
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._pieces: list[str] = []
        self._emitted = 0
        self._held = ""
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything emitted so far."""
        return "".join(self._pieces)

    def feed(self, token_id: int) -> str:
        """Take the next id; returns the text, perhaps empty, that has become final."""
        if self.stopped:
            return ""
        return self._emit(self._release(self._decoder.feed(token_id)))

    def finish(self) -> str:
        """No more ids will come; returns the text that was held back. It may still end in a stop string."""
        if self.stopped:
            return ""
        released = self._release(self._decoder.finish())
        if not self.stopped:
            released, self._held = released + self._held, ""
        return self._emit(released)

    @property
    def kept_ids(self) -> int:
        """How many of the fed ids lie wholly before the stop string; all of them while there is none."""
        return self._last_kept.ids

    @property
    def straddle_text(self) -> str:
        """The text before the stop string whose token (or tokens, if they share a character) reaches into it."""
        return self.text[self._last_kept.characters :] if self.stopped else ""

    def lineage_ids(self) -> tuple[int, ...]:
        """The ids that stand for `text` in a lineage: `kept_ids` of the fed ones, then `straddle_text` encoded anew.

        A straddling part that no tokens of the vocabulary spell is left out.
        """
        kept = self._decoder.ids[: self.kept_ids]
        return (*kept, *self._decoder.encode_behind(kept, self.straddle_text))

    @property
    def _last_kept(self) -> _Boundary:
        boundaries = self._decoder.boundaries
        if not self.stopped:
            return _Boundary(len(self._decoder.ids), self._emitted)
        return boundaries[bisect_right(boundaries, self._emitted, key=lambda boundary: boundary.characters) - 1]

    def _emit(self, text: str) -> str:
        if text:
            self._pieces.append(text)
            self._emitted += len(text)
        return text

    def _release(self, new: str) -> str:
        """What of held-back and new text can be emitted; sets `stopped`."""
        if not self._stop or len(self._decoder.ids) <= self._min_tokens:
            return new
        text = self._held + new
        start = _first_stop(text, self._stop)
        if start is not None:
            self.stopped, self._held = True, ""
            return text[:start]
        safe = len(text) - _started_stop(text, self._stop)
        self._held = text[safe:]
        return text[:safe]


class _Boundary(NamedTuple):
    """Where the text of a number of ids ends, and that of the next ones begins."""

    ids: int
    characters: int


class _Decoder:
    """Ids to final text, in constant time per id.

    Only a window of the last ids is decoded. It begins early enough for decoders that treat the first token of a text
    in their own way (SentencePiece's drop its leading space), and ends where no character is incomplete.

    Attributes:
        ids: The ids fed so far.
        boundaries: The ends of final text. Between two of them lies one token, or several that share a character.
    """

    def __init__(self, backend: Tokenizer, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._start = 0
        self._final_in_window = 0
        self.ids: list[int] = []
        self.boundaries = [_Boundary(0, 0)]

    def feed(self, token_id: int) -> str:
        """Take the next id; returns the text that has become final."""
        self.ids.append(token_id)
        text = self._decode(self._start)
        if not text.endswith(_BROKEN):
            return self._advance(text, slide=len(self.ids) - self._start >= _WINDOW)
        if len(self.ids) - self._start >= _BROKEN_WINDOW:
            return self._give_up_on_broken(text)
        return ""

    def finish(self) -> str:
        """No more ids will come; returns the text that was not final."""
        return self._advance(self._decode(self._start), slide=False)

    def encode_behind(self, ids: Sequence[int], text: str) -> list[int]:
        """Ids that spell `text` behind `ids`; none where the vocabulary cannot."""
        before = list(ids[-_WINDOW:])
        wanted = self._decode_all(before) + text
        # Some tokenizers put a space before the first word of a text, unless something stands before it.
        for lead in ("", "\n"):
            prefix = self._encode(lead)
            encoded = self._encode(lead + text)[len(prefix) :]
            if self._decode_all(before + encoded) == wanted:
                return encoded
        return []

    def _advance(self, window_text: str, *, slide: bool) -> str:
        """All of the window's text is final."""
        new = window_text[self._final_in_window :]
        self._final_in_window = len(window_text)
        self._set_boundary(len(self.ids), new)
        if slide:
            self._slide(window_text)
        return new

    def _slide(self, window_text: str) -> None:
        """Begin the window as late as possible: at ids whose own text is what they add to the text."""
        for start in range(len(self.ids) - 1, self._start, -1):
            tail = self._decode(start)
            if tail and window_text.endswith(tail):
                self._start, self._final_in_window = start, len(tail)
                return

    def _give_up_on_broken(self, window_text: str) -> str:
        """Bytes that will never be a character: final, where the text falls into two parts that do not touch."""
        for middle in range(len(self.ids) - 1, self._start, -1):
            tail = self._decode(middle)
            head = self._decode(self._start, middle)
            # The tail has a byte or more per character, so no later one can join head and tail.
            if len(tail) >= _LONGEST_CHARACTER and head + tail == window_text:
                new = head[self._final_in_window :]
                self._start, self._final_in_window = middle, 0
                self._set_boundary(middle, new)
                return new
        return ""

    def _set_boundary(self, ids: int, new: str) -> None:
        self.boundaries.append(_Boundary(ids, self.boundaries[-1].characters + len(new)))

    def _decode(self, start: int, stop: int | None = None) -> str:
        return self._decode_all(self.ids[start:stop])

    def _decode_all(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=self._skip_special_tokens)

    def _encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first; the longest, if several are complete at one character."""
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def _started_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop string."""
    longest = min(len(text), max(map(len, stops)) - 1)
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)
