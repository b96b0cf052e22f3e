"""An answer of a reasoning model is split into what it reasons and its text, however its pieces are cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avp_agents.answer.builder import ReasoningSplit

Begins = Literal["start", "reasoning", "text"]


def split(begins: Begins, *pieces: str) -> tuple[str, str]:
    """Reasoning and text that came out piece by piece."""
    splitter = ReasoningSplit(begins)
    out = [splitter.feed(piece, last=i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    reasoning, text = ("".join(parts) for parts in zip(*out, strict=True))
    assert (splitter.reasoning, splitter.text) == (reasoning, text)
    return reasoning, text


@pytest.mark.parametrize(
    ("begins", "answer", "expected"),
    [
        ("start", "<think>\n24 * 17 = 408\n</think>\n\n411", ("24 * 17 = 408", "411")),
        ("start", "\n<think>a\n\nb</think>c", ("a\n\nb", "c")),
        ("start", "<think>\n\n</think>\n\n411", ("", "411")),
        ("start", "411", ("", "411")),
        ("start", "  411\n", ("", "  411\n")),
        ("start", "<thi", ("", "<thi")),
        ("start", "The tag <think>a</think> is text here.", ("", "The tag <think>a</think> is text here.")),
        ("start", "<think>never closed", ("never closed", "")),
        ("start", "<think>a</think>", ("a", "")),
        ("start", "<think>a</think>b</think>c", ("a", "b</think>c")),
        ("reasoning", "\na < b\n</think>\n\n411", ("a < b", "411")),
        ("reasoning", "cut in the marker </thi", ("cut in the marker </thi", "")),
        ("reasoning", "</think>411", ("", "411")),
        ("text", "<think>a</think>b", ("", "<think>a</think>b")),
        ("start", "", ("", "")),
    ],
)
def test_it_is_split_at_the_markers(begins: Begins, answer: str, expected: tuple[str, str]) -> None:
    assert split(begins, answer) == expected
    assert split(begins, *answer, "") == expected


@given(
    begins=st.sampled_from(["start", "reasoning", "text"]),
    answer=st.lists(st.sampled_from(["<think>", "</think>", "\n", "<", "</", "think", ">", "a", " "]), max_size=12).map(
        "".join
    ),
    cuts=st.lists(st.integers(0, 60), max_size=6),
)
def test_the_cuts_between_pieces_do_not_matter(begins: Begins, answer: str, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(answer)) for cut in cuts), len(answer)]
    pieces = [answer[start:stop] for start, stop in pairwise(edges)]

    assert split(begins, *pieces) == split(begins, answer)


def test_text_is_given_out_at_once() -> None:
    splitter = ReasoningSplit("start")

    assert splitter.feed("<think>one two") == ("one two", "")
    assert splitter.feed(" three\n") == (" three", "")
    assert splitter.feed("four</") == ("\nfour", "")
    assert splitter.feed("think>\n") == ("", "")
    assert splitter.feed("five") == ("", "five")
    assert splitter.feed(" six") == ("", " six")


def test_pieces_before_the_text_are_counted() -> None:
    thinking, plain = ReasoningSplit("start"), ReasoningSplit("start")
    for piece in ("<think>", "a", "</think>", "\n", "b", "c"):
        thinking.feed(piece)
    for piece in ("\n", "<", "b>", "c"):
        plain.feed(piece)

    assert (thinking.pieces, plain.pieces) == (4, 0)
