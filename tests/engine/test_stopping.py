"""Text comes out token by token, whole characters only, and ends before a stop string."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from prompt_tokenizers import REAL, byte_tokenizer, id_of, load_tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from avp_agents.answer.detokenizer import TextStream
from avp_agents.errors import UnsupportedModelError

SHARED_FIXTURES = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HELLO = "Hello wörld, 今日は 👩‍👩‍👧‍👦!\n\tdef f(x):  # 🇳🇱 naïve"


@pytest.fixture(scope="module", params=REAL)
def tokenizer(request: pytest.FixtureRequest, smollm2_path: Path) -> PreTrainedTokenizerBase:
    """Each real byte-level BPE tokenizer."""
    return load_tokenizers(smollm2_path)[request.param]


@pytest.fixture(scope="module")
def single_bytes() -> PreTrainedTokenizerFast:
    """One id per byte, almost: every character beyond ASCII is spread over several tokens."""
    return byte_tokenizer(special=["<|end|>"])


def sentencepiece_like(*, llama: bool) -> PreTrainedTokenizerFast:
    """Words that begin with ``▁``; `llama` decodes bytes and drops the leading space as Llama 2's tokenizer does."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyzSTOP.,\n"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("c", "a"), ("ca", "t"), ("▁", "cat"), ("▁", "S"), ("▁S", "T")]
    vocabulary = {piece: id_ for id_, piece in enumerate([*pieces, *(left + right for left, right in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    if llama:
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def run(stream: TextStream, ids: Iterable[int]) -> list[str]:
    """What comes out at each id, and in the end."""
    return [*(stream.feed(token_id) for token_id in ids), stream.finish()]


class TestDeltas:
    @given(data=st.data())
    @SHARED_FIXTURES
    def test_they_add_up_to_the_whole_text_for_any_ids(self, tokenizer, data):
        ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=80))
        stream = TextStream(tokenizer)
        assert "".join(run(stream, ids)) == stream.text == decode(tokenizer, ids)

    @given(raw=st.binary(max_size=200), special_at=st.integers(0, 200))
    @example(raw=b"\x80" * 150, special_at=75)
    @example(raw=b"\xf0\x9f\x98" * 50, special_at=60)
    @example(raw="\N{REPLACEMENT CHARACTER}".encode() * 60, special_at=1)
    @example(raw=b"ab\xe2\x82" + b"\xac\xe2\x82" * 40, special_at=3)
    @SHARED_FIXTURES
    def test_they_add_up_for_any_bytes(self, single_bytes, raw, special_at):
        ids = [id_of(single_bytes, char) for char in map(byte_symbol, raw)]
        ids.insert(min(special_at, len(ids)), id_of(single_bytes, "<|end|>"))
        stream = TextStream(single_bytes)
        assert "".join(run(stream, ids)) == raw.decode(errors="replace")

    @given(text=st.text(max_size=60))
    @SHARED_FIXTURES
    def test_a_character_comes_out_whole_with_its_last_byte(self, single_bytes, text):
        text = text.replace("\N{REPLACEMENT CHARACTER}", "")
        ids = [id_of(single_bytes, char) for char in map(byte_symbol, text.encode())]
        stream = TextStream(single_bytes)
        expected = [piece for char in text for piece in [*[""] * (len(char.encode()) - 1), char]]
        assert run(stream, ids) == [*expected, ""]

    def test_a_real_tokenizer_streams_emoji_and_accents(self, tokenizer):
        ids = encode(tokenizer, HELLO)
        deltas = run(TextStream(tokenizer), ids)
        assert "".join(deltas) == HELLO
        assert not any("\N{REPLACEMENT CHARACTER}" in delta for delta in deltas)
        assert sum(map(bool, deltas)) > len(ids) / 2

    def test_special_tokens_are_not_shown(self, tokenizer):
        ids = [*encode(tokenizer, "one"), tokenizer.eos_token_id, *encode(tokenizer, " two")]
        assert "".join(run(TextStream(tokenizer), ids)) == "one two"

    def test_an_incomplete_character_comes_out_broken_in_the_end(self, single_bytes):
        euro = [id_of(single_bytes, char) for char in map(byte_symbol, "€".encode())]
        assert run(TextStream(single_bytes), euro[:2]) == ["", "", "\N{REPLACEMENT CHARACTER}"]

    def test_endless_broken_bytes_are_not_held_back_endlessly(self, single_bytes):
        stream = TextStream(single_bytes)
        for _ in range(100):
            stream.feed(id_of(single_bytes, byte_symbol(0x80)))
        assert 60 < len(stream.text) < 100

    def test_the_cost_of_a_token_does_not_grow_with_the_text(self, tokenizer, monkeypatch):
        sizes: list[int] = []
        stream = TextStream(tokenizer)
        decode_all = stream._decoder._decode_all
        monkeypatch.setattr(stream._decoder, "_decode_all", lambda ids: (sizes.append(len(ids)), decode_all(ids))[1])
        ids = encode(tokenizer, HELLO * 40)
        run(stream, ids)
        assert max(sizes) <= 32
        assert sum(sizes) < 12 * len(ids)


class TestSentencePiece:
    """The first token of a text loses its leading space, in the middle of a stream it does not."""

    @pytest.mark.parametrize("llama", [False, True])
    @given(words=st.lists(st.text("abcthe.,STOP ", min_size=1, max_size=6), max_size=40))
    @SHARED_FIXTURES
    def test_spaces_between_words_are_kept(self, llama, words):
        tokenizer = sentencepiece_like(llama=llama)
        ids = [token_id for word in words for token_id in encode(tokenizer, word)]
        assert "".join(run(TextStream(tokenizer), ids)) == decode(tokenizer, ids)

    @pytest.mark.parametrize("llama", [False, True])
    @given(data=st.data())
    @SHARED_FIXTURES
    def test_any_ids_without_bytes(self, llama, data):
        tokenizer = sentencepiece_like(llama=llama)
        ids = data.draw(st.lists(st.integers(257, len(tokenizer) - 1), max_size=60))
        assert "".join(run(TextStream(tokenizer), ids)) == decode(tokenizer, ids)

    def test_characters_spelled_in_bytes(self):
        tokenizer = sentencepiece_like(llama=True)
        text = "the cat 👩‍👩‍👧‍👦 ate 今日は"
        deltas = run(TextStream(tokenizer), encode(tokenizer, text))
        assert "".join(deltas) == text
        assert "👩" in deltas

    def test_a_straddling_token_is_encoded_anew_without_a_space(self):
        tokenizer = sentencepiece_like(llama=True)
        stream = TextStream(tokenizer, ["t"])
        run(stream, encode(tokenizer, "a cat"))
        assert (stream.text, stream.straddle_text) == ("a ca", " ca")
        assert decode(tokenizer, stream.lineage_ids()) == "a ca"

        stream = TextStream(tokenizer, ["STOP"])
        run(stream, encode(tokenizer, "the cat STOP"))
        assert (stream.text, stream.straddle_text) == ("the cat ", " ")
        assert decode(tokenizer, [*stream.lineage_ids(), *encode(tokenizer, "a")[1:]]) == "the cat a"


class TestStopStrings:
    def test_the_text_ends_before_it(self, tokenizer):
        stream = TextStream(tokenizer, ["\nUser:"])
        deltas = run(stream, encode(tokenizer, "Answer: 411\nUser: next"))
        assert stream.stopped
        assert "".join(deltas) == stream.text == "Answer: 411"

    def test_without_one_everything_is_kept(self, tokenizer):
        stream = TextStream(tokenizer, ["\nUser:"])
        ids = encode(tokenizer, "Answer: 411\nUse")
        assert "".join(run(stream, ids)) == "Answer: 411\nUse"
        assert not stream.stopped
        assert (stream.kept_ids, stream.straddle_text, stream.lineage_ids()) == (len(ids), "", tuple(ids))

    @given(
        text=st.text("ab\n€", max_size=40),
        stops=st.lists(st.text("ab\n€", min_size=1, max_size=5), min_size=1, max_size=3),
    )
    @settings(SHARED_FIXTURES, max_examples=300)
    def test_the_one_that_is_complete_first_decides(self, single_bytes, text, stops):
        """Against a search of every prefix of the text."""
        stream = TextStream(single_bytes, stops)
        ids = [id_of(single_bytes, char) for char in map(byte_symbol, text.encode())]
        deltas = run(stream, ids)

        ends = (end for end in range(1, len(text) + 1) if text[:end].endswith(tuple(stops)))
        end = next(ends, None)
        expected = text if end is None else text[: end - max(len(s) for s in stops if text[:end].endswith(s))]
        assert (stream.text, stream.stopped) == (expected, end is not None)
        assert "".join(deltas) == expected
        assert stream.lineage_ids() == tuple(ids[: len(expected.encode())])

    def test_it_is_reported_as_soon_as_it_is_complete(self, single_bytes):
        stream = TextStream(single_bytes, ["abc"])
        deltas = [(stream.feed(id_of(single_bytes, char)), stream.stopped) for char in "xababc"]
        emitted = [("x", False), ("", False), ("", False), ("ab", False), ("", False), ("", True)]
        assert deltas == emitted

    @given(data=st.data())
    @SHARED_FIXTURES
    def test_it_never_leaks_from_any_ids(self, tokenizer, data):
        ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=40))
        whole = decode(tokenizer, ids)
        start = data.draw(st.integers(0, max(0, len(whole) - 1)))
        stop = whole[start : start + data.draw(st.integers(1, 12))] or "x"
        stream = TextStream(tokenizer, [stop])
        deltas = run(stream, ids)
        assert "".join(deltas) == stream.text == whole.split(stop)[0]
        assert stream.stopped == (stop in whole)

    def test_one_that_ends_in_a_held_back_character_is_found_in_the_end(self, single_bytes):
        ids = [id_of(single_bytes, char) for char in map(byte_symbol, b"abSTOP\xe2")]
        stream = TextStream(single_bytes, ["STOP\N{REPLACEMENT CHARACTER}"])
        assert "".join(run(stream, ids)) == "ab"
        assert stream.stopped

    def test_ids_after_it_are_ignored(self, tokenizer):
        stream = TextStream(tokenizer, ["."])
        run(stream, encode(tokenizer, "One. Two."))
        kept = stream.lineage_ids()
        assert stream.feed(kept[0]) == stream.finish() == ""
        assert (stream.text, stream.lineage_ids()) == ("One", kept)

    def test_text_of_the_first_min_tokens_is_not_searched(self, tokenizer):
        one, two = encode(tokenizer, "One. "), encode(tokenizer, "Two. Three.")
        stream = TextStream(tokenizer, ["."], min_tokens=len(one))
        run(stream, [*one, *two])
        assert stream.text == "One. Two"

    def test_the_tokenizer_must_be_a_fast_one(self):
        with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json"):
            TextStream(object(), ["."])  # pyright: ignore[reportArgumentType]


