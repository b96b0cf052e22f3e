"""A run goes on wherever it was killed, and ends as if it had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from short_task import go

from avp_agents.errors import ConfigurationError
from avp_bench.quality.answering import Bench
from avp_bench.quality.arms import Arm
from avp_bench.quality.run_folder import read_lines

WORKER = Path(__file__).with_name("run_worker.py")


def start(tokenizer: Path, seconds: float, *folders: Path) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, str(WORKER), str(tokenizer), str(seconds), *map(str, folders)]
    return subprocess.Popen(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill_after(lines: int, worker: subprocess.Popen[bytes], file: Path) -> int:
    """Kill the worker as soon as it has written so many lines; how many it has written."""
    deadline = time.monotonic() + 120
    while worker.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < lines):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    worker.kill()
    assert worker.wait() == -signal.SIGKILL, "it was killed at work"
    return file.read_bytes().count(b"\n")


def test_killed_twice(smollm2_path: Path, tmp_path: Path) -> None:
    """Two kills, and the second one cut a line in two: the answers are those of a run in one go, byte for byte."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    answers = killed / "answers.jsonl"
    first = kill_after(6, start(smollm2_path, 0.1, killed), answers)
    second = kill_after(first + 6, start(smollm2_path, 0.1, killed), answers)
    assert 6 <= first < second < 50
    with answers.open("ab") as lines:
        lines.write('{"arm": "direct", "answer": "ü'.encode()[:-1])

    assert start(smollm2_path, 0, killed, whole).wait(timeout=120) == 0
    assert len(read_lines(answers)) == 5 * 5 * 2
    assert answers.read_bytes() == (whole / "answers.jsonl").read_bytes()


def test_another_run_in_the_same_folder_is_refused(tiny_bench: Bench, tmp_path: Path) -> None:
    go(tiny_bench, tmp_path, [Arm("direct", "direct")])
    with pytest.raises(ConfigurationError, match="something else"):
        go(tiny_bench, tmp_path, [Arm("prefill", "prefill")])
    with FileLock(tmp_path / ".lock"), pytest.raises(ConfigurationError, match="Another process"):
        go(tiny_bench, tmp_path, [Arm("direct", "direct")])


def test_an_answer_may_hold_any_character(tmp_path: Path) -> None:
    """Only a line feed ends a line: not the separators that Python's text files split at, too."""
    file = tmp_path / "answers.jsonl"
    file.write_bytes('{"answer": "a\u2028b\u0085c"}\n{"answer": "torn'.encode())
    assert read_lines(file) == [{"answer": "a\u2028b\u0085c"}]
    assert read_lines(tmp_path / "missing.jsonl") == []
