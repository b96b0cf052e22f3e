"""Tokens of different tokenizers meet in the bytes that they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from prompt_tokenizers import byte_tokenizer, chatml
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from avp_agents.crossing import TokenBytes, cached_shared_vocabulary, read_token_bytes, shared_vocabulary
from avp_agents.errors import UnsupportedModelError


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 2's kind: ``▁`` for a space, and a byte fallback for each byte."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "hello", "é", "<0x41>x"]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<unk>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def piece_of(tokenizer: PreTrainedTokenizerFast, token: str) -> bytes | None:
    return read_token_bytes(tokenizer, len(tokenizer)).pieces[tokenizer.convert_tokens_to_ids(token)]  # pyright: ignore


@pytest.mark.parametrize(
    ("token", "stands_for"),
    [("Ġhello", b" hello"), ("hello", b"hello"), ("Ċ", b"\n"), ("Ã", b"\xc3"), ("<|im_end|>", None)],
)
def test_byte_level_pieces(token: str, stands_for: bytes | None) -> None:
    """GPT-2's alphabet is read back into bytes; a control token stands for none."""
    assert piece_of(chatml(), token) == stands_for


@pytest.mark.parametrize(
    ("token", "stands_for"),
    [("▁hello", b" hello"), ("hello", b"hello"), ("<0x0A>", b"\n"), ("é", b"\xc3\xa9"), ("<s>", None)],
)
def test_sentencepiece_pieces(token: str, stands_for: bytes | None) -> None:
    """The space mark and byte fallbacks are read; a piece that only looks like a fallback is text."""
    assert piece_of(sentencepiece_tokenizer(), token) == stands_for


def test_two_kinds_of_tokenizers_meet() -> None:
    """The word with its space, the word without, the space, and every byte are shared; nothing special is."""
    one, other = (read_token_bytes(t, len(t)) for t in (byte_tokenizer(eos="</s>"), sentencepiece_tokenizer()))

    shared = shared_vocabulary(one, other)

    met = [one.pieces[i] for i in shared.source_ids]
    assert {b" hello", b"hello", b" ", b"\n", b"\xc3"} <= set(met)
    assert met == [other.pieces[i] for i in shared.target_ids]
    assert len(met) == 258
    # its own space and hello, and é, which the other one spells with two bytes
    assert shared.share_of_source == pytest.approx(258 / 261)


def test_padding_rows_and_steering_tokens_take_no_part() -> None:
    """Rows without a token, tokens that only fill a table, and added tokens that steer; added white space is text."""
    tokenizer = byte_tokenizer(eos="</s>", added=["<tool_call>", "  "])
    tokenizer.backend_tokenizer.add_tokens(["[PAD151665]"])

    read = read_token_bytes(tokenizer, len(tokenizer) + 3)

    of = dict(zip(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))), read.pieces, strict=False))  # pyright: ignore
    assert of["<tool_call>"] is None
    assert of["[PAD151665]"] is None
    assert of["  "] == b"  "
    assert read.pieces[len(tokenizer) :] == (None, None, None)


def test_an_ordinary_token_is_preferred_to_a_byte_fallback() -> None:
    """Both stand for the same byte; the fallback counts where there is nothing else."""
    read = TokenBytes((b"A", b"B", b"A"), fallbacks=frozenset({0, 1}))

    assert read.ids == {b"A": 2, b"B": 1}


def test_a_tokenizer_that_is_not_fast_is_refused() -> None:
    """What its tokens stand for cannot be told."""
    with pytest.raises(UnsupportedModelError, match="fast tokenizer"):
        read_token_bytes(object(), 8)  # pyright: ignore[reportArgumentType]


def test_the_sketch_estimates_the_overlap() -> None:
    """The share of the smaller vocabulary, from 2 kB of each, within a few per cent; equal vocabularies exactly."""
    small = TokenBytes(tuple(b"word%d" % i for i in range(20_000)))
    large = TokenBytes(tuple(b"word%d" % i for i in range(5_000, 60_000)))
    tiny = TokenBytes(tuple(b"word%d" % i for i in range(40)))

    assert small.sketch.overlap(large.sketch) == pytest.approx(0.75, abs=0.1)
    assert large.sketch.overlap(small.sketch) == small.sketch.overlap(large.sketch)
    assert small.sketch.overlap(small.sketch) == 1.0
    assert tiny.sketch.overlap(small.sketch) == 1.0
    assert tiny.sketch.overlap(large.sketch) == 0.0
    assert TokenBytes(()).sketch.overlap(small.sketch) == 0.0


def test_the_shared_vocabulary_is_kept_as_index_arrays(tmp_path: Path) -> None:
    """The second time nobody is asked for a vocabulary; a damaged file is made anew."""
    asked: list[str] = []

    def vocabulary(name: str, *pieces: bytes | None) -> TokenBytes:
        asked.append(name)
        return TokenBytes(pieces)

    def shared() -> list[list[int]]:
        found = cached_shared_vocabulary(
            tmp_path / "new",
            ("a" * 64, "b" * 64),
            lambda: vocabulary("source", b"x", None, b"y"),
            lambda: vocabulary("target", b"y", b"z", b"x"),
        )
        assert found.source_ids.dtype == np.int32
        assert (found.source_tokens, found.target_tokens) == (2, 3)
        return [found.source_ids.tolist(), found.target_ids.tolist()]

    assert shared() == [[0, 2], [2, 0]]
    assert shared() == [[0, 2], [2, 0]]
    assert asked == ["source", "target"]
    (file,) = (tmp_path / "new").iterdir()
    assert file.stat().st_size < 1000
    file.write_bytes(file.read_bytes()[:-5])
    assert shared() == [[0, 2], [2, 0]]
    assert asked == ["source", "target"] * 2
