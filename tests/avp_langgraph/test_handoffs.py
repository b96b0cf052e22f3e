"""The ladder: what happens to a message's context when its handle cannot be resolved, and in whose run it can be."""

from __future__ import annotations

import logging
from typing import Any

import msgpack
import pytest
from fake_engine import FakeEngine
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.runnables.config import RunnableConfig

from avp_agents.errors import ConfigurationError, ContextLostError
from avp_langgraph import AvpChatModel

QUESTION = HumanMessage("What is 24 * 17 + 3?")
FOLLOW_UP = HumanMessage("Are you sure?")


@pytest.fixture
def solver(engine: FakeEngine) -> AvpChatModel:
    return AvpChatModel(engine=engine)


@pytest.fixture
def thought(engine: FakeEngine) -> AIMessage:
    return AvpChatModel(engine=engine, mode="latent", latent_steps=7).invoke([QUESTION])


def made(message: BaseMessage) -> dict[str, Any]:
    return message.response_metadata["avp"]


def handle_of(message: BaseMessage) -> dict[str, Any]:
    return message.response_metadata["avp_context"]


def with_metadata(message: AIMessage, **changes: Any) -> AIMessage:
    return message.model_copy(update={"response_metadata": message.response_metadata | changes})


@pytest.fixture
def expected(solver: AvpChatModel, thought: AIMessage) -> str:
    """The answer on the thought when nothing is missing."""
    return solver.invoke([QUESTION, thought]).text


class TestRungs:
    def test_kv(self, solver: AvpChatModel, thought: AIMessage) -> None:
        assert made(solver.invoke([QUESTION, thought]))["mode"] == "kv"

    def test_replay(self, engine: FakeEngine, solver: AvpChatModel, thought: AIMessage, expected: str) -> None:
        engine.store.drop_kv(handle_of(thought))
        answer = solver.invoke([QUESTION, thought])

        assert made(answer)["mode"] == "replay"
        assert made(answer)["positions_replayed"] == handle_of(thought)["tokens"]
        assert answer.text == expected

    def test_held_by_a_later_message(self, engine: FakeEngine, solver: AvpChatModel, thought: AIMessage) -> None:
        answer = solver.invoke([QUESTION, thought])
        conversation = [QUESTION, thought, answer, FOLLOW_UP]
        expected = solver.invoke(conversation)
        engine.store.delete(handle_of(thought))
        again = solver.invoke(conversation)

        assert (made(again)["mode"], again.text) == ("kv", expected.text)
        assert "thought for" not in engine.requests[-1].text

    def test_rethink(self, engine: FakeEngine, solver: AvpChatModel, thought: AIMessage, expected: str) -> None:
        engine.store.delete(handle_of(thought))
        answer = solver.invoke([QUESTION, thought])

        assert made(answer)["mode"] == "rethink"
        assert "no longer" in made(answer)["reason"]
        assert made(answer)["latent_steps"] == 7
        assert answer.text == expected

    async def test_rethink_on_an_event_loop(
        self, engine: FakeEngine, solver: AvpChatModel, thought: AIMessage, expected: str
    ) -> None:
        engine.store.delete(handle_of(thought))
        answer = await solver.ainvoke([QUESTION, thought])

        assert (made(answer)["mode"], answer.text) == ("rethink", expected)

    def test_rethink_by_another_model(self, engine: FakeEngine, thought: AIMessage) -> None:
        other = AvpChatModel(engine=FakeEngine("other/model", store=engine.store))
        answer = other.invoke([QUESTION, thought])

        assert made(answer)["mode"] == "rethink"
        assert "another model" in made(answer)["reason"]

    def test_text(self, engine: FakeEngine, solver: AvpChatModel) -> None:
        answer = solver.invoke([QUESTION])
        engine.store.delete(handle_of(answer))
        reply = solver.invoke([QUESTION, answer, FOLLOW_UP])

        assert made(reply)["mode"] == "text"
        assert engine.requests[-1].text == f"|{QUESTION.text}||{answer.text}||{FOLLOW_UP.text}||"

    def test_lost(
        self, engine: FakeEngine, solver: AvpChatModel, thought: AIMessage, caplog: pytest.LogCaptureFixture
    ) -> None:
        engine.store.delete(handle_of(thought))
        with caplog.at_level(logging.WARNING, logger="avp_langgraph"):
            answer = solver.invoke([thought, FOLLOW_UP])

        assert made(answer)["mode"] == "lost"
        assert "the answer is generated without it" in caplog.text
        assert engine.requests[-1].text == f"|{FOLLOW_UP.text}||"

    def test_lost_is_an_error_on_demand(self, engine: FakeEngine, thought: AIMessage) -> None:
        engine.store.delete(handle_of(thought))
        strict = AvpChatModel(engine=engine, on_missing="error")

        with pytest.raises(ContextLostError, match="A context of this prompt is lost"):
            strict.invoke([thought, FOLLOW_UP])
        assert made(strict.invoke([QUESTION, thought]))["mode"] == "rethink"


class TestGivenHandles:
    """Handles out of the `contexts` channel stand alone, but they take the same ladder."""

    @pytest.fixture
    def expected(self, solver: AvpChatModel, thought: AIMessage) -> str:
        """The answer on the thought when nothing is missing."""
        return solver.invoke([QUESTION, FOLLOW_UP], avp_context=handle_of(thought)).text

    def test_replay(self, engine: FakeEngine, solver: AvpChatModel, thought: AIMessage, expected: str) -> None:
        engine.store.drop_kv(handle_of(thought))
        answer = solver.invoke([QUESTION, FOLLOW_UP], avp_context=handle_of(thought))

        assert (made(answer)["mode"], answer.text) == ("replay", expected)

    def test_rethink_where_the_prompt_begins_with_the_same_messages(
        self, engine: FakeEngine, solver: AvpChatModel, thought: AIMessage, expected: str
    ) -> None:
        engine.store.delete(handle_of(thought))
        answer = solver.invoke([QUESTION, FOLLOW_UP], avp_context=handle_of(thought))

        assert (made(answer)["mode"], answer.text) == ("rethink", expected)
        assert made(answer)["latent_steps"] == 7

    def test_rethink_where_a_message_carries_it_too(
        self, engine: FakeEngine, solver: AvpChatModel, thought: AIMessage
    ) -> None:
        expected = solver.invoke([QUESTION, thought, FOLLOW_UP], avp_context=handle_of(thought))
        engine.store.delete(handle_of(thought))
        answer = solver.invoke([QUESTION, thought, FOLLOW_UP], avp_context=handle_of(thought))

        assert (made(answer)["mode"], answer.text) == ("rethink", expected.text)
        assert made(answer)["latent_steps"] == 7, "it was thought again once"

    def test_held_by_a_message(self, engine: FakeEngine, solver: AvpChatModel, thought: AIMessage) -> None:
        answer = solver.invoke([QUESTION, thought])
        engine.store.delete(handle_of(thought))

        assert made(solver.invoke([answer, FOLLOW_UP], avp_context=handle_of(thought)))["mode"] == "kv"

    def test_an_answer_that_is_read(self, engine: FakeEngine, solver: AvpChatModel) -> None:
        answer = solver.invoke([QUESTION])
        engine.store.delete(handle_of(answer))
        reply = solver.invoke([QUESTION, answer, FOLLOW_UP], avp_context=handle_of(answer))

        assert made(reply)["mode"] == "text"
        assert answer.text in engine.requests[-1].text

    def test_lost_where_the_messages_are_other_ones(
        self, engine: FakeEngine, solver: AvpChatModel, thought: AIMessage
    ) -> None:
        engine.store.delete(handle_of(thought))

        assert made(solver.invoke([FOLLOW_UP], avp_context=handle_of(thought)))["mode"] == "lost"
        with pytest.raises(ContextLostError):
            solver.invoke([FOLLOW_UP], avp_context=handle_of(thought), on_missing="error")

    def test_a_thought_on_a_thought_says_not_what_it_was_thought_on(
        self, engine: FakeEngine, solver: AvpChatModel, thought: AIMessage
    ) -> None:
        """Its messages alone would not make it again."""
        second = AvpChatModel(engine=engine, mode="latent").invoke([FOLLOW_UP], avp_context=handle_of(thought))
        engine.store.delete(handle_of(second))

        assert "source" not in handle_of(second)
        assert made(solver.invoke([FOLLOW_UP], avp_context=handle_of(second)))["mode"] == "lost"

    @pytest.mark.parametrize("source", [7, "soft", "soft:256:0:" + "0" * 12, "soft:256:7:" + "0" * 12])
    def test_a_note_that_was_tampered_with(
        self, engine: FakeEngine, solver: AvpChatModel, thought: AIMessage, source: object
    ) -> None:
        engine.store.delete(handle_of(thought))
        handle = handle_of(thought) | {"source": source}

        assert made(solver.invoke([QUESTION], avp_context=handle))["mode"] == "lost"

    def test_a_handle_with_its_note_stays_small(self, engine: FakeEngine) -> None:
        thinker = AvpChatModel(engine=engine, mode="latent", latent_steps=100)
        config: RunnableConfig = {"configurable": {"thread_id": "a"}, "metadata": {"langgraph_node": "researcher" * 4}}
        thought = RunnableLambda(lambda _: thinker.invoke([QUESTION])).invoke(None, config)

        assert len(msgpack.packb(handle_of(thought)) or b"") < 300


