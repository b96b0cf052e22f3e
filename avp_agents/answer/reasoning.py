"""A reasoning model's answer, split while it is decoded: what is between ``<think>`` and ``</think>``, and the text.

A model reasons first, or not at all: markers further on in an answer are text. Line breaks around the markers belong to
neither part; templates write them back when they render the reasoning of an earlier turn.
"""

from __future__ import annotations

from typing import Literal

OPENING, CLOSING = "<think>", "</think>"

Place = Literal["start", "reasoning", "gap", "text"]
"""Before anything but white space; between the markers; in the line breaks behind them; in the text."""


class ReasoningSplit:
    """Splits one answer, piece by piece. What was given out is never taken back.

    Attributes:
        reasoning, text: Everything given out so far.
        pieces: How many of the pieces fed so far came before the text; 0 where the model does not reason.

    Args:
        begins: Where the answer begins: ``"reasoning"`` where the prompt ends in the opening marker, ``"start"`` where
            the model may write that, ``"text"`` where it has no such marker.

    Example:
        >>> split = ReasoningSplit("start")
        >>> split.feed("<think>\\n24 * 17 = 408\\n</thi"), split.feed("nk>\\n\\n411", last=True)
        (('24 * 17 = 408', ''), ('', '411'))
    """

    def __init__(self, begins: Literal["start", "reasoning", "text"]) -> None:
        self.reasoning = self.text = ""
        self.pieces = 0
        self._place: Place = begins
        self._held = ""

    def feed(self, piece: str, *, last: bool = False) -> tuple[str, str]:
        """Take the next piece; returns the reasoning and the text, each perhaps empty, that have become certain."""
        self._held += piece
        if self._place == "start":
            self._look_for_opening(last)
        reasoning = self._take_reasoning(last) if self._place == "reasoning" else ""
        if self._place == "gap":
            self._held = self._held.lstrip("\n")
            self._place = "text" if self._held else "gap"
        text = self._take_all() if self._place == "text" else ""
        self.reasoning += reasoning
        self.text += text
        self.pieces += self._place != "text"
        return reasoning, text

    def _look_for_opening(self, last: bool) -> None:
        begun = self._held.lstrip()
        if begun.startswith(OPENING):
            self._place, self._held = "reasoning", begun[len(OPENING) :]
        elif last or not OPENING.startswith(begun):
            self._place, self.pieces = "text", 0

    def _take_reasoning(self, last: bool) -> str:
        if not self.reasoning:
            self._held = self._held.lstrip("\n")
        reasoning, closed, rest = self._held.partition(CLOSING)
        if closed:
            self._place, self._held = "gap", rest
            return reasoning.rstrip("\n")
        if last:
            return self._take_all().rstrip("\n")
        certain = self._held[: len(self._held) - _begun(self._held, CLOSING)].rstrip("\n")
        self._held = self._held[len(certain) :]
        return certain

    def _take_all(self) -> str:
        taken, self._held = self._held, ""
        return taken


def _begun(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker`."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-n:])), 0)
