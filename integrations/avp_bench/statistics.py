"""Statistics for paired verdicts: intervals, exact tests, and the correction for asking several questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Z95 = 1.959963984540054


def wilson(right: float, of: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, by default at 95 %."""
    if of == 0:
        return 0.0, 1.0
    share = right / of
    centre = share + z * z / (2 * of)
    spread = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    scale = 1 + z * z / of
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def sign_test_p(only_one: int, only_other: int) -> float:
    """Two-sided exact p that so many pairs differ in one direction and so many in the other."""
    differing = only_one + only_other
    tail = sum(math.comb(differing, i) for i in range(min(only_one, only_other) + 1))
    return min(1.0, 2 * tail / 2**differing)


def mcnemar_p(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Two-sided exact p of McNemar's test: a sign test on the pairs that differ."""
    pairs = list(zip(one, other, strict=True))
    return sign_test_p(sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p of each of several tests."""
    adjusted: dict[str, float] = {}
    worst = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = worst
    return adjusted
