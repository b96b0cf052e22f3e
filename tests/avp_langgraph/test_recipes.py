"""The recipes run on the default model, and LangGraph Studio can open them."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Command

from avp_agents import LatentEngine
from avp_langgraph import AvpChatModel

ROOT = Path(__file__).parents[2]
GRAPHS: dict[str, str] = json.loads((ROOT / "langgraph.json").read_text())["graphs"]


@pytest.fixture(scope="module")
def model(real_engine: LatentEngine) -> AvpChatModel:
    return AvpChatModel(engine=real_engine, max_tokens=12)


def recipe(name: str) -> dict[str, Any]:
    """A recipe's names; nothing runs."""
    return runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))


def ask(graph: Any, question: str) -> dict[str, Any]:
    return graph.invoke({"messages": [HumanMessage(question)]})


def made(message: Any) -> dict[str, Any]:
    return message.response_metadata["avp"]


def test_swap_in(model: AvpChatModel) -> None:
    *_, writer, _, critic = ask(recipe("swap_in")["build_graph"](model), "Write a slogan.")["messages"]
    usage = critic.usage_metadata

    assert usage["input_token_details"]["cache_read"] >= writer.usage_metadata["total_tokens"] - 1
    assert made(critic)["mode"] == "kv"


def test_four_agent_chain(model: AvpChatModel) -> None:
    result = ask(recipe("four_agent_chain")["build_graph"](model), "Should we build a tram?")

    assert list(result["contexts"]) == ["planner", "expert", "critic", "writer"]
    assert made(result["messages"][-1])["tokens_not_decoded"] == 30


@pytest.mark.parametrize("strategy", ["replay", "splice"])
def test_joined_researchers(model: AvpChatModel, strategy: str) -> None:
    result = ask(recipe("joined_researchers")["build_graph"](model, strategy), "What does a park need?")

    assert f"nature, money, people joined by {strategy}" in result["contexts"]["join"]["text"]
    assert made(result["messages"][-1])["tokens_not_decoded"] == 30


def test_supervisor(model: AvpChatModel) -> None:
    result = ask(recipe("supervisor")["build_graph"](model), "How can a school save energy?")
    *workers, last = result["contexts"]

    assert last == "writer"
    assert made(result["messages"][-1])["tokens_not_decoded"] == 10 * len(workers) > 0


def test_tool_agent(model: AvpChatModel) -> None:
    agent = recipe("tool_agent")["build_agent"](model.with_options(max_tokens=48))
    _, call, tool, answer = ask(agent, "What is the weather in Rome?")["messages"]

    assert call.tool_calls[0]["name"] == "get_weather"
    assert tool.text == f"It is sunny in {call.tool_calls[0]['args']['city']}, 24 degrees."
    assert answer.usage_metadata["input_token_details"]["cache_read"] >= call.usage_metadata["input_tokens"]


def test_human_in_the_loop(model: AvpChatModel, tmp_path: Path) -> None:
    build: Callable[..., Any] = recipe("human_in_the_loop")["build_graph"]
    config: Any = {"configurable": {"thread_id": "rome"}}
    question: Any = {"messages": [HumanMessage("Plan a weekend.")]}
    for command in (question, Command(resume="No museums.")):
        with SqliteSaver.from_conn_string(str(tmp_path / "checkpoints.sqlite")) as saver:
            result = build(model).compile(checkpointer=saver).invoke(command, config)

    *_, said, answer = result["messages"]
    assert said.text == "No museums."
    assert made(answer)["tokens_not_decoded"] == 10


def test_studio_finds_a_graph_in_every_recipe() -> None:
    files = {Path(place.partition(":")[0]).name for place in GRAPHS.values()}

    assert files == {file.name for file in (ROOT / "recipes").glob("*.py") if "avp_langgraph" in file.read_text()}
    for name, place in GRAPHS.items():
        file, _, variable = place.partition(":")
        assert callable(runpy.run_path(str(ROOT / file))[variable].invoke), name


def test_opening_them_loads_no_weights() -> None:
    code = "import runpy, sys; [runpy.run_path(file) for file in sys.argv[1:]]; assert 'torch' not in sys.modules"
    files = [str(ROOT / place.partition(":")[0]) for place in GRAPHS.values()]
    done = subprocess.run(
        [sys.executable, "-c", code, *files], capture_output=True, text=True, timeout=120, check=False
    )

    assert done.returncode == 0, done.stderr


def test_the_answer_is_a_message(model: AvpChatModel) -> None:
    graph = recipe("researcher_solver")["build_graph"](model.with_options(mode="latent", latent_steps=3), model)

    assert isinstance(ask(graph, "2 + 2?")["messages"][-1], AIMessage)
