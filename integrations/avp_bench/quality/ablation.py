"""Should a default change? One half of the problems chooses among the variants, the other one, held out, decides.

A variant is an arm that differs from its mode's baseline in one option. The best of them on the choosing half is the
candidate. It replaces the baseline only where it is better on the held-out half at p < 0.05: McNemar's exact test, with
Holm's correction over all variants. Otherwise it is undecided, and the default stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from avp_bench.quality.scores import Scores, difference
from avp_bench.statistics import holm

ALPHA = 0.05


@dataclass(frozen=True)
class Variant:
    """One variant against the baseline.

    Attributes:
        name: The arm.
        choosing, held_out: Right answers on either half, the baseline's behind them.
        p, p_holm: Of the difference on the held-out half.
    """

    name: str
    choosing: tuple[float, float]
    held_out: tuple[float, float]
    p: float
    p_holm: float


@dataclass(frozen=True)
class Ablation:
    """The variants of one mode in one team.

    Attributes:
        baseline: The arm that they differ from.
        problems: How many problems either half has.
        variants: All of them.
        candidate: The best one on the choosing half; None where none beats the baseline there.
    """

    baseline: str
    problems: tuple[int, int]
    variants: tuple[Variant, ...]
    candidate: str | None

    @property
    def is_better(self) -> bool:
        """Whether the candidate is better on problems that did not choose it, by more than chance."""
        return any(
            v.name == self.candidate and v.held_out[0] > v.held_out[1] and v.p_holm < ALPHA for v in self.variants
        )

    @property
    def verdict(self) -> str:
        """What follows, in words."""
        if self.candidate is None:
            return f"No variant beats {self.baseline} on the half that chooses: it stays."
        if self.is_better:
            return f"{self.candidate} is better than {self.baseline} on the held-out half."
        return (
            f"Undecided: {self.candidate} was chosen, but the held-out half does not confirm it. {self.baseline} stays."
        )


def ablations(
    arms: Sequence[Mapping[str, Any]], items: Sequence[str], scores: Mapping[str, Scores]
) -> tuple[Ablation, ...]:
    """One for every baseline of a run that has variants.

    Args:
        arms: The run's arms as ``run.json`` has them; a baseline stands before its variants.
        items: Ids of the run's problems in order; every other one is held out.
        scores: What the arms got right.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for arm in arms:
        groups.setdefault((arm["mode"], arm["team"]), []).append(arm["name"])
    found: list[Ablation] = []
    for baseline, *variants in groups.values():
        answered = [name for name in variants if name in scores]
        if answered and baseline in scores:
            found.append(_ablation(baseline, answered, items, scores))
    return tuple(found)


def _ablation(baseline: str, names: Sequence[str], items: Sequence[str], scores: Mapping[str, Scores]) -> Ablation:
    answered = [item for item in items if all(item in scores[name] for name in (baseline, *names))]
    choosing, held_out = answered[::2], answered[1::2]

    def right(name: str, half: Sequence[str]) -> float:
        return float(sum(scores[name][item] for item in half))

    def p(name: str) -> float:
        one, other = ({item: scores[arm][item] for item in held_out} for arm in (name, baseline))
        return difference(one, other).p

    p_values = {name: p(name) for name in names}
    adjusted = holm(p_values)
    variants = tuple(
        Variant(
            name,
            (right(name, choosing), right(baseline, choosing)),
            (right(name, held_out), right(baseline, held_out)),
            p_values[name],
            adjusted[name],
        )
        for name in names
    )
    best = max(variants, key=lambda variant: variant.choosing[0])
    candidate = best.name if best.choosing[0] > best.choosing[1] else None
    return Ablation(baseline, (len(choosing), len(held_out)), variants, candidate)
