"""Running all arms on all problems: batched through the engine, and resumable wherever it was killed.

A run is a folder:

    run.json         what was run: a resumed run has to agree with it
    answers.jsonl    one line per arm, problem and seed: the answer, whether it is right, what it took
    times.jsonl      the seconds of each, apart, since they differ from run to run

Lines are appended as answers arrive, and put in order when the run ends: a run that was killed and resumed leaves the
same answers as one that was not, where the engine is batch-invariant.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from avp_agents.errors import ConfigurationError
from avp_agents.evals.quality.arms import Answer, Arm, Bench
from avp_agents.evals.quality.tasks import Item
from avp_agents.evals.sandbox import RunProgram

Key = tuple[str, str, int]
"""Arm, problem and seed."""


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        arms: The arms.
        items: The problems.
        seeds: Seeds of the run; each problem gets one of its own from each, the same in all arms.
        about: What else must be equal for a run to be resumed: model, task, temperature, ...
    """

    arms: Sequence[Arm]
    items: Sequence[Item]
    seeds: Sequence[int]
    about: dict[str, Any]

    def in_order(self) -> list[Key]:
        """All of it, problem by problem, so that arms of one problem run beside each other and share prefixes."""
        return [(arm.name, item.id, seed) for seed in self.seeds for item in self.items for arm in self.arms]

    def described(self) -> dict[str, Any]:
        """As JSON data."""
        arms = [asdict(arm) for arm in self.arms]
        return self.about | {"arms": arms, "items": [item.id for item in self.items], "seeds": list(self.seeds)}


class RunFolder:
    """The files of one run.

    Args:
        path: The folder; made where it does not exist.
        plan: What is run.

    Raises:
        ConfigurationError: The folder holds a run of something else.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self._plan = path, plan
        self._answers, self._times = path / "answers.jsonl", path / "times.jsonl"
        self._lock = threading.Lock()
        path.mkdir(parents=True, exist_ok=True)
        described = json.dumps(plan.described(), indent=1, sort_keys=True, ensure_ascii=False)
        about = path / "run.json"
        if about.exists():
            if about.read_text(encoding="utf-8") != described:
                raise ConfigurationError(f"{path} holds a run of something else; choose another --out.")
        else:
            _write_whole(about, described)

    def done(self) -> set[Key]:
        """What was answered already; a line that was cut off by a kill is dropped."""
        answers, times = _read_lines(self._answers), _read_lines(self._times)
        both = {_key(row) for row in answers} & {_key(row) for row in times}
        self._rewrite(answers, times, both)
        return both

    def add(self, answer: dict[str, Any], times: dict[str, Any]) -> None:
        """Append one result."""
        with self._lock:
            for file, row in ((self._answers, answer), (self._times, times)):
                with file.open("a", encoding="utf-8") as lines:
                    _append(lines, row)

    def finish(self) -> None:
        """Put the lines in the plan's order."""
        answers, times = _read_lines(self._answers), _read_lines(self._times)
        self._rewrite(answers, times, set(self._plan.in_order()))

    def _rewrite(self, answers: list[dict[str, Any]], times: list[dict[str, Any]], kept: set[Key]) -> None:
        order = {key: index for index, key in enumerate(self._plan.in_order())}
        for file, rows in ((self._answers, answers), (self._times, times)):
            by_key = {_key(row): row for row in rows if _key(row) in kept and _key(row) in order}
            ordered = sorted(by_key.values(), key=lambda row: order[_key(row)])
            _write_whole(file, "".join(_line(row) for row in ordered))


def run(
    bench: Bench,
    plan: Plan,
    folder: RunFolder,
    *,
    run_program: RunProgram,
    concurrency: int,
    report: Callable[[int, int], None],
) -> None:
    """Answer what is not answered yet.

    Args:
        bench: Engine and task.
        plan: What to run.
        folder: Where results go, and what of them is there.
        run_program: Runs code answers.
        concurrency: Answers that are worked on at once.
        report: Told how many answers of how many are there.
    """
    done = folder.done()
    arms = {arm.name: arm for arm in plan.arms}
    positions = {item.id: index for index, item in enumerate(plan.items)}
    todo = [key for key in plan.in_order() if key not in done]
    finished = len(done)
    report(finished, finished + len(todo))

    def answer(key: Key) -> None:
        name, item_id, seed = key
        index = positions[item_id]
        item, other = plan.items[index], plan.items[(index + 1) % len(plan.items)]
        made = bench.answer(arms[name], item, other, _seed_of(seed, index))
        right = bench.task.right(item, made.text, run_program)
        folder.add(*_rows(key, made, right))

    with ThreadPoolExecutor(concurrency) as pool:
        for future in _in_flight(pool, answer, todo, 2 * concurrency):
            future.result()
            finished += 1
            report(finished, len(done) + len(todo))
    folder.finish()


def _in_flight(
    pool: ThreadPoolExecutor, work: Callable[[Key], None], todo: Sequence[Key], most: int
) -> Iterator[Future[None]]:
    """Submit a few at a time, so that an error ends the run soon."""
    waiting: set[Future[None]] = set()
    for key in todo:
        waiting.add(pool.submit(work, key))
        if len(waiting) >= most:
            ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from ready
    yield from waiting


def _rows(key: Key, made: Answer, right: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    names = dict(zip(("arm", "item", "seed"), key, strict=True))
    usages = [stage.usage for stage in made.stages]
    tokens = {
        "read": sum(usage.prompt_tokens - usage.positions_reused for usage in usages),
        "latent": sum(usage.latent_steps for usage in usages),
        "decoded": sum(usage.completion_tokens for usage in usages),
    }
    answer = {
        "right": right, "answer": made.text, "finish_reason": made.finish_reason, "tokens": tokens,
        "handoff": made.handoff.mode, "bytes": made.bytes_handed_over,
    }  # fmt: skip
    seconds = [
        {
            "role": stage.role,
            "prefill": round(stage.usage.prefill_seconds, 4),
            "latent": round(stage.usage.latent_seconds, 4),
            "decode": round(stage.usage.decode_seconds, 4),
            "queue": round(stage.usage.queue_seconds, 4),
        }
        for stage in made.stages
    ]
    return names | answer, names | {"stages": seconds}


def _seed_of(seed: int, index: int) -> int:
    return seed * 1_000_003 + index


def _key(row: dict[str, Any]) -> Key:
    return row["arm"], row["item"], row["seed"]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _append(lines: TextIO, row: dict[str, Any]) -> None:
    lines.write(_line(row))
    lines.flush()
    os.fsync(lines.fileno())


def _read_lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _write_whole(file: Path, text: str) -> None:
    temporary = file.with_suffix(".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
