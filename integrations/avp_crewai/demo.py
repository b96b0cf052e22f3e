"""A researcher → solver crew, run twice: handing over a latent context, and handing over text.

Both crews have the same agents, tasks and engine. In the text crew the researcher writes its findings, and its context
is deleted, as if another LLM had written them; in the latent crew it thinks. Both solvers, and the researcher that
writes, decode as many tokens as they were asked for, no fewer, so that the times compare.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from crewai import Agent, Crew, Task

from avp_agents.answer.options import GenerateOptions
from avp_agents.demo import AgentRun, Comparison, DemoRequest, GraphRun, compare
from avp_agents.engine.protocol import Engine
from avp_crewai.llm import AvpLLM
from avp_crewai.reply import ReplyForm
from avp_crewai.runs import handover


class _FixedLengthLLM(AvpLLM):
    """Decodes `max_tokens` tokens, whatever the model would rather do."""

    def _generate_options(self, form: ReplyForm, source: str) -> GenerateOptions:
        return {**super()._generate_options(form, source), "min_tokens": int(self.max_tokens or 1)}


def run(engine: Engine, request: DemoRequest, report: Callable[[str], None]) -> Comparison:
    """Run both crews on one engine."""
    return compare(partial(_measure, engine), request, report, graph="crew")


def _measure(engine: Engine, request: DemoRequest, latent: bool) -> GraphRun:
    """Run a crew. Its contexts are deleted afterwards, so that the next one cannot reuse what it prefilled."""

    def forget(output: Any) -> None:
        for handle in engine.store.list():
            engine.store.delete(handle)

    options: dict[str, Any] = {"engine": engine, "latent_steps": request.latent_steps}
    researcher_llm = _FixedLengthLLM(
        **options, mode="latent" if latent else "text", max_tokens=request.researcher_tokens
    )
    researcher = Agent(
        role="Researcher", goal="Analyze the problem carefully", backstory="You find what matters.", llm=researcher_llm
    )
    solver = Agent(
        role="Solver",
        goal="Solve the problem step by step",
        backstory="You answer what is asked.",
        llm=_FixedLengthLLM(**options, max_tokens=request.max_tokens),
    )
    research = Task(
        description=f"Analyze: {request.question}",
        expected_output="What matters for the answer.",
        agent=researcher,
        callback=None if latent else forget,
    )
    solve = Task(
        description=f"Solve: {request.question}", expected_output="The answer.", agent=solver, context=[research]
    )
    crew = Crew(agents=[researcher, solver], tasks=[research, solve], verbose=False)
    start = time.perf_counter()
    with handover() as made:
        crew.kickoff()
    seconds = time.perf_counter() - start
    forget(None)
    agents = zip((researcher, solver), (research, solve), made.calls, strict=True)
    return GraphRun(tuple(_agent_run(*each) for each in agents), seconds)


def _agent_run(agent: Agent, task: Task, call: dict[str, Any]) -> AgentRun:
    assert task.output is not None
    handed_text = sum(len(other.output.raw.encode()) for other in _context(task) if other.output is not None)
    return AgentRun(
        agent=agent.role.lower(),
        seconds=task.execution_duration or 0.0,
        latent_steps=call["latent_steps"],
        tokens_decoded=call["tokens_decoded"],
        positions_reused=call["positions_reused"],
        bytes_handed_over=call["bytes"] + (handed_text if call["mode"] == "text" else 0),
        mode=call["mode"],
        text=task.output.raw,
    )


def _context(task: Task) -> list[Task]:
    return task.context if isinstance(task.context, list) else []
