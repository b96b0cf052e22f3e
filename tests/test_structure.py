"""What the layout promises: imports run one way, also between the files of a folder, and a file holds one subject."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("avp_agents", "avp_bench", "avp_crewai", "avp_langgraph")
LONGEST_FILE = 400


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
