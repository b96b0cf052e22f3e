"""Contexts follow checkpoints: after a killed process and on time travel, each rung of the ladder on the real model."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import resume_worker
from langchain_core.messages import BaseMessage, RemoveMessage
from langgraph.checkpoint.sqlite import SqliteSaver
from resume_worker import QUESTION, STEPS, THREAD, build_graph, open_store

from avp_agents import LatentEngine
from avp_agents.errors import ContextLostError
from avp_langgraph import AvpChatModel, ContextLifetimes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def killed(smollm2_path: Path, folder: Path) -> int:
    """How a process ended that was to run the whole graph; its store and its checkpoints lie in `folder`."""
    command = [sys.executable, resume_worker.__file__, str(smollm2_path), str(folder)]
    return subprocess.run(command, timeout=240, check=False).returncode


@pytest.fixture(scope="module")
def engine(real_engine: LatentEngine, folder: Path) -> LatentEngine:
    return real_engine.for_store(open_store(folder))


@pytest.fixture(scope="module")
def resumed(killed: int, folder: Path, engine: LatentEngine) -> list[BaseMessage]:
    """The messages of the graph that this process finished for the killed one."""
    assert killed == -signal.SIGKILL
    with SqliteSaver.from_conn_string(str(folder / "checkpoints.sqlite")) as checkpointer:
        graph = build_graph(engine).compile(checkpointer=checkpointer)
        assert graph.get_state(THREAD).next == ("solver",)
        return graph.invoke(None, THREAD)["messages"]


@pytest.fixture(scope="module")
def finished(resumed: list[BaseMessage], engine: LatentEngine) -> Iterator[Any]:
    """A graph that ran to its end, and that nothing happened to."""
    with SqliteSaver.from_conn_string(":memory:") as checkpointer:
        graph = build_graph(engine).compile(checkpointer=checkpointer)
        graph.invoke({"messages": [QUESTION]}, THREAD)
        yield graph


@pytest.fixture(scope="module")
def uninterrupted(finished: Any) -> str:
    return finished.get_state(THREAD).values["messages"][-1].text


@pytest.fixture
def before_solver(finished: Any) -> Any:
    """The checkpoint before the solver, with the researcher's context in the store as the researcher left it."""
    before_researcher = next(s for s in finished.get_state_history(THREAD) if s.next == ("researcher",))
    finished.invoke(None, before_researcher.config, interrupt_before=["solver"])
    return next(s for s in finished.get_state_history(THREAD) if s.next == ("solver",))


def made(message: BaseMessage) -> dict[str, Any]:
    return message.response_metadata["avp"]


def test_a_killed_process_is_resumed(resumed: list[BaseMessage], uninterrupted: str) -> None:
    _, thought, answer = resumed

    assert made(answer)["mode"] == "replay", "keys and values died with the process, the lineage did not"
    assert made(answer)["positions_replayed"] == thought.response_metadata["avp_context"]["tokens"]
    assert answer.text == uninterrupted


def nothing(graph: Any, engine: LatentEngine, handle: Any) -> None:
    """The store has it all."""


def prune(graph: Any, engine: LatentEngine, handle: Any) -> None:
    """Pruning and sweeping spare what a checkpoint refers to."""
    engine.store.prune()
    ContextLifetimes(engine.store, graph.checkpointer).sweep(grace=0)


def drop_kv(graph: Any, engine: LatentEngine, handle: Any) -> None:
    """Also those of the answers, which begin with the thought's."""
    assert sum(engine.store.drop_kv(stored) for stored in engine.store.list()) > 0


def prune_thread(graph: Any, engine: LatentEngine, handle: Any) -> None:
    """The thread goes on elsewhere: its latest checkpoint does not know the thought."""
    graph.update_state(
        THREAD, {"messages": [RemoveMessage(id=m.id) for m in graph.get_state(THREAD).values["messages"]]}
    )
    report = ContextLifetimes(engine.store, graph.checkpointer).prune(["a"])
    assert report.checkpoints_stay
    assert not engine.store.contains(handle)


def delete(graph: Any, engine: LatentEngine, handle: Any) -> None:
    assert engine.store.delete(handle)


@pytest.mark.parametrize(
    ("happens", "mode"),
    [(nothing, "kv"), (prune, "kv"), (drop_kv, "replay"), (prune_thread, "rethink"), (delete, "rethink")],
)
def test_time_travel_gives_the_same_answer(
    finished: Any,
    before_solver: Any,
    engine: LatentEngine,
    uninterrupted: str,
    happens: Callable[[Any, LatentEngine, Any], None],
    mode: str,
) -> None:
    thought = before_solver.values["messages"][-1]
    happens(finished, engine, thought.response_metadata["avp_context"])

    *_, answer = finished.invoke(None, before_solver.config)["messages"]

    assert made(answer)["mode"] == mode
    assert made(answer)["latent_steps"] == (STEPS if mode == "rethink" else 0)
    assert answer.text == uninterrupted


def test_without_the_lineage_and_the_messages_it_is_lost(
    finished: Any, before_solver: Any, engine: LatentEngine, caplog: pytest.LogCaptureFixture
) -> None:
    thought = before_solver.values["messages"][-1]
    engine.store.delete(thought.response_metadata["avp_context"])
    follow_up = [RemoveMessage(id="question"), ("user", "Say hello.")]
    fork = finished.update_state(before_solver.config, {"messages": follow_up}, as_node="researcher")

    with caplog.at_level(logging.WARNING, logger="avp_langgraph"):
        *_, answer = finished.invoke(None, fork)["messages"]

    assert made(answer)["mode"] == "lost"
    assert "the answer is generated without it" in caplog.text
    assert answer.text.strip()
    with pytest.raises(ContextLostError):
        AvpChatModel(engine=engine, on_missing="error").invoke([thought, ("user", "Say hello.")])
