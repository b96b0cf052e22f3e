"""DebugBench has no tests, but examples: an answer is right where it gives their outputs.

Only examples that tell right from wrong count: the published fix passes them and the buggy code does not. Where a
problem has none (classes with several methods, answers in any order, bugs that no example meets), an answer is right
where it is the published fix but for layout and comments.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from avp_bench.quality.answers import code_of
from avp_bench.sandbox import RunProgram

Row = Mapping[str, Any]

_EXAMPLE = re.compile(r"Input:\s*(.+?)\s*Output:\s*(.+?)\s*(?:Explanation\b.*)?\Z", re.DOTALL)
_AROUND = """
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *

class ListNode:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next

class TreeNode:
    def __init__(self, val=0, left=None, right=None):
        self.val, self.left, self.right = val, left, right
"""
_JUDGE = """
def _linked(values):
    head = None
    for value in reversed(values):
        head = ListNode(value, head)
    return head

def _tree(values):
    nodes = [None if value is None else TreeNode(value) for value in values]
    children = iter(nodes[1:])
    for node in nodes:
        if node is not None:
            node.left, node.right = next(children, None), next(children, None)
    return nodes[0] if nodes else None

def _plain(value):
    if isinstance(value, ListNode):
        return [value.val, *(_plain(value.next) or [])]
    if isinstance(value, TreeNode):
        level, values = [value], []
        for node in level:
            values.append(None if node is None else node.val)
            level += [] if node is None else [node.left, node.right]
        while values[-1] is None:
            values.pop()
        return values
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value

def _outcome(value):
    return [] if value is None else _plain(value)

null, true, false = None, True, False
"""


@dataclass(frozen=True)
class _Method:
    """The method that a problem asks for.

    Attributes:
        name: Its name.
        builders: What makes its arguments of plain values; ``""`` where they are plain.
    """

    name: str
    builders: tuple[str, ...]


def is_fixed(row: Row, answer: str, run: RunProgram) -> bool:
    """Whether an answer fixes a problem's bug."""
    code = code_of(answer)
    oracle, buggy = row["oracle_code"], row["buggy_code"]
    program = _judged(code, oracle, row["examples"])
    if program is not None and _examples_tell(oracle, buggy, tuple(row["examples"]), run):
        return run(program).passed
    return _normal_form(code) == _normal_form(oracle)


@lru_cache(maxsize=4096)
def _examples_tell(oracle: str, buggy: str, examples: tuple[str, ...], run: RunProgram) -> bool:
    """Whether the examples are passed by the fix and not by the bug."""
    programs = [_judged(code, oracle, examples) for code in (oracle, buggy)]
    return [program is not None and run(program).passed for program in programs] == [True, False]


def _judged(code: str, oracle: str, examples: Iterable[str]) -> str | None:
    """A program that runs code on the examples and fails where an output differs; None where they cannot be read."""
    calls: list[str] = []
    for example in examples:
        found = _EXAMPLE.search(example)
        call = found and _parsed(f"f({found[1]})")
        if found is None or not isinstance(call, ast.Call) or call.args or _parsed(found[2]) is None:
            return None
        method = _method(oracle, len(call.keywords))
        if method is None:
            return None
        values = [ast.unparse(keyword.value) for keyword in call.keywords]
        arguments = ", ".join(f"{build}({value})" for build, value in zip(method.builders, values, strict=True))
        calls.append(f"assert _outcome(Solution().{method.name}({arguments})) == _outcome({found[2]})")
    return "\n".join([_AROUND, code, _JUDGE, *calls]) if calls else None


def _method(oracle: str, arguments: int) -> _Method | None:
    """The only public method of the fix that takes so many arguments; None where there is none, or several."""
    tree = _parsed(oracle, "exec")
    solutions = [
        node for node in getattr(tree, "body", ()) if isinstance(node, ast.ClassDef) and node.name == "Solution"
    ]
    methods = [
        node
        for solution in solutions
        for node in solution.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and len(node.args.args) == arguments + 1
    ]
    if len(methods) != 1:
        return None
    return _Method(methods[0].name, tuple(_builder(argument) for argument in methods[0].args.args[1:]))


def _builder(argument: ast.arg) -> str:
    annotation = ast.unparse(argument.annotation) if argument.annotation is not None else ""
    return "_tree" if "TreeNode" in annotation else "_linked" if "ListNode" in annotation else ""


def _parsed(code: str, mode: str = "eval") -> Any:
    """The body of an expression, or a module; None where it is no Python."""
    try:
        tree = ast.parse(code, mode=mode)
    except (SyntaxError, ValueError):
        return None
    return tree.body if isinstance(tree, ast.Expression) else tree


def _normal_form(code: str) -> str | None:
    """A program without its layout and comments; None where it does not parse."""
    tree = _parsed(code, "exec")
    return None if tree is None else ast.unparse(tree)
