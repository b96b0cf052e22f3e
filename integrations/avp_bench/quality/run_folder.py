"""The files of a run, so that it can go on wherever it was killed.

    run.json         what was run: a resumed run has to agree with it
    answers.jsonl    one line per arm, problem and seed: the answer, whether it is right, what it took
    times.jsonl      the seconds of each, apart, since they differ from run to run

Lines are appended as answers arrive, and put in order when the run ends: a run that was killed and resumed leaves the
same answers as one that was not, where the engine is batch-invariant. One process at a time works on a run.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from avp_agents.errors import ConfigurationError
from avp_bench.quality.arms import Arm
from avp_bench.quality.tasks import Item

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
        answers, times = read_lines(self._answers), read_lines(self._times)
        both = {_key(row) for row in answers} & {_key(row) for row in times}
        self._rewrite(answers, times, both)
        return both

    def add(self, answer: dict[str, Any], times: dict[str, Any]) -> None:
        """Append one result."""
        with self._lock:
            for file, row in ((self._answers, answer), (self._times, times)):
                with file.open("ab") as lines:
                    _append(lines, row)

    def finish(self) -> None:
        """Put the lines in the plan's order."""
        answers, times = read_lines(self._answers), read_lines(self._times)
        self._rewrite(answers, times, set(self._plan.in_order()))

    def _rewrite(self, answers: list[dict[str, Any]], times: list[dict[str, Any]], kept: set[Key]) -> None:
        order = {key: index for index, key in enumerate(self._plan.in_order())}
        for file, rows in ((self._answers, answers), (self._times, times)):
            by_key = {_key(row): row for row in rows if _key(row) in kept and _key(row) in order}
            ordered = sorted(by_key.values(), key=lambda row: order[_key(row)])
            _write_whole(file, "".join(_line(row) for row in ordered))

    @contextmanager
    def ours(self) -> Iterator[None]:
        """Keep other processes from working on the run.

        Raises:
            ConfigurationError: One does.
        """
        try:
            with FileLock(self.path / ".lock", timeout=0):
                yield
        except Timeout:
            raise ConfigurationError(f"Another process is working on the run in {self.path}.") from None


def _key(row: dict[str, Any]) -> Key:
    return row["arm"], row["item"], row["seed"]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _append(lines: BinaryIO, row: dict[str, Any]) -> None:
    lines.write(_line(row).encode())
    lines.flush()
    os.fsync(lines.fileno())


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; what follows the last line's end was cut off by a kill and is left out."""
    if not file.exists():
        return []
    *lines, _ = file.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines]


def _write_whole(file: Path, text: str) -> None:
    temporary = file.with_suffix(".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