class TestEditedState:
    """Messages come out of graph state, which others can edit."""

    @pytest.mark.parametrize(
        "handle", ["nonsense", 7, {"v": 9}, {"v": 1, "id": "../../etc/passwd"}, {"v": 1, "id": "avp:1:" + "0" * 32}]
    )
    def test_a_handle_that_is_none_is_no_handle(self, solver: AvpChatModel, thought: AIMessage, handle: Any) -> None:
        assert made(solver.invoke([QUESTION, with_metadata(thought, avp_context=handle)]))["mode"] == "rethink"
        assert made(solver.invoke([QUESTION], avp_context=handle))["mode"] == "lost"

    def test_an_edited_answer_counts_as_it_reads_now(self, engine: FakeEngine, solver: AvpChatModel) -> None:
        edited = solver.invoke([QUESTION]).model_copy(update={"content": "It is 411."})
        reply = solver.invoke([QUESTION, edited, FOLLOW_UP])

        assert made(reply)["mode"] == "text"
        assert "edited" in made(reply)["reason"]
        assert engine.requests[-1].text == f"|{QUESTION.text}||It is 411.||{FOLLOW_UP.text}||"

    def test_a_line_that_was_replaced_by_an_answer_is_read(
        self, engine: FakeEngine, solver: AvpChatModel, thought: AIMessage
    ) -> None:
        solver.invoke([QUESTION, thought.model_copy(update={"content": "It is 411."}), FOLLOW_UP])

        assert "It is 411." in engine.requests[-1].text

    @pytest.mark.parametrize("recipe", [None, {}, {"method": "soft", "steps": "many"}, {"method": "soft", "steps": 0}])
    def test_a_thought_that_says_not_how_it_was_made_is_lost(
        self, engine: FakeEngine, solver: AvpChatModel, thought: AIMessage, recipe: Any
    ) -> None:
        engine.store.delete(handle_of(thought))

        assert made(solver.invoke([QUESTION, with_metadata(thought, avp={"think": recipe})]))["mode"] == "lost"

    def test_more_steps_than_the_window_has_are_not_tried(
        self, engine: FakeEngine, solver: AvpChatModel, thought: AIMessage
    ) -> None:
        engine.store.delete(handle_of(thought))
        recipe = made(thought)["think"] | {"steps": 10**9}

        assert made(solver.invoke([QUESTION, with_metadata(thought, avp={"think": recipe})]))["mode"] == "lost"


def in_run(model: AvpChatModel, messages: list[BaseMessage], **configurable: str) -> BaseMessage:
    """The model's answer inside a run with that config, as in a graph's node."""
    config: RunnableConfig = {"configurable": configurable}
    return RunnableLambda(lambda _: model.invoke(messages)).invoke(None, config)


class TestScopes:
    def test_a_thread_honours_its_own_handles_only(self, engine: FakeEngine, solver: AvpChatModel) -> None:
        thinker = AvpChatModel(engine=engine, mode="latent")
        thought = in_run(thinker, [QUESTION], thread_id="a")

        assert made(in_run(solver, [QUESTION, thought], thread_id="a"))["mode"] == "kv"
        assert made(in_run(solver, [thought, FOLLOW_UP], thread_id="b"))["mode"] == "lost"
        assert made(solver.invoke([thought, FOLLOW_UP]))["mode"] == "lost"

    def test_the_same_thought_in_two_threads_has_two_handles(self, engine: FakeEngine) -> None:
        thinker = AvpChatModel(engine=engine, mode="latent")
        one, two, again = (in_run(thinker, [QUESTION], thread_id=thread) for thread in "aba")

        assert handle_of(one)["id"] != handle_of(two)["id"]
        assert handle_of(one)["id"] == handle_of(again)["id"]

    def test_a_user_has_one_scope_in_all_threads(self, engine: FakeEngine) -> None:
        thinker = AvpChatModel(engine=engine, mode="latent", scope="user")
        solver = AvpChatModel(engine=engine, scope="user")
        thought = in_run(thinker, [QUESTION], thread_id="a", user_id="ann")

        assert made(in_run(solver, [QUESTION, thought], thread_id="b", user_id="ann"))["mode"] == "kv"
        assert made(in_run(solver, [thought, FOLLOW_UP], thread_id="a", user_id="bob"))["mode"] == "lost"
        with pytest.raises(ConfigurationError, match="scope='user' needs to know the user"):
            in_run(solver, [QUESTION], thread_id="a")

    def test_an_open_scope_honours_every_handle_of_the_namespace(self, engine: FakeEngine) -> None:
        thought = in_run(AvpChatModel(engine=engine, mode="latent"), [QUESTION], thread_id="a")
        solver = AvpChatModel(engine=engine, scope="open")

        assert made(in_run(solver, [QUESTION, thought], thread_id="b"))["mode"] == "kv"
