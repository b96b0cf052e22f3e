"""A task's context reaches the tasks that build on it; the text that CrewAI wrote for it stays out of the prompt."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from crewai import Process
from crewai.llms.base_llm import BaseLLM
from crews import agent, crew, kickoff, task
from llm_events import Events
from scripted_crew_engine import ScriptedEngine

from avp_agents.crossing.thought import TELL
from avp_agents.errors import ContextLostError

FINDINGS = "Two pens cost six dollars."


@pytest.mark.parametrize("explicit", [True, False], ids=["context given", "CrewAI's own rule"])
def test_the_solver_answers_on_the_researchers_context(watched: ScriptedEngine, events: Events, explicit: bool) -> None:
    researcher, solver = agent("Researcher", watched), agent("Solver", watched)
    research = task("What do two pens cost?", researcher)
    solve = task("What does one cost?", solver, **({"context": [research]} if explicit else {}))
    watched.script = [FINDINGS]
    output = kickoff(research, solve)

    first, second = watched.requests
    assert first.context is None
    assert second.context is not None
    assert FINDINGS not in second.text
    assert "What does one cost?" in second.text
    assert output.tasks_output[0].raw == FINDINGS
    assert [handoff["mode"] for handoff in events.handoffs] == ["none", "kv"]
    usages = [event.usage for event in events.completed]
    assert usages[1]["cached_prompt_tokens"] >= len(second.context) - 1
    for count in ("prompt_tokens", "completion_tokens", "cached_prompt_tokens", "total_tokens"):
        assert getattr(output.token_usage, count) == sum(usage[count] for usage in usages)
    assert output.token_usage.successful_requests == 2


def test_a_latent_researcher_decodes_nothing(watched: ScriptedEngine, events: Events) -> None:
    researcher = agent("Researcher", watched, llm={"mode": "latent"})
    research = task("What do two pens cost?", researcher)
    output = kickoff(research, task("What does one cost?", agent("Solver", watched), context=[research]))

    thought, solved = events.handoffs
    assert output.tasks_output[0].raw.startswith("Researcher thought for 3 latent steps (")
    assert output.tasks_output[0].raw not in watched.requests[-1].text
    assert (thought["latent_steps"], thought["tokens_decoded"]) == (3, 0)
    assert (solved["mode"], solved["tokens_not_decoded"]) == ("kv", 3)
    assert output.token_usage.reasoning_tokens == 3


def test_a_latent_researcher_can_sum_up_what_it_thought(scripted: ScriptedEngine, events: Events) -> None:
    researcher = agent("Researcher", scripted, llm={"mode": "latent", "summary_tokens": 16})
    research = task("What do two pens cost?", researcher)
    scripted.script.append("Six dollars.")
    output = kickoff(research, task("What does one cost?", agent("Solver", scripted), context=[research]))

    assert output.tasks_output[0].raw == "Six dollars."
    assert 0 < events.handoffs[0]["tokens_decoded"] <= 16
    assert next(r for r in scripted.requests if r.kind == "generate").text == TELL
    handed = scripted.requests[-1].context
    assert handed is not None
    assert handed.readout is not None, "the summary is for people; what is handed over ends in the thought"


def test_where_the_context_was_deleted_the_text_is_read(
    watched: ScriptedEngine, events: Events, caplog: pytest.LogCaptureFixture
) -> None:
    def delete_contexts(output: Any) -> None:
        for handle in watched.store.list():
            watched.store.delete(handle)

    research = task("What do two pens cost?", agent("Researcher", watched), callback=delete_contexts)
    solve = task("What does one cost?", agent("Solver", watched), context=[research])
    watched.script = [FINDINGS]
    with caplog.at_level(logging.WARNING, "avp_crewai"):
        output = kickoff(research, solve)

    assert output.raw
    assert FINDINGS in watched.requests[1].text
    assert events.handoffs[1]["mode"] == "text"
    assert "no longer" in events.handoffs[1]["reason"]
    assert "What do two pens cost?" in caplog.text


def test_a_lost_context_can_be_an_error(scripted: ScriptedEngine) -> None:
    def delete_contexts(output: Any) -> None:
        for handle in scripted.store.list():
            scripted.store.delete(handle)

    research = task("What do two pens cost?", agent("Researcher", scripted), callback=delete_contexts)
    strict = agent("Solver", scripted, llm={"on_missing": "error"}, max_retry_limit=0)
    with pytest.raises(ContextLostError, match="task 'What do two pens cost\\?'"):
        kickoff(research, task("What does one cost?", strict, context=[research]))


def test_an_output_that_was_changed_counts_instead_of_its_context(scripted: ScriptedEngine, events: Events) -> None:
    correction = "Two pens cost eight dollars."
    researcher = agent("Researcher", scripted)
    research = task("What do two pens cost?", researcher, guardrail=lambda output: (True, correction))
    scripted.script = [FINDINGS]
    kickoff(research, task("What does one cost?", agent("Solver", scripted), context=[research]))

    assert correction in scripted.requests[1].text
    assert events.handoffs[1]["mode"] == "text"
    assert "not what its LLM answered" in events.handoffs[1]["reason"]


class OtherLLM(BaseLLM):
    """Another vendor's LLM."""

    def call(self, messages: Any, *args: Any, **options: Any) -> str:
        return FINDINGS


