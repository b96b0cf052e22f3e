"""Tool results and retries continue the context of the task's own earlier call."""

from __future__ import annotations

from typing import Any, cast

import pytest
from crewai.tools import tool
from crews import agent, crew, kickoff, task
from llm_events import Events
from pydantic import BaseModel
from scripted_crew_engine import ScriptedEngine

from avp_crewai import AvpLLM
from avp_crewai.messages import Answer, what_follows, what_was_put_in

ACT = 'Thought: I look it up.\nAction: price_of\nAction Input: {"thing": "pen"}'
CALL = '<tool_call>\n{"name": "price_of", "arguments": {"thing": "pen"}}\n</tool_call>'
FINISH = "Thought: I know the final answer.\nFinal Answer: A pen costs three dollars."


@tool("price_of")
def price_of(thing: str) -> str:
    """The price of a thing, in dollars."""
    return f"{thing}: 3 dollars"


def test_react_tools(watched: ScriptedEngine, events: Events) -> None:
    worker = agent("Worker", watched, tools=[price_of], llm={"native_tools": False})
    watched.script = [ACT, FINISH]
    solve = task("What does a pen cost?", worker)
    output = kickoff(solve, task("And two?", agent("Solver", watched), context=[solve]))

    asked, told, solved = watched.requests
    assert "Action Input:" in asked.text
    assert told.context is not None
    assert [message["role"] for message in told.prompt] == ["user", "user"]
    assert told.prompt[0]["content"] == "Observation: pen: 3 dollars"
    assert asked.text not in told.text
    first, second = (event.usage for event in events.completed[:2])
    assert second["cached_prompt_tokens"] >= first["prompt_tokens"]
    assert output.tasks_output[0].raw == "A pen costs three dollars."
    assert "three dollars" not in solved.text, "its context stands for it, whatever CrewAI cut from the answer"


def test_native_tools(watched: ScriptedEngine, events: Events) -> None:
    worker = agent("Worker", watched, tools=[price_of], llm={"max_tokens": 60})
    watched.script = [CALL, "A pen costs three dollars."]
    solve = task("What does a pen cost?", worker)
    output = kickoff(solve, task("And two?", agent("Solver", watched), context=[solve]))

    asked, told, solved = watched.requests
    assert [definition["function"]["name"] for definition in asked.options["tools"]] == ["price_of"]
    assert told.context is not None
    assert told.options["tools"] == [], "the context that goes on has shown them"
    assert [(message["role"], message["content"]) for message in told.prompt] == [("tool", "pen: 3 dollars")]
    assert [handoff["mode"] for handoff in events.handoffs] == ["none", "kv", "kv"]
    assert [event.call_type.value for event in events.completed[:2]] == ["tool_call", "llm_call"]
    assert output.tasks_output[0].raw == "A pen costs three dollars."
    assert "three dollars" not in solved.text


def test_the_model_itself_chooses_between_text_and_a_call(watched: ScriptedEngine) -> None:
    llm = AvpLLM(engine=cast("Any", watched), max_tokens=30)
    schema = {"type": "object", "properties": {"thing": {"enum": ["pen", "ink"]}}, "required": ["thing"]}
    function = {"name": "price_of", "description": "The price of a thing.", "parameters": schema, "strict": True}
    answer = llm.call("Look up the price of a pen.", tools=[{"type": "function", "function": function}])

    assert isinstance(answer, str) or answer[0]["function"]["name"] == "price_of"


def test_available_functions_are_run(scripted: ScriptedEngine) -> None:
    llm = AvpLLM(engine=cast("Any", scripted))
    schema = {"type": "object", "properties": {"thing": {"type": "string"}}, "required": ["thing"]}
    function = {"name": "price_of", "description": "The price of a thing.", "parameters": schema}
    scripted.script = [CALL]
    answer = llm.call(
        "Look up the price of a pen.",
        tools=[{"type": "function", "function": function}],
        available_functions={"price_of": lambda thing: f"{thing}: 3 dollars"},
    )

    assert answer == "pen: 3 dollars"


