"""Agents, tasks and crews as tests need them: few words, few tokens."""

from __future__ import annotations

from typing import Any, cast

from crewai import Agent, Crew, Task
from crewai.crews.crew_output import CrewOutput

from avp_crewai import AvpLLM


def agent(role: str, engine: Any, **options: Any) -> Agent:
    llm_options: dict[str, Any] = {"max_tokens": 6, "latent_steps": 3} | options.pop("llm", {})
    llm = AvpLLM(engine=cast("Any", engine), **llm_options)
    return Agent(role=role, goal="be brief", backstory=f"a {role.lower()}", llm=llm, **options)


def task(description: str, worker: Agent | None = None, **options: Any) -> Task:
    return Task(description=description, expected_output="a line", agent=worker, **options)


def kickoff(*tasks: Task, **options: Any) -> CrewOutput:
    output = crew(*tasks, **options).kickoff()
    assert isinstance(output, CrewOutput)
    return output


def crew(*tasks: Task, agents: list[Agent] | None = None, **options: Any) -> Crew:
    workers = agents or list({id(t.agent): cast("Agent", t.agent) for t in tasks}.values())
    return Crew(agents=cast("Any", workers), tasks=list(tasks), verbose=False, **options)