class TestLineage:
    """Ids wholly before the stop string stay; the kept part of a token that reaches into it is encoded anew."""

    def test_a_token_boundary_before_the_stop_string(self, tokenizer):
        before, stop = encode(tokenizer, "The answer is 411"), encode(tokenizer, "\n\n")
        stream = TextStream(tokenizer, ["\n\n"])
        run(stream, [*before, *stop, *encode(tokenizer, "And")])
        assert (stream.kept_ids, stream.straddle_text) == (len(before), "")
        assert stream.lineage_ids() == tuple(before)

    def test_a_token_that_straddles(self, tokenizer):
        ids = encode(tokenizer, "I like dogs")
        dogs = ids[-1]
        assert decode(tokenizer, [dogs]) == " dogs"
        stream = TextStream(tokenizer, ["ogs"])
        run(stream, ids)
        assert (stream.kept_ids, stream.straddle_text) == (len(ids) - 1, " d")
        assert stream.lineage_ids() == (*ids[:-1], *encode(tokenizer, " d"))

    def test_tokens_that_share_a_character_go_together(self, single_bytes):
        ids = [id_of(single_bytes, char) for char in map(byte_symbol, "a€b".encode())]
        stream = TextStream(single_bytes, ["€"])
        run(stream, ids)
        assert (stream.kept_ids, stream.straddle_text, stream.text) == (1, "", "a")

    @given(data=st.data())
    @SHARED_FIXTURES
    def test_it_decodes_to_the_text(self, tokenizer, data):
        ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=40))
        whole = decode(tokenizer, ids)
        start = data.draw(st.integers(0, max(0, len(whole) - 1)))
        stream = TextStream(tokenizer, [whole[start : start + 3] or "x"])
        run(stream, ids)
        assert decode(tokenizer, stream.lineage_ids()) == stream.text
        assert stream.lineage_ids()[: stream.kept_ids] == tuple(ids[: stream.kept_ids])


def byte_symbol(byte: int) -> str:
    """The character that stands for a byte in the vocabulary of a byte-level tokenizer."""
    return BYTE_SYMBOLS[byte]


def _byte_symbols() -> dict[int, str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_SYMBOLS = _byte_symbols()
