"""What the arms of a run got right, problem by problem: the unit of every interval and every test.

With several seeds a problem's answers are not independent, so they count as one problem: its score is the share of
seeds with a right answer, and of two arms the one with the higher score has it right alone. With one seed that is
McNemar's exact test, and Wilson's interval.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from avp_bench.statistics import sign_test_p, wilson

Scores = Mapping[str, Fraction]
"""Share of right answers by problem."""


def scores_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Fraction]:
    """Scores of one arm's answers."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        verdicts[row["item"]].append(row["right"])
    return {item: Fraction(sum(given), len(given)) for item, given in verdicts.items()}


def interval(scores: Scores) -> tuple[float, float]:
    """Wilson's interval of the accuracy, 95 %."""
    return wilson(float(sum(scores.values())), len(scores))


@dataclass(frozen=True)
class Difference:
    """Two arms on the same problems.

    Attributes:
        only_one, only_other: Problems that one of them alone got right (or more often than the other).
    """

    only_one: int
    only_other: int

    @property
    def p(self) -> float:
        """McNemar's exact test, two-sided."""
        return sign_test_p(self.only_one, self.only_other)


def difference(one: Scores, other: Scores) -> Difference:
    """How two arms differ on the problems that both have answered."""
    both = one.keys() & other.keys()
    return Difference(sum(one[i] > other[i] for i in both), sum(other[i] > one[i] for i in both))
