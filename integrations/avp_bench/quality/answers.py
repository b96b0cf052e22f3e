"""What an answer says: its code, its number, its phrase."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from fractions import Fraction

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_UNIT = re.compile(r"(\d)\s+[A-Za-z]{2,}(?:\s+[A-Za-z]+)*\.?\s*$")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")


def code_of(answer: str) -> str:
    """The last fenced block, an unclosed one included; without any fence the answer as it is, indentation kept."""
    blocks = _FENCE.findall(answer)
    return blocks[-1] if blocks else answer


def boxed_or_last(answer: str) -> str:
    """What the last ``\\boxed{...}`` holds, braces balanced; else the last number; else nothing."""
    start = answer.rfind("\\boxed{")
    if start >= 0:
        return _balanced(answer[start + len("\\boxed{") :])
    numbers = _NUMBER.findall(answer)
    return numbers[-1] if numbers else ""


def _balanced(text: str) -> str:
    depth = 1
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:index]
    return text


def numbers_equal(one: str, other: str) -> bool:
    """Whether two answers are the same number, or where one is none, the same text but for spaces.

    A percentage may stand for its number as well as for its share: references write 50 % as ``50`` and as ``1/2``.
    """
    first, second = _readings(one), _readings(other)
    if first and second:
        return bool(first & second)
    return bool(one.strip()) and _plain(one) == _plain(other)


def _readings(text: str) -> set[Fraction]:
    """``72``, ``72.00``, ``1,200``, ``$5``, ``5 hours``, ``50\\%``, ``1/2`` and ``\\frac{1}{2}`` as numbers."""
    plain = _FRACTION.sub(r"\1/\2", _plain(_UNIT.sub(r"\1", text))).rstrip(".")
    try:
        number = Fraction(plain.rstrip("%"))
    except (ValueError, ZeroDivisionError):
        return set()
    return {number, number / 100} if plain.endswith("%") else {number}


def _plain(text: str) -> str:
    return re.sub(r"\\[!,;: ]|\\text\{[^{}]*\}|\\(?:left|right)|[\s,$]|\\(?=[%$])", "", text)


def exact_match(answer: str, accepted: Iterable[str]) -> bool:
    """HotpotQA's exact match of the first line: case, punctuation and articles do not count."""
    lines = [line for line in answer.strip().splitlines() if line.strip()]
    return bool(lines) and _normal(lines[0]) in {_normal(text) for text in accepted}


def mentions(answer: str, accepted: Iterable[str]) -> bool:
    """Whether the answer holds one of the accepted ones as whole words."""
    said = f" {_normal(answer)} "
    return any(f" {_normal(text)} " in said for text in accepted)


def _normal(text: str) -> str:
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())
