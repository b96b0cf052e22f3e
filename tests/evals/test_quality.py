"""The quality bench: scoring, arms, resuming, statistics, and the report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from avp_agents import LatentEngine
from avp_agents.errors import ConfigurationError
from avp_agents.evals.quality.answers import boxed_or_last, code_of, exact_match, mentions, numbers_equal
from avp_agents.evals.quality.arms import TEAMS, Arm, Bench, arms_named
from avp_agents.evals.quality.report import report_html
from avp_agents.evals.quality.run import Plan, RunFolder, run
from avp_agents.evals.quality.summary import summarise
from avp_agents.evals.quality.tasks import Item, Task, human_eval_program, task_named
from avp_agents.evals.sandbox import sandboxed
from avp_agents.store import MemoryStore

PROBLEM = {
    "prompt": 'from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n    """Sum."""\n',
    "entry_point": "total",
    "test": "def check(candidate):\n    assert candidate([1, 2, 3]) == 6\n",
}
SHORT = Task(
    "short", "Answer with one word.", 4, 6, False, None, lambda index, row: Item(str(index), row["q"], row),
    lambda item, answer, run: mentions(answer, item.reference["answers"]), "",
)  # fmt: skip
ITEMS = [SHORT.item(i, {"q": f"What is {i} plus {i}?", "answers": [str(2 * i)]}) for i in range(3)]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("    return sum(numbers)", True),
        ("```python\ndef total(numbers: List[int]) -> int:\n    return sum(numbers)\n```", True),
        ("Here it is:\n```python\ndef total(numbers):\n    return sum(numbers)\n", True),
        ("    return 0", False),
        ("I do not know.", False),
    ],
    ids=["body", "function without imports", "open fence", "wrong", "no code"],
)
def test_scoring_code_keeps_indentation_and_imports(answer: str, right: bool) -> None:
    assert sandboxed(human_eval_program(PROBLEM, answer)).passed is right


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("so it is \\boxed{72.00}", "72", True),
        ("\\boxed{\\frac{1}{2}}", "0.5", True),
        ("first 3, then 1,200 dollars", "1200", True),
        ("\\boxed{x^{2}+1}", "x^{2} + 1", True),
        ("\\boxed{50\\%}", "1/2", True),
        ("\\boxed{12}", "1", False),
        ("no number", "1", False),
    ],
)
def test_numbers_are_compared_as_numbers(answer: str, reference: str, right: bool) -> None:
    assert numbers_equal(boxed_or_last(answer), reference) is right


def test_phrases_are_compared_without_articles_and_case() -> None:
    assert exact_match("The  Red House.\nBecause", ["red house"])
    assert not exact_match("a red house in Rome", ["red house"])
    assert mentions("It is green, I think", ["Green"])
    assert not mentions("evergreen", ["green"])
    assert code_of("```\na\n```\n```python\nb\n```") == "b\n"


def test_options_that_are_given_several_times_make_one_arm_each() -> None:
    arms = arms_named(
        ["latent", "text"], steps=[0, 20], methods=[None], strategies=["replay"], renormalise=[None],
        latent_temperatures=[1.0],
    )  # fmt: skip
    assert [arm.name for arm in arms] == ["latent[steps=0]", "latent[steps=20]", "text"]
    with pytest.raises(ConfigurationError, match="Unknown mode"):
        arms_named(["telepathy"], steps=[1], methods=[], strategies=[], renormalise=[], latent_temperatures=[])


def test_bad_data_is_named(tmp_path: Path) -> None:
    task = task_named("gsm8k")
    with pytest.raises(ConfigurationError, match="no file"):
        task.load(tmp_path / "missing.jsonl", None)
    for text, message in (("{}\n", "Row 1 has no field"), ("{\n", "line 1 is not JSON"), ("\n", "no gsm8k problem")):
        file = tmp_path / "data.jsonl"
        file.write_text(text)
        with pytest.raises(ConfigurationError, match=message):
            task.load(file, None)
    assert len(task_named("comprehension").load(None, None)) >= 60


@pytest.fixture(scope="module")
def engine(smollm2_path: Path) -> Iterator[LatentEngine]:
    with LatentEngine.from_pretrained(
        str(smollm2_path), dtype="float32", store=MemoryStore(), batch_invariant=True
    ) as opened:
        yield opened


def go(engine: LatentEngine, folder: Path, arms: list[Arm], team: str = "pair", stop_after: int | None = None) -> None:
    """A run; killed, so to speak, after so many answers."""
    plan = Plan(arms, ITEMS, [0], {"task": "short", "model": "tiny"})
    bench = Bench(engine, SHORT, TEAMS[team])

    def report(done: int, of: int) -> None:
        if stop_after is not None and done >= stop_after:
            raise KeyboardInterrupt

    run(bench, plan, RunFolder(folder, plan), run_program=sandboxed, concurrency=4, report=report)


def test_a_run_that_was_killed_goes_on_and_ends_the_same(engine: LatentEngine, tmp_path: Path) -> None:
    """Twice killed, once in the middle of a line: the answers are those of a run in one go, byte for byte."""
    arms = [Arm(mode, mode, steps=3) for mode in ("direct", "latent", "text", "prefill", "shuffled", "text-capped")]
    go(engine, tmp_path / "whole", arms)
    for after in (4, 9):
        with pytest.raises(KeyboardInterrupt):
            go(engine, tmp_path / "killed", arms, stop_after=after)
        with (tmp_path / "killed" / "answers.jsonl").open("a") as lines:
            lines.write('{"arm": "dir')
    go(engine, tmp_path / "killed", arms)

    whole, killed = ((tmp_path / name / "answers.jsonl").read_text() for name in ("whole", "killed"))
    assert killed == whole
    with pytest.raises(ConfigurationError, match="something else"):
        go(engine, tmp_path / "whole", arms[:1])

    summary = summarise(tmp_path / "whole")
    cost = {arm.name: arm.tokens for arm in summary.arms}
    assert cost["latent"]["latent"] == 3
    assert cost["prefill"]["latent"] == cost["text"]["latent"] == 0
    assert cost["text"]["decoded"] > cost["text-capped"]["decoded"] > cost["latent"]["decoded"]
    assert {c.one for c in summary.comparisons} == {"latent"}
    page = report_html(summary)
    assert page.count("<svg") >= 3
    assert not re.search(r"""(src|href)=["'](?!#)|@import|url\((?!#)""", page), "nothing is fetched"


@pytest.mark.parametrize("team", ["chain", "fan-in"])
def test_larger_teams_answer_too(engine: LatentEngine, tmp_path: Path, team: str) -> None:
    go(engine, tmp_path, [Arm("latent", "latent", steps=2), Arm("text", "text")], team)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {row["tokens"]["latent"] for row in rows if row["arm"] == "latent"} == {6}
    assert {row["handoff"] for row in rows} == {"kv", "text"}
