"""What came out of a run: accuracy with intervals, paired tests between arms, tokens, bytes, seconds."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from avp_agents.errors import ConfigurationError
from avp_bench.quality.ablation import Ablation, ablations
from avp_bench.quality.run_folder import read_lines
from avp_bench.quality.scores import Difference, Scores, difference, interval, scores_of
from avp_bench.statistics import holm

PHASES = ("prefill", "latent", "decode")
HANDS_OVER = ("latent", "projection")
"""Modes that hand over contexts; what they are compared with is the question of a run."""

Rows = dict[tuple[str, int], dict[str, Any]]
"""An arm's answers by problem and seed."""


@dataclass(frozen=True)
class ArmSummary:
    """One arm.

    Attributes:
        name, mode, team, steps: The arm.
        is_baseline: It has the first value of every option.
        answers: How many answers it gave.
        right: How many of them are right.
        interval: Wilson's interval of the accuracy, 95 %; see `avp_bench.quality.scores` on several seeds.
        tokens: Mean tokens per answer: read (prefilled, reused ones not counted), latent, decoded.
        bytes: Mean bytes handed over.
        seconds: Median seconds per answer and phase, researchers and solver apart.
    """

    name: str
    mode: str
    team: str
    steps: int
    is_baseline: bool
    answers: int
    right: int
    interval: tuple[float, float]
    tokens: dict[str, float]
    bytes: float
    seconds: dict[str, dict[str, float]]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.answers if self.answers else 0.0

    @property
    def total_seconds(self) -> float:
        """Median seconds of all phases together."""
        return sum(sum(phases.values()) for phases in self.seconds.values())

    @property
    def total_tokens(self) -> float:
        """Mean tokens and latent steps per answer."""
        return sum(self.tokens.values())


@dataclass(frozen=True)
class ArmComparison:
    """Two arms on the same problems and seeds.

    Attributes:
        one, other: The arms.
        only_one, only_other: Problems that one of them alone got right.
        p: McNemar's exact test, two-sided.
        p_holm: The same, adjusted for all comparisons of the run.
        pairs: Pairs of answers.
        same_answers: Those whose texts are equal.
    """

    one: str
    other: str
    only_one: int
    only_other: int
    p: float
    p_holm: float
    pairs: int
    same_answers: int

    @property
    def decided(self) -> bool:
        """Whether the difference is significant at 5 %."""
        return self.p_holm < 0.05


@dataclass(frozen=True)
class Speed:
    """A latent arm's seconds beside those of the text arm of the same team.

    Attributes:
        latent, text: The arms.
        ratio: Text's seconds per latent's.
        limit: What the ratio would be if nothing but the answer's own decoding were left.
    """

    latent: str
    text: str
    ratio: float
    limit: float


@dataclass(frozen=True)
class Summary:
    """A whole run.

    Attributes:
        about: What was run, as in ``run.json``.
        arms: In the run's order.
        comparisons: Whatever hands over contexts against every other mode of its team.
        ablations: Variants against their baselines.
        speeds: One per team that has a latent and a text arm.
        verdicts: Score by arm and problem.
    """

    about: dict[str, Any]
    arms: tuple[ArmSummary, ...]
    comparisons: tuple[ArmComparison, ...]
    ablations: tuple[Ablation, ...]
    speeds: tuple[Speed, ...]
    verdicts: Mapping[str, Scores]

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "about": self.about,
            "arms": [asdict(arm) | {"accuracy": arm.accuracy} for arm in self.arms],
            "comparisons": [asdict(comparison) | {"decided": comparison.decided} for comparison in self.comparisons],
            "ablations": [asdict(one) | {"is_better": one.is_better, "verdict": one.verdict} for one in self.ablations],
            "speeds": [asdict(speed) for speed in self.speeds],
        }