def test_a_tool_result_that_is_the_answer_is_read_as_text(scripted: ScriptedEngine, events: Events) -> None:
    @tool("price_of", result_as_answer=True)
    def final_price_of(thing: str) -> str:
        """The price of a thing, in dollars."""
        return "dollars: 3"

    worker = agent("Worker", scripted, tools=[final_price_of], llm={"native_tools": False})
    scripted.script = [ACT]
    solve = task("What does a pen cost?", worker)
    kickoff(solve, task("And two?", agent("Solver", scripted), context=[solve]))

    assert "dollars: 3" in scripted.requests[-1].text
    assert "not what its LLM answered" in events.handoffs[-1]["reason"]


def test_a_guardrails_objection_continues_the_context(scripted: ScriptedEngine, events: Events) -> None:
    verdicts: list[Any] = [(False, "Name the currency."), (True, "fine")]
    research = task("Research pens.", agent("Researcher", scripted))
    solve = task(
        "What does a pen cost?",
        agent("Solver", scripted),
        context=[research],
        guardrail=lambda output: verdicts.pop(0),
    )
    scripted.script = ["Pens are blue.", "Three.", "Three dollars."]
    kickoff(research, solve)

    _, first, again = scripted.requests
    assert again.context is not None
    assert again.context.extends(first.context)  # pyright: ignore[reportArgumentType]
    assert "Name the currency." in again.text
    assert "What does a pen cost?" not in again.text, "the context has the question"
    assert events.handoffs[-1]["mode"] == "kv"


class Price(BaseModel):
    dollars: int


def test_output_pydantic(watched: ScriptedEngine, events: Events) -> None:
    solver = agent("Solver", watched, llm={"max_tokens": 40})
    solve = task("What does a pen cost?", solver, output_pydantic=Price)
    output = kickoff(solve, task("And two?", agent("Next", watched), context=[solve]))

    assert isinstance(output.tasks_output[0].pydantic, Price)
    assert output.tasks_output[0].raw not in watched.requests[-1].text
    assert events.handoffs[-1]["mode"] == "kv"


def test_the_last_call_that_crewai_forces_continues_the_context(scripted: ScriptedEngine) -> None:
    worker = agent("Worker", scripted, tools=[price_of], llm={"native_tools": False}, max_iter=1)
    scripted.script = [ACT, FINISH]
    output = crew(task("What does a pen cost?", worker)).kickoff()

    assert str(output) == "A pen costs three dollars."
    assert scripted.requests[-1].context is not None
    assert "What does a pen cost?" not in scripted.requests[-1].text


class TestWhatFollows:
    asked = [{"role": "user", "content": "2 + 2?"}]  # noqa: RUF012

    def test_what_was_added_to_the_answer_is_told_by_the_user(self) -> None:
        quoted = {"role": "assistant", "content": "I add.\nObservation: 4"}
        assert what_follows(self.asked, Answer("I add."), [*self.asked, quoted]) == [
            {"role": "user", "content": "Observation: 4"}
        ]

    @pytest.mark.parametrize(
        "later",
        [
            [{"role": "user", "content": "2 + 2?"}],
            [{"role": "user", "content": "3 + 3?"}, {"role": "assistant", "content": "I add."}],
            [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "I subtract."}],
            [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "I add."}],
        ],
        ids=["the same prompt", "another prompt", "another answer", "nothing new"],
    )
    def test_other_conversations_do_not_go_on(self, later: list[Any]) -> None:
        assert what_follows(self.asked, Answer("I add."), later) is None

    def test_what_a_guardrail_put_in_is_found_by_comparison(self) -> None:
        earlier = [{"role": "user", "content": "Task: add.\n\nContext:\n# one\n\nGo on:"}]
        again = [{"role": "user", "content": "Task: add.\n\nContext:\n# wrong\nTry again\n\nGo on:"}]
        other = [{"role": "user", "content": "Task: multiply.\n\nContext:\n# wrong\n\nGo on:"}]

        assert what_was_put_in(earlier, "\n\nContext:\n# one", again) == [
            {"role": "user", "content": "# wrong\nTry again"}
        ]
        assert what_was_put_in(earlier, "\n\nContext:\n# one", other) is None
        assert what_was_put_in(earlier, "", again) is None
