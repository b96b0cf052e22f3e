"""What the layout promises: imports run one way, also between the files of a folder, a file holds one subject, and a
class's name is its own."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("avp_agents", "avp_bench", "avp_crewai", "avp_langgraph")
LONGEST_FILE = 400
SAME_THING = {"AvpContextOverflowError"}
"""What two frameworks call by one name: our overflow, as each of them knows it."""


def imports_between_files() -> dict[str, set[str]]:
    """Which files each file imports; also in functions, and for types only."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def test_no_two_files_import_each_other_by_any_way():
    try:
        TopologicalSorter(imports_between_files()).prepare()
    except CycleError as error:
        pytest.fail("an import circle: " + " -> ".join(error.args[1]))


def test_a_circle_would_be_found():
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_a_file_holds_one_subject():
    files = [file for folder in ("avp_agents", "integrations") for file in (ROOT / folder).rglob("*.py")]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_a_class_has_a_name_of_its_own():
    homes: dict[str, list[str]] = defaultdict(list)
    for folder in ("avp_agents", "integrations"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    homes[node.name].append(str(file.relative_to(ROOT)))
    assert {name: files for name, files in homes.items() if len(files) > 1 and name not in SAME_THING} == {}
