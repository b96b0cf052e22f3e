"""What a run says: accuracy with intervals, paired tests between arms, tokens, bytes, seconds."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from avp_agents.errors import ConfigurationError
from avp_agents.evals.statistics import holm, mcnemar_p, wilson

PHASES = ("prefill", "latent", "decode")


@dataclass(frozen=True)
class ArmSummary:
    """One arm.

    Attributes:
        name: The arm.
        answers: How many answers it gave.
        right: How many of them are right.
        interval: Wilson's interval of the accuracy, 95 %.
        tokens: Mean tokens per answer: read (prefilled, reused ones not counted), latent, decoded.
        bytes: Mean bytes handed over.
        seconds: Median seconds per answer and phase, researchers and solver apart.
    """

    name: str
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


@dataclass(frozen=True)
class Comparison:
    """Two arms on the same problems and seeds.

    Attributes:
        one, other: The arms.
        only_one, only_other: Problems that one of them alone got right.
        p: McNemar's exact test, two-sided.
        p_holm: The same, adjusted for all comparisons of the run.
        same_answers: Pairs whose texts are equal.
    """

    one: str
    other: str
    only_one: int
    only_other: int
    p: float
    p_holm: float
    same_answers: int

    @property
    def decided(self) -> bool:
        """Whether the difference is significant at 5 %."""
        return self.p_holm < 0.05


@dataclass(frozen=True)
class Summary:
    """A whole run."""

    about: dict[str, Any]
    arms: tuple[ArmSummary, ...]
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        arms = [asdict(arm) | {"accuracy": arm.accuracy} for arm in self.arms]
        return {"about": self.about, "arms": arms, "comparisons": [asdict(c) for c in self.comparisons]}


def summarise(folder: Path) -> Summary:
    """Read a run.

    Raises:
        ConfigurationError: The folder holds no run, or one without answers.
    """
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        answers = _lines(folder / "answers.jsonl")
        times = _lines(folder / "times.jsonl")
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigurationError(f"{folder} holds no run of `avp-agents bench quality`: {error}") from None
    if not answers:
        raise ConfigurationError(f"The run in {folder} has no answers yet.")
    by_arm: dict[str, dict[tuple[str, int], dict[str, Any]]] = defaultdict(dict)
    for row in answers:
        by_arm[row["arm"]][(row["item"], row["seed"])] = row
    stages: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    for row in times:
        stages[row["arm"]].append(row["stages"])
    names = [arm["name"] for arm in about["arms"] if arm["name"] in by_arm]
    arms = tuple(_arm(name, list(by_arm[name].values()), stages[name]) for name in names)
    modes = {arm["name"]: arm["mode"] for arm in about["arms"]}
    return Summary(about, arms, _comparisons(names, modes, by_arm))


def _arm(name: str, rows: list[dict[str, Any]], stages: list[list[dict[str, Any]]]) -> ArmSummary:
    right = sum(row["right"] for row in rows)
    tokens = {kind: statistics.fmean(row["tokens"][kind] for row in rows) for kind in ("read", "latent", "decoded")}
    seconds = {
        who: {phase: statistics.median(_seconds(answer, phase, solver) for answer in stages) for phase in PHASES}
        for who, solver in (("researchers", False), ("solver", True))
    }
    handed = statistics.fmean(row["bytes"] for row in rows)
    return ArmSummary(name, len(rows), right, wilson(right, len(rows)), tokens, handed, seconds)


def _seconds(stages: list[dict[str, Any]], phase: str, solver: bool) -> float:
    return sum(stage[phase] for stage in stages if (stage["role"] == "solver") is solver)


def _comparisons(
    names: list[str], modes: dict[str, str], by_arm: dict[str, dict[tuple[str, int], dict[str, Any]]]
) -> tuple[Comparison, ...]:
    """Whatever hands over contexts against everything else; each further comparison would cost the others power."""
    latent = [name for name in names if modes[name] in ("latent", "projection")]
    found: dict[str, tuple[str, str, int, int, float, int]] = {}
    for one, other in combinations(latent + [name for name in names if name not in latent], 2):
        if latent and one not in latent:
            continue
        pairs = [(by_arm[one][key], by_arm[other][key]) for key in by_arm[one] if key in by_arm[other]]
        verdicts = [(a["right"], b["right"]) for a, b in pairs]
        p = mcnemar_p([a for a, _ in verdicts], [b for _, b in verdicts])
        only_one, only_other = (sum(a and not b for a, b in verdicts), sum(b and not a for a, b in verdicts))
        same = sum(a["answer"] == b["answer"] for a, b in pairs)
        found[f"{one} / {other}"] = (one, other, only_one, only_other, p, same)
    adjusted = holm({name: values[4] for name, values in found.items()})
    return tuple(
        Comparison(one, other, only_one, only_other, p, adjusted[name], same)
        for name, (one, other, only_one, only_other, p, same) in found.items()
    )


def _lines(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
