"""The README tells the truth: its two commands are those that CI runs, and every example runs as it is printed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?:<!-- (\w+): (\w+) -->\n)?```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = {name: text for kind, name, _, text in BLOCKS if kind == "command"}
SERVED = {"curl", "openai"}
"""Examples that need a server: tests/transport/test_serving_examples.py runs them."""
EXAMPLES = {name: text for kind, name, _, text in BLOCKS if kind == "example" and name not in SERVED}

GIVEN = {
    "tools": """
from langchain_core.tools import tool
from pydantic import BaseModel
from avp_langgraph import AvpChatModel

@tool
def get_weather(city: str) -> str:
    "The weather in a city."
    return f"It is sunny in {city}."

class Person(BaseModel):
    name: str

model = AvpChatModel(max_tokens=32)
""",
}
"""What stands around an example in a reader's own program."""
NEEDS = {"crewai": "crewai", "langgraph": "langgraph", "tools": "llguidance"}
"""Packages of extras that an example is about."""


@pytest.fixture(scope="module")
def _engines_are_closed() -> Iterator[None]:
    """Examples that name no engine share one."""
    yield
    from avp_agents.engine.registry import close_engines

    close_engines()


def test_every_block_is_a_command_or_an_example() -> None:
    """Whatever is printed for people to copy is run by CI itself or below."""
    assert len(BLOCKS) == README.count("```") / 2
    assert [text for kind, *_, text in BLOCKS if not kind] == []


def test_the_commands_are_those_that_ci_runs() -> None:
    assert set(COMMANDS) == {"demo", "test"}
    assert "avp-agents demo" in COMMANDS["demo"]
    assert "pytest" in COMMANDS["test"]
    wanted = set(re.findall(r"^readme_command (\w+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE))
    assert wanted == set(COMMANDS)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.usefixtures("smollm2_path", "_engines_are_closed")
def test_an_example_runs(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    package = NEEDS.get(name)
    if package is not None and find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'avp-agents[{name}]'")
    for variable, value in {"CREWAI_DISABLE_TELEMETRY": "true", "CREWAI_TRACING_ENABLED": "false"}.items():
        monkeypatch.setenv(variable, value)
    namespace: dict[str, Any] = {"__name__": f"readme_{name}"}
    exec(compile(GIVEN.get(name, ""), "given", "exec"), namespace)
    exec(compile(EXAMPLES[name], f"README.md, {name}", "exec"), namespace)

    if "print(" in EXAMPLES[name]:
        assert capsys.readouterr().out.strip()


def test_links_lead_somewhere() -> None:
    local = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []
