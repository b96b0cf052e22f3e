"""A researcher and a solver on the default model, in an ordinary graph in which only the chat models are swapped."""

from __future__ import annotations

import operator
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from langchain_core.messages import AIMessage, AnyMessage, BaseMessage, HumanMessage
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.types import Send
from transformers import AutoTokenizer
from typing_extensions import TypedDict

from avp_agents import LatentEngine
from avp_agents.context import LatentSegment, TokenSegment
from avp_langgraph import AvpChatModel, GenerateNode, ThinkNode, close_engines, merge_contexts

RECIPE = Path(__file__).parents[2] / "recipes" / "researcher_solver.py"
QUESTION = HumanMessage("A shop sells pens at 3 dollars each. How much do 14 pens cost?")
OTHER_QUESTION = HumanMessage("Which planets of the solar system have rings?")
SOLVE = HumanMessage("Answer the question step by step.")
STEPS, TOKENS = 20, 24


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    """The recipe's names."""
    return runpy.run_path(str(RECIPE))


@pytest.fixture(scope="module")
def build_graph(recipe: dict[str, Any]) -> Callable[..., Any]:
    """The recipe's own graph."""
    return recipe["build_graph"]


@pytest.fixture(scope="module")
def solver(real_engine: LatentEngine) -> AvpChatModel:
    return AvpChatModel(engine=real_engine, max_tokens=TOKENS)


@pytest.fixture(scope="module")
def thinker(real_engine: LatentEngine) -> AvpChatModel:
    return AvpChatModel(engine=real_engine, mode="latent", latent_steps=STEPS)


@pytest.fixture(scope="module")
def messages(build_graph: Callable[..., Any], thinker: AvpChatModel, solver: AvpChatModel) -> list[BaseMessage]:
    """Question, thought and answer of a run."""
    return build_graph(thinker, solver).invoke({"messages": [QUESTION]})["messages"]


def made(message: BaseMessage) -> dict[str, Any]:
    return message.response_metadata["avp"]


def handle_of(message: BaseMessage) -> dict[str, Any]:
    return message.response_metadata["avp_context"]


def first_token(message: BaseMessage) -> dict[int, float]:
    """The most likely first tokens and their log-probabilities."""
    return {
        top["token_id"]: top["logprob"] for top in message.response_metadata["logprobs"]["content"][0]["top_logprobs"]
    }


def test_the_recipe_runs(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["researcher_solver.py", QUESTION.text])
    recipe["main"]()
    close_engines()
    thought, reused, *answer = capsys.readouterr().out.splitlines()

    assert thought.startswith("researcher thought for 20 latent steps")
    assert "handed over by kv" in thought
    assert reused.startswith("solver reused ")
    assert "".join(answer).strip()


def test_the_researcher_decodes_nothing(real_engine: LatentEngine, messages: list[BaseMessage]) -> None:
    _, thought, _ = messages
    context = real_engine.resolve(handle_of(thought))

    assert made(thought)["tokens_decoded"] == 0
    assert [type(segment) for segment in context.lineage] == [TokenSegment, LatentSegment]
    assert len(context.lineage[1]) == STEPS
    assert thought.text == f"researcher thought for {STEPS} latent steps ({len(context)} positions)"


def test_the_solver_answers_on_the_researchers_context(real_engine: LatentEngine, messages: list[BaseMessage]) -> None:
    _, thought, answer = messages
    assert isinstance(answer, AIMessage)
    assert answer.usage_metadata is not None
    researchers = real_engine.resolve(handle_of(thought))

    assert made(answer)["mode"] == "kv"
    assert answer.usage_metadata.get("input_token_details", {}).get("cache_read", 0) >= len(researchers)
    assert real_engine.resolve(handle_of(answer)).extends(researchers)


def test_the_solver_reads_no_text_of_the_researcher(real_engine: LatentEngine, messages: list[BaseMessage]) -> None:
    _, thought, answer = messages
    seen = real_engine.resolve(handle_of(answer))
    tokenizer = AutoTokenizer.from_pretrained(real_engine.model_path)
    text = tokenizer.decode(seen.token_ids())

    assert QUESTION.text in text
    assert answer.text.strip() in text
    assert "latent steps" not in text
    assert thought.text not in text


def test_another_questions_context_changes_the_solvers_logits(thinker: AvpChatModel, solver: AvpChatModel) -> None:
    ours, others = thinker.invoke([QUESTION]), thinker.invoke([OTHER_QUESTION])
    asked = solver.bind(logprobs=5, max_tokens=1)
    on_ours, again, on_others = (
        first_token(asked.invoke("Answer it.", avp_context=handle_of(thought))) for thought in (ours, ours, others)
    )

    assert on_ours == pytest.approx(again, abs=1e-4)
    assert on_others != pytest.approx(on_ours, abs=1e-2)


