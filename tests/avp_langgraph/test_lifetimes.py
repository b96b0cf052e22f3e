"""Contexts live as long as the checkpoints that refer to them: sweeps, and the checkpointer's verbs for both."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpointers import KINDS, open_postgres, postgres_server
from fake_engine import FakeEngine
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import interrupt

from avp_agents import MemoryStore, Namespace
from avp_agents.errors import ConfigurationError
from avp_langgraph import AvpChatModel, ContextLifetimes, ContextState, GenerateNode, ThinkNode

QUESTION = HumanMessage("What is 24 * 17 + 3?")


class State(MessagesState, ContextState): ...


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with postgres_server() as url:
        yield url


@pytest.fixture(params=KINDS)
def checkpointer(request: pytest.FixtureRequest) -> Iterator[BaseCheckpointSaver[Any]]:
    if request.param == "memory":
        yield InMemorySaver()
    elif request.param == "sqlite":
        with SqliteSaver.from_conn_string(":memory:") as saver:
            yield saver
    else:
        with open_postgres(request.getfixturevalue("postgres")) as saver:
            yield saver


@pytest.fixture
async def async_checkpointer(tmp_path: Path) -> AsyncIterator[AsyncSqliteSaver]:
    async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "checkpoints.sqlite")) as saver:
        yield saver


def build_graph(engine: FakeEngine, checkpointer: BaseCheckpointSaver[Any]) -> Any:
    """Per run two contexts: the researcher's in the `contexts` channel, the solver's there and on its message."""
    graph = StateGraph(State)
    graph.add_node("researcher", ThinkNode(AvpChatModel(engine=engine), steps=3))
    graph.add_node("solver", GenerateNode(AvpChatModel(engine=engine), context="researcher"))
    graph.add_edge(START, "researcher")
    graph.add_edge("researcher", "solver")
    return graph.compile(checkpointer=checkpointer)


def answering(model: AvpChatModel) -> Any:
    """A node for a graph that hands on messages only."""

    def answer(state: MessagesState) -> Any:
        return {"messages": model.invoke(state["messages"])}

    return answer


def on_thread(thread_id: str, **metadata: str) -> Any:
    return {"configurable": {"thread_id": thread_id}, "metadata": metadata}


def ask(question: BaseMessage = QUESTION) -> Any:
    return {"messages": [question]}


def stored(engine: FakeEngine) -> set[str]:
    return {handle.id for handle in engine.store.list()}


def ids_in(state: dict[str, Any]) -> set[str]:
    return {handle["id"] for handle in state["contexts"].values() if handle is not None}


class TestSweep:
    def test_what_a_checkpoint_refers_to_stays(
        self, engine: FakeEngine, checkpointer: BaseCheckpointSaver[Any]
    ) -> None:
        state = build_graph(engine, checkpointer).invoke(ask(), on_thread("a"))
        AvpChatModel(engine=engine).invoke("Nobody keeps this answer.")
        assert len(stored(engine)) == 3

        report = ContextLifetimes(engine.store, checkpointer).sweep(grace=0)

        assert stored(engine) == ids_in(state)
        assert (report.removed.contexts, report.live) == (1, 2)
        assert report.removed.lineage_bytes > 0

    def test_the_last_uses_are_spared(self, engine: FakeEngine) -> None:
        AvpChatModel(engine=engine).invoke("Its checkpoint is not written yet.")

        assert ContextLifetimes(engine.store, InMemorySaver()).sweep().removed.contexts == 0
        assert len(stored(engine)) == 1

    def test_a_dry_run_removes_nothing(self, engine: FakeEngine) -> None:
        AvpChatModel(engine=engine).invoke("Nobody keeps this answer.")
        lifetimes = ContextLifetimes(engine.store, InMemorySaver())

        report = lifetimes.sweep(grace=0, dry_run=True)

        assert report.removed.contexts == 1
        assert len(stored(engine)) == 1
        assert lifetimes.sweep(grace=0) == report

    def test_pinned_contexts_stay(self, engine: FakeEngine) -> None:
        answer = AvpChatModel(engine=engine).invoke("This answer is kept elsewhere.")
        engine.store.pin(answer.response_metadata["avp_context"])

        assert ContextLifetimes(engine.store, InMemorySaver()).sweep(grace=0).removed.contexts == 0

    def test_handles_on_messages_alone_are_references(self, engine: FakeEngine) -> None:
        checkpointer = InMemorySaver()
        graph = StateGraph(MessagesState)
        graph.add_node("solver", answering(AvpChatModel(engine=engine)))
        graph.add_edge(START, "solver")
        graph.compile(checkpointer=checkpointer).invoke(ask(), on_thread("a"))

        assert ContextLifetimes(engine.store, checkpointer).sweep(grace=0).removed.contexts == 0

    def test_pending_writes_are_references(self, engine: FakeEngine, checkpointer: BaseCheckpointSaver[Any]) -> None:
        """A sibling that waits keeps the superstep from being written; what is done lies in pending writes."""

        def wait(state: State) -> None:
            interrupt("Go on?")

        graph = StateGraph(State)
        graph.add_node("researcher", ThinkNode(AvpChatModel(engine=engine), steps=3))
        graph.add_node("wait", wait)
        graph.add_edge(START, "researcher")
        graph.add_edge(START, "wait")
        graph.compile(checkpointer=checkpointer).invoke(ask(), on_thread("a"))

        report = ContextLifetimes(engine.store, checkpointer).sweep(grace=0)

        assert (report.live, report.removed.contexts) == (1, 0)

    def test_subgraphs_are_looked_into(self, engine: FakeEngine, checkpointer: BaseCheckpointSaver[Any]) -> None:
        """A subgraph that waits has checkpoints of its own; its parent knows nothing of the handle yet."""

        def wait(state: State) -> None:
            interrupt("Go on?")

        inner = StateGraph(State)
        inner.add_node("researcher", ThinkNode(AvpChatModel(engine=engine), steps=3))
        inner.add_node("wait", wait)
        inner.add_edge(START, "researcher")
        inner.add_edge("researcher", "wait")
        outer = StateGraph(State)
        outer.add_node("team", inner.compile())
        outer.add_edge(START, "team")
        graph = outer.compile(checkpointer=checkpointer)
        assert not graph.invoke(ask(), on_thread("a")).get("contexts")

        assert ContextLifetimes(engine.store, checkpointer).sweep(grace=0).removed.contexts == 0

    def test_every_checkpointer_counts(self, engine: FakeEngine) -> None:
        one, two = InMemorySaver(), InMemorySaver()
        build_graph(engine, one).invoke(ask(), on_thread("a"))
        build_graph(engine, two).invoke(ask(), on_thread("b"))

        assert ContextLifetimes(engine.store, one, two).sweep(grace=0).removed.contexts == 0
        assert ContextLifetimes(engine.store, one).sweep(grace=0).removed.contexts == 2

    def test_other_namespaces_are_left_alone(self, engine: FakeEngine) -> None:
        checkpointer = InMemorySaver()
        build_graph(engine, checkpointer).invoke(ask(), on_thread("a"))
        other = MemoryStore(namespace=Namespace("other", b"o" * 32))

        assert ContextLifetimes(other, checkpointer).sweep(grace=0).removed.contexts == 0
        assert len(stored(engine)) == 2

    async def test_on_an_event_loop(self, engine: FakeEngine, async_checkpointer: AsyncSqliteSaver) -> None:
        state = await build_graph(engine, async_checkpointer).ainvoke(ask(), on_thread("a"))
        AvpChatModel(engine=engine).invoke("Nobody keeps this answer.")

        report = await ContextLifetimes(engine.store, async_checkpointer).asweep(grace=0)

        assert report.removed.contexts == 1
        assert stored(engine) == ids_in(state)

    def test_without_a_checkpointer_there_is_nothing_to_go_by(self, engine: FakeEngine) -> None:
        with pytest.raises(ConfigurationError, match="pass at least one"):
            ContextLifetimes(engine.store)


class TestDeleteThread:
    def test_checkpoints_and_contexts_go(self, engine: FakeEngine, checkpointer: BaseCheckpointSaver[Any]) -> None:
        graph = build_graph(engine, checkpointer)
        graph.invoke(ask(), on_thread("a"))
        other = graph.invoke(ask(), on_thread("b"))

        report = ContextLifetimes(engine.store, checkpointer).delete_thread("a")

        assert report.removed.contexts == 2
        assert stored(engine) == ids_in(other)
        assert graph.get_state(on_thread("a")).values == {}
        assert graph.get_state(on_thread("b")).values["contexts"] == other["contexts"]

    def test_a_users_contexts_wait_for_the_sweep(self, engine: FakeEngine) -> None:
        checkpointer = InMemorySaver()
        thinker = AvpChatModel(engine=engine, scope="user", mode="latent")
        graph = StateGraph(MessagesState)
        graph.add_node("researcher", answering(thinker))
        graph.add_edge(START, "researcher")
        compiled = graph.compile(checkpointer=checkpointer)
        for thread in "ab":
            compiled.invoke(ask(), {"configurable": {"thread_id": thread, "user_id": "ann"}})
        lifetimes = ContextLifetimes(engine.store, checkpointer)

        removed = [lifetimes.delete_thread("a"), lifetimes.sweep(grace=0), lifetimes.delete_thread("b")]

        assert [report.removed.contexts for report in removed] == [0, 0, 0]
        assert lifetimes.sweep(grace=0).removed.contexts == 1

    async def test_on_an_event_loop(self, engine: FakeEngine, async_checkpointer: AsyncSqliteSaver) -> None:
        graph = build_graph(engine, async_checkpointer)
        await graph.ainvoke(ask(), on_thread("a"))

        report = await ContextLifetimes(engine.store, async_checkpointer).adelete_thread("a")

        assert (report.removed.contexts, stored(engine)) == (2, set())
        assert (await graph.aget_state(on_thread("a"))).values == {}


class TestDeleteForRuns:
    def test_what_only_those_runs_refer_to_goes(
        self, engine: FakeEngine, checkpointer: BaseCheckpointSaver[Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        graph = build_graph(engine, checkpointer)
        graph.invoke(ask(), on_thread("a", run_id="one"))
        kept = graph.invoke(ask(HumanMessage("And 24 * 18?")), on_thread("a", run_id="two"))
        gone = graph.invoke(ask(), on_thread("b", run_id="one"))

        with caplog.at_level(logging.WARNING, logger="avp_langgraph"):
            report = ContextLifetimes(engine.store, checkpointer).delete_for_runs(["one"])

        assert report.checkpoints_stay, "no checkpointer of LangGraph's own knows the verb"
        assert "cannot delete_for_runs" in caplog.text
        assert stored(engine).isdisjoint(ids_in(gone))
        assert stored(engine) >= ids_in(kept)

    async def test_a_checkpointer_that_knows_the_verb(self, engine: FakeEngine) -> None:
        class Saver(InMemorySaver):
            asked: list[Any] = []  # noqa: RUF012

            def delete_for_runs(self, run_ids: Any) -> None:
                self.asked.append(run_ids)

            async def adelete_for_runs(self, run_ids: Any) -> None:
                self.asked.append(run_ids)

        checkpointer = Saver()
        build_graph(engine, checkpointer).invoke(ask(), on_thread("a", run_id="one"))
        lifetimes = ContextLifetimes(engine.store, checkpointer)

        assert not lifetimes.delete_for_runs(["two"]).checkpoints_stay
        assert (await lifetimes.adelete_for_runs(["one"])).removed.contexts == 2
        assert checkpointer.asked == [["two"], ["one"]]


class TestPrune:
    def test_the_latest_checkpoint_keeps_its_contexts(
        self, engine: FakeEngine, checkpointer: BaseCheckpointSaver[Any]
    ) -> None:
        graph = build_graph(engine, checkpointer)
        first = graph.invoke(ask(), on_thread("a"))
        latest = graph.invoke(ask(HumanMessage("And 24 * 18?")), on_thread("a"))
        other = graph.invoke(ask(), on_thread("b"))

        report = ContextLifetimes(engine.store, checkpointer).prune(["a"])

        replaced = ids_in(first) - {m.response_metadata["avp_context"]["id"] for m in latest["messages"][1::2]}
        assert report.removed.contexts == len(replaced) == 1, "the first thought; the first answer is still a message"
        assert stored(engine) == (ids_in(first) | ids_in(latest) | ids_in(other)) - replaced
        assert report.checkpoints_stay == (type(checkpointer).__name__ != "PostgresSaver")
        assert graph.get_state(on_thread("a")).values["contexts"] == latest["contexts"]

    def test_deleting(self, engine: FakeEngine, checkpointer: BaseCheckpointSaver[Any]) -> None:
        graph = build_graph(engine, checkpointer)
        graph.invoke(ask(), on_thread("a"))

        assert ContextLifetimes(engine.store, checkpointer).prune(["a"], strategy="delete").removed.contexts == 2
        assert graph.get_state(on_thread("a")).values == {}

    def test_an_unknown_strategy(self, engine: FakeEngine) -> None:
        with pytest.raises(ConfigurationError, match="keep_latest"):
            ContextLifetimes(engine.store, InMemorySaver()).prune(["a"], strategy="all")  # pyright: ignore

    async def test_on_an_event_loop(self, engine: FakeEngine, async_checkpointer: AsyncSqliteSaver) -> None:
        graph = build_graph(engine, async_checkpointer)
        for question in ("One?", "Two?"):
            await graph.ainvoke(ask(HumanMessage(question)), on_thread("a"))

        assert (await ContextLifetimes(engine.store, async_checkpointer).aprune(["a"])).removed.contexts == 1


def last_mode(state: dict[str, Any]) -> str:
    return state["messages"][-1].response_metadata["avp"]["mode"]


class TestCopyThread:
    def test_the_copy_may_use_the_contexts(self, engine: FakeEngine, checkpointer: BaseCheckpointSaver[Any]) -> None:
        graph = build_graph(engine, checkpointer)
        original = graph.invoke(ask(), on_thread("a"))
        before = engine.store.stats()

        assert ContextLifetimes(engine.store, checkpointer).copy_thread("a", "b") == 2

        copied = graph.get_state(on_thread("b")).values
        after = engine.store.stats()
        assert ids_in(copied).isdisjoint(ids_in(original))
        assert (after.contexts, after.segments, after.lineage_bytes) == (4, before.segments, before.lineage_bytes)
        assert [m.content for m in copied["messages"]] == [m.content for m in original["messages"]]
        history, copies = (list(graph.get_state_history(on_thread(thread))) for thread in "ab")
        assert [(s.next, s.metadata, s.created_at) for s in copies] == [
            (s.next, s.metadata, s.created_at) for s in history
        ]

        before_solver = next(snapshot for snapshot in copies if snapshot.next == ("solver",))
        again = graph.invoke(None, before_solver.config)
        assert (last_mode(again), again["messages"][-1].text) == ("kv", original["messages"][-1].text)
        ContextLifetimes(engine.store, checkpointer).delete_thread("a")
        assert stored(engine) >= ids_in(copied), "the copy does not depend on the original"

    def test_pending_writes_are_copied(self, engine: FakeEngine, checkpointer: BaseCheckpointSaver[Any]) -> None:
        def wait(state: State) -> Any:
            return {"messages": [AIMessage(f"human says {interrupt('Go on?')}")]}

        graph = StateGraph(State)
        graph.add_node("researcher", ThinkNode(AvpChatModel(engine=engine), steps=3))
        graph.add_node("wait", wait)
        graph.add_edge(START, "researcher")
        graph.add_edge(START, "wait")
        compiled = graph.compile(checkpointer=checkpointer)
        compiled.invoke(ask(), on_thread("a"))
        thinking = len(engine.requests)

        ContextLifetimes(engine.store, checkpointer).copy_thread("a", "b")
        snapshot = compiled.get_state(on_thread("b"))
        compiled.update_state(on_thread("b"), None, as_node="wait")

        assert [task.name for task in snapshot.tasks if task.interrupts] == ["wait"]
        assert len(engine.requests) == thinking, "what the researcher did was not done again"

    def test_a_lost_context_stays_lost(self, engine: FakeEngine) -> None:
        checkpointer = InMemorySaver()
        original = build_graph(engine, checkpointer).invoke(ask(), on_thread("a"))
        engine.store.delete(original["contexts"]["researcher"])

        assert ContextLifetimes(engine.store, checkpointer).copy_thread("a", "b") == 1

    def test_onto_a_thread_that_is_there(self, engine: FakeEngine) -> None:
        checkpointer = InMemorySaver()
        graph = build_graph(engine, checkpointer)
        for thread in "ab":
            graph.invoke(ask(), on_thread(thread))

        with pytest.raises(ConfigurationError, match="copy to a new thread"):
            ContextLifetimes(engine.store, checkpointer).copy_thread("a", "b")

    def test_encrypted_checkpoints(self, engine: FakeEngine) -> None:
        class Rot:
            def encrypt(self, plaintext: bytes) -> tuple[str, bytes]:
                return "rot", bytes((byte + 13) % 256 for byte in plaintext)

            def decrypt(self, ciphername: str, ciphertext: bytes) -> bytes:
                return bytes((byte - 13) % 256 for byte in ciphertext)

        checkpointer = InMemorySaver(serde=EncryptedSerializer(Rot()))
        original = build_graph(engine, checkpointer).invoke(ask(), on_thread("a"))

        ContextLifetimes(engine.store, checkpointer).copy_thread("a", "b")
        copied = build_graph(engine, checkpointer).get_state(on_thread("b")).values

        assert ids_in(copied).isdisjoint(ids_in(original))
        assert ids_in(copied) < stored(engine)

    async def test_on_an_event_loop(self, engine: FakeEngine, async_checkpointer: AsyncSqliteSaver) -> None:
        graph = build_graph(engine, async_checkpointer)
        await graph.ainvoke(ask(), on_thread("a"))

        assert await ContextLifetimes(engine.store, async_checkpointer).acopy_thread("a", "b") == 2
        again = await graph.ainvoke(ask(HumanMessage("And 24 * 18?")), on_thread("b"))
        assert last_mode(again) == "kv"


class TestAThousandSteps:
    """A thread that thinks on and on, and keeps its last thought."""

    STEPS = 1000

    @pytest.fixture(scope="class")
    @classmethod
    def ran(cls) -> Iterator[tuple[FakeEngine, Any]]:
        """The engine, and the graph after its run."""
        engine, steps = FakeEngine(), iter(range(1, cls.STEPS))
        model = AvpChatModel(engine=engine, mode="latent", latent_steps=2)

        def think_on(state: ContextState) -> Any:
            thought = model.invoke(f"What follows from {state.get('contexts', {}).get('thought')}?")
            return {"contexts": {"thought": thought.response_metadata["avp_context"]}}

        graph = StateGraph(ContextState)
        graph.add_node("think", think_on)
        graph.add_edge(START, "think")
        graph.add_conditional_edges("think", lambda _: "think" if next(steps, None) else "__end__")
        with SqliteSaver.from_conn_string(":memory:") as checkpointer:
            compiled = graph.compile(checkpointer=checkpointer)
            config = RunnableConfig(configurable={"thread_id": "a"}, recursion_limit=cls.STEPS + 1)
            compiled.invoke({"contexts": {}}, config)
            yield engine, compiled

    def test_checkpoints_grow_linearly(self, ran: Any) -> None:
        _, graph = ran
        query = """
            SELECT length(checkpoint) + length(metadata) +
                (SELECT sum(length(value)) FROM writes WHERE writes.checkpoint_id = checkpoints.checkpoint_id)
            FROM checkpoints ORDER BY checkpoint_id"""
        sizes = [size for (size,) in graph.checkpointer.conn.execute(query) if size is not None]

        assert len(sizes) >= self.STEPS
        assert max(sizes[10:]) - min(sizes[10:]) < 50, "a step takes the same room whenever it is taken"

    def test_a_context_takes_at_most_300_bytes_of_a_checkpoint(self, ran: Any) -> None:
        _, graph = ran
        contexts = graph.get_state(on_thread("a")).values["contexts"]
        dumps = graph.checkpointer.serde.dumps_typed

        assert len(dumps(contexts)[1]) - len(dumps({})[1]) <= 300

    def test_the_sweep_returns_the_store_to_what_is_live(self, ran: Any) -> None:
        engine, graph = ran
        lifetimes = ContextLifetimes(engine.store, graph.checkpointer)
        assert lifetimes.sweep(grace=0).removed.contexts == 0, "time travel may ask for any of them"
        full = engine.store.stats()
        assert (full.contexts, full.segments) == (self.STEPS, 2 * self.STEPS)

        lifetimes.prune(["a"])
        assert stored(engine) == ids_in(graph.get_state(on_thread("a")).values)
        lifetimes.delete_thread("a")
        assert engine.store.stats().contexts == engine.store.stats().lineage_bytes == 0
