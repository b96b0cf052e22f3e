"""A researcher hands its thought to a solver: an ordinary CrewAI crew in which only the LLMs are swapped.

    python recipes/crew_researcher_solver.py "What is 24 * 17 + 3?"

The researcher runs 20 latent steps and decodes nothing; the solver answers on top of what it thought. Try
``mode="text"`` for the researcher, or any other LLM for one of both: the crew stays the same.
"""

import sys

from crewai import Agent, Crew, Task
from crewai.llms.base_llm import BaseLLM

from avp_crewai import AvpLLM


def build_crew(researcher_llm: BaseLLM, solver_llm: BaseLLM) -> Crew:
    researcher = Agent(
        role="Researcher",
        goal="Work out which quantities the question is about and how they depend on each other",
        backstory="You read carefully.",
        llm=researcher_llm,
    )
    solver = Agent(
        role="Solver", goal="Answer the question step by step", backstory="You like short answers.", llm=solver_llm
    )
    research = Task(description="Analyze: {question}", expected_output="What matters.", agent=researcher)
    solve = Task(description="Answer: {question}", expected_output="The answer.", agent=solver, context=[research])
    return Crew(agents=[researcher, solver], tasks=[research, solve])


def main() -> None:
    question = " ".join(sys.argv[1:]) or "A shop sells pens at 3 dollars each. How much do 14 pens cost?"
    crew = build_crew(AvpLLM(mode="latent", latent_steps=20), AvpLLM(max_tokens=128))
    answer = crew.kickoff(inputs={"question": question})

    print(crew.tasks[0].output)
    print(answer)
    print(crew.usage_metrics)


if __name__ == "__main__":
    main()