def test_without_the_context_the_answer_is_another_one(solver: AvpChatModel, messages: list[BaseMessage]) -> None:
    question, thought, _ = messages
    asked = solver.bind(logprobs=5, max_tokens=1)
    bare = thought.model_copy(update={"response_metadata": {}, "content": ""})

    assert first_token(asked.invoke([question, thought])) != pytest.approx(
        first_token(asked.invoke([question, bare])), abs=1e-2
    )


def test_a_researcher_that_writes_is_prefix_reuse(solver: AvpChatModel) -> None:
    findings = solver.invoke([QUESTION])
    answer = solver.invoke([QUESTION, findings, SOLVE])
    plain = solver.invoke([QUESTION, AIMessage(findings.text), SOLVE])
    assert answer.usage_metadata is not None
    assert plain.usage_metadata is not None

    assert made(answer)["mode"] == "kv"
    assert made(answer)["positions_reused"] >= handle_of(findings)["tokens"] - 1
    assert answer.usage_metadata["input_tokens"] == plain.usage_metadata["input_tokens"]
    assert answer.text == plain.text


async def test_event_loops_get_the_same(thinker: AvpChatModel, solver: AvpChatModel) -> None:
    thought, again = thinker.invoke([QUESTION]), await thinker.ainvoke([QUESTION])
    answer, same = solver.invoke([QUESTION, thought, SOLVE]), await solver.ainvoke([QUESTION, again, SOLVE])

    assert handle_of(again)["id"] == handle_of(thought)["id"]
    assert same.text == answer.text
    assert handle_of(same)["id"] == handle_of(answer)["id"]


@pytest.fixture(params=["memory", "sqlite"])
def checkpointer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BaseCheckpointSaver[Any]]:
    if request.param == "memory":
        yield InMemorySaver()
    else:
        with SqliteSaver.from_conn_string(str(tmp_path / "checkpoints.sqlite")) as saver:
            yield saver


def test_the_checkpoint_holds_handles_and_no_tensor(
    build_graph: Callable[..., Any],
    thinker: AvpChatModel,
    solver: AvpChatModel,
    checkpointer: BaseCheckpointSaver[Any],
) -> None:
    graph = build_graph(thinker, solver)
    graph.checkpointer = checkpointer
    config: Any = {"configurable": {"thread_id": "a"}}
    graph.invoke({"messages": [QUESTION]}, config)
    saved = [checkpoint.checkpoint for checkpoint in checkpointer.list(config)]
    _, thought, answer = saved[0]["channel_values"]["messages"]

    for message in (thought, answer):
        assert len(checkpointer.serde.dumps_typed(handle_of(message))[1]) < 300
    data = b"".join(checkpointer.serde.dumps_typed(checkpoint)[1] for checkpoint in saved)
    assert b"torch" not in data
    assert len(data) < 16_000


class Branch(TypedDict):
    question: str
    contexts: dict[str, Any]


class Branches(TypedDict):
    questions: list[str]
    messages: Annotated[list[AnyMessage], operator.add]
    contexts: Annotated[dict[str, Any], merge_contexts]


def test_eight_researchers_at_once_do_not_mix(real_engine: LatentEngine, solver: AvpChatModel) -> None:
    questions = [f"How much do {number} pens cost if one costs {number + 1} dollars?" for number in range(2, 10)]

    def question_of(state: Branch) -> str:
        return state["question"]

    def ask(state: Branch) -> list[BaseMessage]:
        return [HumanMessage(state["question"])]

    def to_researchers(state: Branches) -> list[Send]:
        return [Send("researcher", {"question": question}) for question in state["questions"]]

    def to_solvers(state: Branches) -> list[Send]:
        return [Send("solver", {"question": q, "contexts": state["contexts"]}) for q in state["questions"]]

    graph = StateGraph(Branches)
    graph.add_node("researcher", ThinkNode(real_engine, key=question_of, prompt=ask, steps=5))
    graph.add_node("all thought", lambda state: {})
    graph.add_node(
        "solver", GenerateNode(solver, context=question_of, key=lambda state: f"on {state['question']}", prompt=ask)
    )
    graph.add_conditional_edges(START, to_researchers, ["researcher"])
    graph.add_edge("researcher", "all thought")
    graph.add_conditional_edges("all thought", to_solvers, ["solver"])
    result = graph.compile().invoke({"questions": questions, "messages": [], "contexts": {}})
    tokenizer = AutoTokenizer.from_pretrained(real_engine.model_path)

    assert len(result["messages"]) == 8
    for question in questions:
        thought = real_engine.resolve(result["contexts"][question])
        answer = real_engine.resolve(result["contexts"][f"on {question}"])
        assert answer.extends(thought)
        assert question in tokenizer.decode(thought.token_ids())
        assert sum(other in tokenizer.decode(answer.token_ids()) for other in questions) == 1