def test_another_vendors_findings_are_read_as_text(scripted: ScriptedEngine, events: Events) -> None:
    researcher = agent("Researcher", scripted)
    researcher.llm = OtherLLM(model="other")
    research = task("What do two pens cost?", researcher)
    kickoff(research, task("What does one cost?", agent("Solver", scripted), context=[research]))

    assert FINDINGS in scripted.requests[0].text
    assert events.handoffs[0]["mode"] == "text"


class TestSeveralPredecessors:
    def test_their_contexts_are_joined(self, watched: ScriptedEngine, events: Events) -> None:
        findings = ["Pens are blue.", "Paper is white."]
        watched.script = [*findings]
        # neither knows the other, so neither context holds the other
        tasks = [task(f"Look at {thing}.", agent(thing, watched), context=[]) for thing in ("pens", "paper")]
        kickoff(*tasks, task("Sum up.", agent("Editor", watched), context=tasks))

        *_, joined, edited = watched.requests
        assert joined.kind == "join"
        assert len(joined.options["contexts"]) == 2
        assert not any(finding in edited.text for finding in findings)
        handoff = events.handoffs[-1]
        assert handoff["reason"] == "2 contexts joined by replay"
        assert handoff["as_text"] == []
        usage = events.completed[-1].usage
        assert 0 < usage["cached_prompt_tokens"] < usage["prompt_tokens"]

    def test_in_a_chain_the_last_context_holds_them_all(self, scripted: ScriptedEngine) -> None:
        scripted.script = ["One.", "Two."]
        kickoff(*(task(f"Step {i}", agent(f"Worker {i}", scripted)) for i in range(3)))

        assert [request.kind for request in scripted.requests] == ["generate"] * 3
        last = scripted.requests[-1]
        assert last.context is not None
        assert last.context.extends(scripted.requests[1].context)  # pyright: ignore[reportArgumentType]
        assert "One." not in last.text
        assert "Two." not in last.text

    def test_a_predecessor_without_a_context_is_read_as_text_beside_the_others(
        self, scripted: ScriptedEngine, events: Events
    ) -> None:
        other = agent("Other", scripted)
        other.llm = OtherLLM(model="other")
        scripted.script = ["Paper is white."]
        tasks = [task("Look at pens.", other, context=[]), task("Look at paper.", agent("Mine", scripted), context=[])]
        kickoff(*tasks, task("Sum up.", agent("Editor", scripted), context=tasks))

        edited = scripted.requests[-1]
        assert FINDINGS in edited.text
        assert "Paper is white." not in edited.text
        assert edited.context is not None
        assert events.handoffs[-1]["mode"] == "kv"
        assert events.handoffs[-1]["as_text"] == ["task 'Look at pens.': it left no context"]

    def test_asynchronous_tasks(self, watched: ScriptedEngine, events: Events) -> None:
        tasks = [
            task(f"Look at {thing}.", agent(thing, watched), async_execution=True) for thing in ("pens", "paper", "ink")
        ]
        output = kickoff(*tasks, task("Sum up.", agent("Editor", watched), context=tasks))

        assert len(output.tasks_output) == 4
        assert len(watched.requests[-2].options["contexts"]) == 3
        assert not any(result.raw in watched.requests[-1].text for result in output.tasks_output[:3])
        assert events.handoffs[-1]["as_text"] == []


