"""The recipes for CrewAI run offline on the default model, and the flow goes on in another process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from crewai.crews.crew_output import CrewOutput
from llm_events import Events

from avp_agents import LatentEngine
from avp_agents.demo import DemoRequest
from avp_crewai import AvpLLM
from avp_crewai.demo import run

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def llm(engine: LatentEngine) -> Any:
    """Makes LLMs of few words, on the engine that all tests share."""
    few: dict[str, Any] = {"engine": engine, "max_tokens": 8, "latent_steps": 2}
    return lambda **options: AvpLLM(**(few | options))


def test_researcher_and_solver(llm: Any, events: Events) -> None:
    crew = recipe("crew_researcher_solver").build_crew(llm(mode="latent"), llm())
    output = crew.kickoff(inputs={"question": "What do two pens cost?"})

    assert isinstance(output, CrewOutput)
    assert [handoff["mode"] for handoff in events.handoffs] == ["none", "kv"]


def test_three_researchers_and_an_editor(llm: Any, events: Events) -> None:
    crew = recipe("crew_editor").build_crew([llm(mode="latent") for _ in range(3)], llm(join_strategy="splice"))
    output = crew.kickoff(inputs={"subject": "pens"})

    assert len(output.tasks_output) == 4
    assert "3 contexts joined by splice" in events.handoffs[-1]["reason"]


def test_an_agent_with_tools(llm: Any, events: Events) -> None:
    output = recipe("crew_tools").build_crew(llm(max_tokens=48), llm()).kickoff(inputs={"question": "2 pens?"})

    assert output.raw
    assert events.handoffs[-1]["mode"] in ("kv", "text")


def test_a_flow_goes_on_in_another_process(llm: Any, engine: LatentEngine) -> None:
    flow = recipe("crew_flow").LatentFlow(llm(mode="latent"), llm())
    flow.kickoff(inputs={"question": "What do two pens cost?"})
    handle = flow.state.thought
    assert engine.resolve(handle, scope=flow.state.id)

    again = [sys.executable, str(RECIPES / "crew_flow.py"), "And three?", flow.state.id]
    done = subprocess.run(again, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert handle["id"] in done.stdout, "the flow's state came back, and its thought was not thought again"
    assert "No context" not in done.stderr, "the thought was found in the store, and answered on"


def test_the_demo_compares_latent_with_text(random_engine: LatentEngine) -> None:
    request = DemoRequest("What do two pens cost?", latent_steps=2, researcher_tokens=12, max_tokens=3)
    comparison = run(random_engine, request, lambda line: None)

    assert [agent.mode for agent in comparison.latent.agents] == ["none", "kv"]
    assert [agent.mode for agent in comparison.text.agents] == ["none", "text"]
    assert [agent.tokens_decoded for agent in comparison.text.agents] == [12, 3]
    assert [agent.tokens_decoded for agent in comparison.latent.agents] == [0, 3]
    assert random_engine.store.list() == []