def summarise(folder: Path) -> Summary:
    """Read a run.

    Raises:
        ConfigurationError: The folder holds no run, or one without answers.
    """
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        answers, times = read_lines(folder / "answers.jsonl"), read_lines(folder / "times.jsonl")
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigurationError(f"{folder} holds no run of `avp-agents bench quality`: {error}") from None
    if not answers:
        raise ConfigurationError(f"The run in {folder} has no answers yet.")
    by_arm: dict[str, Rows] = defaultdict(dict)
    for row in answers:
        by_arm[row["arm"]][(row["item"], row["seed"])] = row
    stages: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    for row in times:
        stages[row["arm"]].append(row["stages"])
    verdicts = {name: scores_of(rows.values()) for name, rows in by_arm.items()}
    baselines: dict[tuple[str, str], str] = {}
    for arm in about["arms"]:
        baselines.setdefault((arm["mode"], arm["team"]), arm["name"])
    arms = tuple(
        _arm(arm, arm["name"] in baselines.values(), list(by_arm[arm["name"]].values()), stages[arm["name"]])
        for arm in about["arms"]
        if arm["name"] in by_arm
    )
    return Summary(
        about,
        arms,
        _comparisons(arms, by_arm, verdicts),
        ablations(about["arms"], about["items"], verdicts),
        _speeds(arms),
        verdicts,
    )


def _arm(
    arm: Mapping[str, Any], is_baseline: bool, rows: list[dict[str, Any]], stages: list[list[dict[str, Any]]]
) -> ArmSummary:
    return ArmSummary(
        name=arm["name"],
        mode=arm["mode"],
        team=arm["team"],
        steps=arm["steps"],
        is_baseline=is_baseline,
        answers=len(rows),
        right=sum(row["right"] for row in rows),
        interval=interval(scores_of(rows)),
        tokens={kind: statistics.fmean(row["tokens"][kind] for row in rows) for kind in ("read", "latent", "decoded")},
        bytes=statistics.fmean(row["bytes"] for row in rows),
        seconds={
            who: {phase: statistics.median(_seconds(answer, phase, solver) for answer in stages) for phase in PHASES}
            for who, solver in (("researchers", False), ("solver", True))
        },
    )


def _seconds(stages: list[dict[str, Any]], phase: str, solver: bool) -> float:
    return sum(stage[phase] for stage in stages if (stage["role"] == "solver") is solver)


def _comparisons(
    arms: tuple[ArmSummary, ...], by_arm: Mapping[str, Rows], verdicts: Mapping[str, Scores]
) -> tuple[ArmComparison, ...]:
    """Between baselines only; each further comparison would cost the others power."""
    baselines = sorted((arm for arm in arms if arm.is_baseline), key=lambda arm: arm.mode not in HANDS_OVER)
    found: dict[str, tuple[ArmSummary, ArmSummary, Difference]] = {}
    for one, other in combinations(baselines, 2):
        if one.mode in HANDS_OVER and (one.team == other.team or other.mode == "direct"):
            found[f"{one.name} / {other.name}"] = (one, other, difference(verdicts[one.name], verdicts[other.name]))
    adjusted = holm({name: differing.p for name, (_, _, differing) in found.items()})
    return tuple(
        ArmComparison(
            one.name, other.name, differing.only_one, differing.only_other, differing.p, adjusted[name],
            *_equal_answers(by_arm[one.name], by_arm[other.name]),
        )
        for name, (one, other, differing) in found.items()
    )  # fmt: skip


def _equal_answers(one: Rows, other: Rows) -> tuple[int, int]:
    """Pairs of answers, and how many of them are equal texts."""
    both = one.keys() & other.keys()
    return len(both), sum(one[key]["answer"] == other[key]["answer"] for key in both)


def _speeds(arms: tuple[ArmSummary, ...]) -> tuple[Speed, ...]:
    speeds: list[Speed] = []
    for latent in arms:
        text = next((arm for arm in arms if arm.mode == "text" and arm.team == latent.team), None)
        if latent.mode != "latent" or not latent.is_baseline or text is None:
            continue
        decoding = latent.seconds["solver"]["decode"]
        if latent.total_seconds and decoding:
            ratio, limit = text.total_seconds / latent.total_seconds, text.total_seconds / decoding
            speeds.append(Speed(latent.name, text.name, ratio, limit))
    return tuple(speeds)