def test_where_contexts_do_not_fit_the_window_the_text_is_read(
    scripted: ScriptedEngine, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    researcher, solver = agent("Researcher", scripted), agent("Solver", scripted)
    research = task("What do two pens cost? " + "Think of every pen. " * 30, researcher)
    solve = task("What does one cost?", solver, context=[research])
    scripted.script = [FINDINGS]

    def shrink(output: Any) -> None:
        monkeypatch.setattr(type(scripted.engine._runtime), "window", property(lambda runtime: 260))

    research.callback = shrink
    kickoff(research, solve)

    assert [FINDINGS in request.text for request in scripted.requests] == [False, False, True]
    assert events.handoffs[-1]["mode"] == "text"
    assert "do not fit" in events.handoffs[-1]["reason"]


def test_hierarchical_process_and_delegation(watched: ScriptedEngine, events: Events) -> None:
    manager = agent("Manager", watched, llm={"native_tools": False}, allow_delegation=True)
    worker = agent("Worker", watched)
    delegate = (
        "Thought: I ask my coworker.\nAction: delegate_work_to_coworker\n"
        'Action Input: {"task": "Say what pens cost", "context": "Pens are sold in pairs", "coworker": "Worker"}'
    )
    watched.script = [delegate, FINDINGS, "Thought: I know.\nFinal Answer: Six dollars.", "Final Answer: Three."]
    research, solve = task("What do two pens cost?"), task("What does one cost?")
    output = crew(research, solve, agents=[worker], process=Process.hierarchical, manager_agent=manager).kickoff()

    asked, delegated, answered, solved = watched.requests
    assert delegated.context is not None, "the worker goes on from the manager's context"
    assert asked.text not in delegated.text
    assert "Pens are sold in pairs" in delegated.text
    assert answered.text.startswith(f"Observation: {FINDINGS}")
    assert "Six dollars." not in solved.text
    assert solved.context is not None
    assert [handoff["mode"] for handoff in events.handoffs] == ["none", "kv", "kv", "kv"]
    assert str(output) == "Three."


def test_kickoff_for_each_mixes_nothing(watched: ScriptedEngine, events: Events) -> None:
    researcher, solver = agent("Researcher", watched, llm={"mode": "latent"}), agent("Solver", watched)
    research = task("Think of the number {number}.", researcher)
    solve = task("Which number was it?", solver, context=[research])
    outputs: list[Any] = crew(research, solve).kickoff_for_each([{"number": n} for n in range(100, 108)])

    assert len(outputs) == 8
    for thought, solved in zip(watched.requests[::2], watched.requests[1::2], strict=True):
        number = thought.text.partition("number ")[2][:3]
        assert solved.context is not None
        told = watched._runtime.tokenizer.decode(list(solved.context.token_ids()))
        assert f"the number {number}." in told
    usages = [event.usage for event in events.completed]
    for i, output in enumerate(outputs):
        pair = usages[2 * i : 2 * i + 2]
        assert output.token_usage.total_tokens == sum(usage["total_tokens"] for usage in pair)
    assert watched.store.list() == []
