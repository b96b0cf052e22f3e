"""AvpMiddleware in agents made by create_agent, and contexts in supervisors and swarms."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from fake_engine import FakeEngine
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, RemoveMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.graph.message import REMOVE_ALL_MESSAGES
from langgraph_supervisor import create_supervisor
from langgraph_swarm import SwarmState, create_handoff_tool, create_swarm

from avp_agents.errors import ConfigurationError
from avp_langgraph import AvpChatModel, AvpMiddleware, ContextState, GenerateNode, ThinkNode

QUESTION = HumanMessage("What is 24 * 17 + 3?")
THREAD: Any = {"configurable": {"thread_id": "a"}}


class State(MessagesState, ContextState):
    pass


class Scripted(GenericFakeChatModel):
    """Says what it was told to say, and takes any tools."""

    calls: list[dict[str, Any]]

    def bind_tools(self, tools: Sequence[Any], **options: Any) -> Any:
        return self.bind(**options)

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **options: Any) -> Any:
        self.calls.append(options)
        return super()._generate(messages, stop, run_manager)


def scripted(*answers: str | AIMessage) -> Scripted:
    messages: Iterator[Any] = iter(answers)
    return Scripted(messages=messages, calls=[])


def call_of(tool: str, call_id: str) -> AIMessage:
    return AIMessage("", tool_calls=[{"name": tool, "args": {}, "id": call_id}])


@pytest.fixture
def model(engine: FakeEngine) -> AvpChatModel:
    return AvpChatModel(engine=engine, scope="open")


@pytest.fixture
def thought(engine: FakeEngine, model: AvpChatModel) -> Any:
    return ThinkNode(model, key="researcher", prompt="Research.").invoke({"messages": [QUESTION]})["contexts"]


class TestCreateAgent:
    def test_it_answers_on_the_context_and_keeps_its_own(
        self, engine: FakeEngine, model: AvpChatModel, thought: Any
    ) -> None:
        agent: Any = create_agent(model, middleware=[AvpMiddleware(context="researcher")])
        result = agent.invoke({"messages": [QUESTION], "contexts": thought})

        assert engine.requests[-1].base is engine.resolve(thought["researcher"])
        assert set(result["contexts"]) == {"researcher", "agent"}
        assert result["contexts"]["agent"] == result["messages"][-1].response_metadata["avp_context"]

    async def test_on_event_loops_too(self, engine: FakeEngine, model: AvpChatModel, thought: Any) -> None:
        agent: Any = create_agent(model, middleware=[AvpMiddleware(key="solver", context="researcher")])
        result = await agent.ainvoke({"messages": [QUESTION], "contexts": thought})

        assert engine.requests[-1].base is engine.resolve(thought["researcher"])
        assert set(result["contexts"]) == {"researcher", "solver"}

    def test_the_next_turn_goes_on_from_the_last_answer(
        self, engine: FakeEngine, model: AvpChatModel, thought: Any
    ) -> None:
        middleware = [AvpMiddleware(context="researcher")]
        agent: Any = create_agent(model, middleware=middleware, checkpointer=InMemorySaver())
        first = agent.invoke({"messages": [QUESTION], "contexts": thought}, THREAD)
        agent.invoke({"messages": [HumanMessage("Sure?")]}, THREAD)

        assert engine.requests[-1].base is engine.resolve(first["contexts"]["agent"])
        assert engine.requests[-1].text == "|Sure?||"

    def test_its_own_context_outlives_its_messages(self, engine: FakeEngine, model: AvpChatModel) -> None:
        agent: Any = create_agent(model, middleware=[AvpMiddleware(context="agent")], checkpointer=InMemorySaver())
        first = agent.invoke({"messages": [QUESTION]}, THREAD)
        agent.update_state(THREAD, {"messages": [RemoveMessage(REMOVE_ALL_MESSAGES)]})
        agent.invoke({"messages": [HumanMessage("Sure?")]}, THREAD)

        assert engine.requests[-1].base is engine.resolve(first["contexts"]["agent"])

    def test_and_a_summary_of_them(self, engine: FakeEngine, model: AvpChatModel) -> None:
        summary = SummarizationMiddleware(scripted("They talked."), trigger=("messages", 3), keep=("messages", 1))
        middleware: Any = [summary, AvpMiddleware(context="agent")]
        agent: Any = create_agent(model, middleware=middleware, checkpointer=InMemorySaver())
        first = agent.invoke({"messages": [QUESTION]}, THREAD)
        second = agent.invoke({"messages": [HumanMessage("Sure?")]}, THREAD)

        assert "They talked." in second["messages"][0].text
        assert engine.requests[-1].base is engine.resolve(first["contexts"]["agent"])

    def test_other_models_are_called_as_they_are(self, thought: Any) -> None:
        other = scripted("411")
        agent: Any = create_agent(other, middleware=[AvpMiddleware(context="researcher")])
        result = agent.invoke({"messages": [QUESTION], "contexts": thought})

        assert "avp_context" not in other.calls[0]
        assert set(result["contexts"]) == {"researcher"}

    def test_a_context_that_was_taken_back_is_not_used(self, engine: FakeEngine, model: AvpChatModel) -> None:
        agent: Any = create_agent(model, middleware=[AvpMiddleware(context="researcher")])
        agent.invoke({"messages": [QUESTION], "contexts": {"researcher": None}})

        assert engine.requests[-1].base is None

    def test_a_context_that_never_was_is_told(self, model: AvpChatModel) -> None:
        agent: Any = create_agent(model, middleware=[AvpMiddleware(context="researcher")])
        with pytest.raises(ConfigurationError, match=re.escape("no context 'researcher' (there: none)")):
            agent.invoke({"messages": [QUESTION]})


def worker(name: str, node: Any) -> Any:
    graph = StateGraph(State)
    graph.add_node(name, node)
    graph.add_edge(START, name)
    return graph.compile(name=name)


class TestSupervisor:
    @pytest.mark.parametrize("output_mode", ["last_message", "full_history"])
    def test_workers_hand_contexts_on_through_the_channel(
        self, engine: FakeEngine, model: AvpChatModel, output_mode: Any
    ) -> None:
        """The handoff tool copies the worker's whole state back: the same handles are merged again."""
        researcher = worker("researcher", ThinkNode(model, key="facts", prompt=lambda state: [QUESTION]))
        solver = worker("solver", GenerateNode(model, context="facts", prompt=lambda state: [QUESTION]))
        supervisor = scripted(
            call_of("transfer_to_researcher", "1"), call_of("transfer_to_solver", "2"), AIMessage("Done.")
        )
        team = create_supervisor(
            [researcher, solver], model=supervisor, state_schema=TeamState, output_mode=output_mode
        ).compile(checkpointer=InMemorySaver())
        result = team.invoke({"messages": [QUESTION]}, THREAD)  # pyright: ignore[reportArgumentType]

        assert set(result["contexts"]) == {"facts", "solver"}
        assert [request.kind for request in engine.requests] == ["think", "generate"]
        assert engine.requests[-1].base is engine.resolve(result["contexts"]["facts"])

    def test_a_workers_message_carries_its_context_to_the_next_one(
        self, engine: FakeEngine, model: AvpChatModel
    ) -> None:
        """Only the chat models are swapped; the channel is not needed."""
        thinker = model.with_options(mode="latent", latent_steps=3)
        researcher = worker("researcher", lambda state: {"messages": [thinker.invoke([QUESTION])]})
        solver = worker("solver", lambda state: {"messages": [model.invoke(state["messages"])]})
        supervisor = scripted(call_of("transfer_to_researcher", "1"), call_of("transfer_to_solver", "2"), "Done.")
        team = create_supervisor([researcher, solver], model=supervisor).compile()
        result = team.invoke({"messages": [QUESTION]})  # pyright: ignore[reportArgumentType]
        answer = [message for message in result["messages"] if "avp" in message.response_metadata][-1]

        assert answer.response_metadata["avp"]["tokens_not_decoded"] == 3
        assert "latent steps" not in engine.requests[-1].text


class TeamState(State):
    remaining_steps: int


def test_a_swarm_passes_messages_only_and_they_carry_their_contexts(engine: FakeEngine, model: AvpChatModel) -> None:
    thinker = model.with_options(mode="latent", latent_steps=3)

    def think(state: MessagesState) -> Any:
        return {"messages": [thinker.invoke(state["messages"])]}

    front: Any = create_agent(
        scripted(call_of("transfer_to_solver", "1")), [create_handoff_tool(agent_name="solver")], name="front"
    )
    swarm = create_swarm(
        [front, worker("solver", lambda state: {"messages": [model.invoke(state["messages"])]})],
        default_active_agent="front",
        state_schema=SwarmState,
    ).compile(checkpointer=InMemorySaver())
    thought = think({"messages": [QUESTION]})["messages"]
    result = swarm.invoke({"messages": [QUESTION, *thought, HumanMessage("Solve it.")]}, THREAD)  # pyright: ignore[reportArgumentType]

    assert result["active_agent"] == "solver"
    assert engine.requests[-1].base is engine.resolve(thought[0].response_metadata["avp_context"])
