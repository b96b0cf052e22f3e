"""What the distribution promises as a whole: light imports, public names, and layers."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = (ROOT / "avp_agents", *sorted(ROOT.glob("integrations/*/")))
MODULES = [file for package in PACKAGES for file in sorted(package.rglob("*.py"))]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("names", ["*", "Context, ContextHandle, ContextStore, MemoryStore, DiskStore, AvpError"])
def test_importing_avp_agents_does_not_import_torch(names: str) -> None:
    statement = "import avp_agents" if names == "*" else f"from avp_agents import {names}"
    done = run_python(
        f"import sys\n{statement}\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )

    assert done.returncode == 0, done.stderr


def test_importing_avp_langgraph_loads_no_weights() -> None:
    done = run_python("import sys, avp_langgraph\nassert 'torch' not in sys.modules")

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["avp_agents", "avp_langgraph"])
def test_every_public_name_resolves(package: str) -> None:
    module = importlib.import_module(package)

    assert sorted(module.__all__) == sorted(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Kontext'"):
        importlib.import_module("avp_agents").Kontext  # noqa: B018


@pytest.mark.parametrize("package", ["avp_agents", "avp_langgraph"])
def test_packages_are_marked_as_typed(package: str) -> None:
    file = importlib.import_module(package).__file__

    assert file is not None
    assert (Path(file).parent / "py.typed").is_file()


def test_every_module_says_what_it_is_for() -> None:
    silent = [str(file.relative_to(ROOT)) for file in MODULES if not ast.get_docstring(ast.parse(file.read_text()))]

    assert MODULES
    assert not silent


def test_layers_and_independence_of_frameworks_hold() -> None:
    command = "import sys; from importlinter.cli import lint_imports_command as run; run()"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_langgraph_demo_is_registered() -> None:
    (demo,) = entry_points(group="avp_agents.demos", name="langgraph")

    assert callable(demo.load())
